"""Fields: those that are taken, and those that are refused by name."""

from __future__ import annotations

import io
import re
import time
import urllib.request
from typing import Any

import httpx
import pytest
from PIL import Image

from runtime.call import MAX_SEED
from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from runtime.serve.openai.schema import UNSUPPORTED, Body, ImageBody, body_model
from runtime.serve.service import Service
from tests.client import GENERATE, PROMPT, ask, files, refused


def test_openai_fields_are_taken(client: httpx.Client, pipeline: Pipeline) -> None:
    manifest = pipeline.manifest
    size = f"{manifest.sizes.width}x{manifest.sizes.height}"
    answer = ask(
        client, model=manifest.model, size=size, response_format="b64_json", quality="auto", background="opaque",
        user="someone", safety_identifier="someone", moderation="low",
    )  # fmt: skip
    assert abs(answer["created"] - time.time()) < 100
    assert files(answer) == files(ask(client))


def test_null_means_the_default(client: httpx.Client) -> None:
    optional = [name for name, field in ImageBody.model_fields.items() if not field.is_required()]
    nothing = dict.fromkeys([*optional, *UNSUPPORTED]) | {"num_inference_steps": 3}
    assert {"n", "size", "output_format", "moderation", "style", "seed"} <= set(nothing)
    assert files(ask(client, **nothing)) == files(ask(client))


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": ["a star"]}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": " \n\t\u2003"}, "prompt", "invalid_value"),
        ({"prompt": "a\0star"}, "prompt", "invalid_value"),
        ({"prompt": "a" * 32_001}, "prompt", "invalid_value"),
        ({"negative_prompt": "a\0star"}, "negative_prompt", "invalid_value"),
        ({"promt": "a star"}, "promt", "unknown_parameter"),
        ({"promt": None}, "promt", "unknown_parameter"),
        ({"moderation": "high"}, "moderation", "invalid_value"),
        ({"style": "loud"}, "style", "invalid_value"),
        ({"mask": "a"}, "mask", "unsupported_parameter"),
        ({"svg": {"model": "a"}}, "svg", "unsupported_parameter"),
        ({"": 1}, "", "unknown_parameter"),
        ({"response_format": "file"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": "1"}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"size": "64"}, "size", "invalid_value"),
        ({"size": "0x0"}, "size", "invalid_value"),
        ({"size": "64x63"}, "size", "invalid_value"),
        ({"size": "65536x65536"}, "size", "invalid_value"),
        ({"size": 64}, "size", "invalid_value"),
        ({"seed": -2}, "seed", "invalid_value"),
        ({"seed": MAX_SEED + 1}, "seed", "invalid_value"),
        ({"seed": 10**400}, "seed", "invalid_value"),
        ({"num_inference_steps": 0}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": 1000}, "num_inference_steps", "invalid_value"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "invalid_value"),
        ({"guidance_scale": -0.1}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": "4"}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": True}, "guidance_scale", "invalid_value"),
        ({"guidance_scale": 10**400}, "guidance_scale", "invalid_value"),
        ({"k": 0}, "k", "invalid_value"),
        ({"k": 65}, "k", "invalid_value"),
        ({"lanes": 0}, "lanes", "invalid_value"),
        ({"clip_skip": 60}, "clip_skip", "invalid_value"),
        ({"lanes": 3}, "lanes", "invalid_value"),
        ({"timeline": 1}, "timeline", "invalid_value"),
        ({"mode": "fast"}, "mode", "invalid_value"),
        ({"mode": "x" * 1000}, "mode", "invalid_value"),
        ({"drafts": "warm"}, "drafts", "invalid_value"),
        ({"scheduler": "heun3"}, "scheduler", "invalid_value"),
        ({"scheduler": ""}, "scheduler", "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_cannot_be_used_is_named(
    client: httpx.Client, body: dict[str, Any], param: str, code: str
) -> None:
    refused(client.post(GENERATE, json={"prompt": PROMPT, **body}), 400, param, code)


def test_an_unknown_model(client: httpx.Client) -> None:
    response = client.post(GENERATE, json={"prompt": PROMPT, "model": "dall-e-3"})
    assert "dall-e-3" in refused(response, 404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("sed", "seed"), ("steps", "num_inference_steps"), ("promt", "prompt"), ("negativ_prompt", "negative_prompt"),
     ("guidance", "guidance_scale"), ("cfg_scale", "guidance_scale"), ("width", "size"), ("sampler", "scheduler"),
     ("num_images_per_prompt", "n"), ("Seed", "seed"), ("num_inference_step", "num_inference_steps")],
)  # fmt: skip
def test_a_misspelt_field_gets_a_suggestion(client: httpx.Client, name: str, meant: str) -> None:
    response = client.post(GENERATE, json={"prompt": PROMPT, name: 1})
    assert refused(response, 400, name, "unknown_parameter").endswith(f"did you mean {meant}?")


def test_no_suggestion_where_nothing_is_near(client: httpx.Client) -> None:
    for name in ("zzzz", "image", "strength", ""):  # the latter two are of edits alone
        assert "did you mean" not in refused(
            client.post(GENERATE, json={"prompt": PROMPT, name: 1}), 400, name, "unknown_parameter"
        )


def test_quality_and_style_are_ignored_with_a_warning(client: httpx.Client) -> None:
    plain = ask(client)
    answer = ask(client, quality="hd", style="vivid")
    assert files(answer) == files(plain) and answer["quality"] == "standard"
    warnings = answer["report"]["warnings"]
    assert [warning.split(" is ignored")[0] for warning in warnings] == ["quality 'hd'", "style 'vivid'"]
    assert ask(client, quality="standard", moderation="low")["report"]["warnings"] == []


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_url_holds_the_whole_image(client: httpx.Client, output_format: str) -> None:
    plain = ask(client, output_format=output_format)
    (entry,) = ask(client, output_format=output_format, response_format="url")["data"]
    assert set(entry) == {"url"}
    with urllib.request.urlopen(entry["url"]) as opened:
        assert opened.headers.get_content_type() == f"image/{output_format}"
        assert opened.read() == files(plain)[0]


def test_size_auto_is_the_models_own(client: httpx.Client, pipeline: Pipeline) -> None:
    sizes = pipeline.manifest.sizes
    answer = ask(client, size="auto")
    assert answer["size"] == f"{sizes.width}x{sizes.height}"
    assert files(answer) == files(ask(client, size=answer["size"]))


def test_seed_minus_one_chooses_one_and_reports_it(client: httpx.Client) -> None:
    answers = [ask(client, seed=-1) for _ in range(3)]
    seeds = [answer["report"]["seed"] for answer in answers]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)
    for answer, seed in zip(answers, seeds, strict=True):
        assert files(ask(client, seed=seed)) == files(answer)


