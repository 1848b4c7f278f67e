"""Fields: those that are taken, and those that are refused by name."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from runtime.call import MAX_SEED
from runtime.pipeline import Pipeline
from runtime.serve.openai.schema import UNSUPPORTED
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
        ({"style": "vivid"}, "style", "unsupported_parameter"),
        ({"svg": {"model": "a"}}, "svg", "unsupported_parameter"),
        ({"": 1}, "", "unknown_parameter"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 101}, "output_compression", "invalid_value"),
        ({"quality": "hd"}, "quality", "invalid_value"),
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
        ({"seed": -1}, "seed", "invalid_value"),
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
        ({"scheduler": "heun"}, "scheduler", "invalid_value"),
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