def test_a_body_has_the_models_and_the_servers_defaults(pipeline: Pipeline) -> None:
    service = Service(pipeline, Limits(steps=7), scheduler="euler")
    body = body_model(Body, service.limits, service.defaults).model_validate({"prompt": PROMPT})
    assert (body.call().num_inference_steps, body.call().scheduler) == (7, "euler")
    assert body.call().guidance_scale == pipeline.manifest.defaults.guidance_scale


def uploaded(client: httpx.Client, image: Image.Image | bytes, **fields: str) -> httpx.Response:
    """An edit from an image, or from bytes that are none."""
    buffer = io.BytesIO()
    if isinstance(image, Image.Image):
        image.save(buffer, "PNG")
    content = buffer.getvalue() if isinstance(image, Image.Image) else image
    return client.post("/v1/images/edits", files={"image": content}, data={"prompt": PROMPT, **fields})


def test_an_upload_of_a_size_that_cannot_be_names_the_upload(client: httpx.Client) -> None:
    for size in ((1, 1), (1, 64), (64, 1)):
        message = refused(uploaded(client, Image.new("RGB", size)), 400, "image", "invalid_value")
        assert f"{size[0]}×{size[1]}" in message
    refused(uploaded(client, Image.new("RGB", (64, 64)), size="64x1"), 400, "size", "invalid_value")
    named = uploaded(client, Image.new("RGB", (1, 1)), size="64x64", num_inference_steps="2")
    assert named.status_code == 200, "a size that was named holds for any image"


@pytest.mark.parametrize(
    "content", [b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0" * 9, b"RIFF0000WEBP"]
)
def test_messages_hold_no_addresses(client: httpx.Client, content: bytes) -> None:
    message = refused(uploaded(client, content), 400, "image", "invalid_value")
    assert not re.search(r"0x[0-9a-f]{6}|object at", message)
