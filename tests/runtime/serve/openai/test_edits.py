"""`/v1/images/edits`: images from images over HTTP, equal to the pipeline's, and forms that cannot be."""
# covers: runtime/serve/openai/body.py, runtime/serve/openai/app.py, runtime/initial_state.py

from __future__ import annotations

import io
import socket
from contextlib import ExitStack
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from runtime.pipeline import Pipeline
from runtime.serve.http.body import LARGEST_AT_ONCE
from runtime.serve.limits import Limits
from tests.client import PROMPT, events, received, refused, same, serving, until

EDIT = "/v1/images/edits"


@pytest.fixture(scope="module")
def star(pipeline: Pipeline) -> Image.Image:
    return pipeline.generate(PROMPT, num_inference_steps=6).images[0]


def encoded(star: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    star.save(buffer, kind, **options)
    return buffer.getvalue()


def edit(client: httpx.Client, content: bytes, field: str = "image", **fields: Any) -> httpx.Response:
    files = {field: ("image", content, "application/octet-stream")}
    return client.post(EDIT, data={"prompt": "a small green ring", "num_inference_steps": "8", **fields}, files=files)


@pytest.mark.parametrize("field", ["image", "image[]"])
def test_an_edit_is_the_pipelines(client: httpx.Client, pipeline: Pipeline, star: Image.Image, field: str) -> None:
    fields = {"mode": "aggressive", "k": "2", "seed": "5", "strength": "0.6", "n": "2"}
    response = edit(client, encoded(star), field, **fields)
    assert response.status_code == 200, response.text
    wanted = pipeline.generate(
        "a small green ring", image=star, strength=0.6, mode="aggressive", k=2, seed=5, num_inference_steps=8,
        num_images_per_prompt=2,
    )  # fmt: skip
    assert same(received(response.json()), [np.asarray(image) for image in wanted.images])
    assert response.json()["report"]["steps"] == 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_image_formats(client: httpx.Client, star: Image.Image, kind: str) -> None:
    assert edit(client, encoded(star, kind)).status_code == 200
    assert edit(client, encoded(star.convert("L").resize((96, 64)), kind)).json()["size"] == "96x64"


def test_the_openai_client_edits(client: httpx.Client, star: Image.Image) -> None:
    made = openai.OpenAI(base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="any")
    more = {"num_inference_steps": 6, "seed": 2, "strength": 0.5}
    file = ("star.png", encoded(star), "image/png")
    plain = made.images.edit(image=file, prompt=PROMPT, n=2, extra_body=more)
    assert plain.data and len(plain.data) == 2
    stream = made.images.edit(image=file, prompt=PROMPT, stream=True, partial_images=1, extra_body=more)
    assert [event.type for event in stream] == ["image_edit.partial_image", "image_edit.completed"]
    with pytest.raises(openai.BadRequestError, match="mask"):
        made.images.edit(image=file, mask=file, prompt=PROMPT, extra_body=more)


def test_a_streamed_edit(client: httpx.Client, star: Image.Image) -> None:
    response = edit(client, encoded(star), stream="true", partial_images="2")
    assert [event["type"] for event in events(response)][-1] == "image_edit.completed"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"strength": "2"}, "strength", "invalid_value"), ({"strength": "much"}, "strength", "invalid_value"),
        ({"strength": "0"}, "strength", "invalid_value"), ({"mode": "magic"}, "mode", "invalid_value"),
        ({"n": "0"}, "n", "invalid_value"), ({"prompt": ""}, "prompt", "invalid_value"),
        ({"size": "8x8"}, "size", "invalid_value"), ({"promt": "a"}, "promt", "unknown_parameter"),
        ({"input_fidelity": "high"}, "input_fidelity", "unsupported_parameter"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(
    client: httpx.Client, star: Image.Image, fields: dict[str, str], param: str, code: str
) -> None:
    refused(edit(client, encoded(star), **fields), 400, param, code)


def test_images_that_cannot_be_used(client: httpx.Client, star: Image.Image) -> None:
    good = encoded(star)
    for content in (b"a star", good[:200], b"\x89PNG\r\n\x1a\n" + b"\0" * 50, encoded(star, "GIF")):
        assert "no readable PNG" in refused(edit(client, content), 400, "image", "invalid_value")
    for side, said in ((5_000, "4096 pixels"), (30_000, "pixels")):
        bomb = encoded(Image.new("1", (side, side)))
        assert said in refused(edit(client, bomb), 400, "image", "invalid_value")
    refused(edit(client, b""), 400, "image", "invalid_value")
    refused(client.post(EDIT, data={"prompt": "a", "image": "text"}, files={"x": b"y"}), 400, "image", "invalid_value")
    refused(client.post(EDIT, files={"prompt": (None, "a")}), 400, "image", "missing_required_parameter")
    assert edit(client, good).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "multipart/form-data", 400), (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"\xff\xfe", "multipart/form-data; boundary=x", 400), (b"{}", "application/json", 415),
        (
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--x--',
            "multipart/form-data; boundary=x", 400,
        ),
    ],
)  # fmt: skip
def test_forms_that_are_none(client: httpx.Client, content: bytes, kind: str, status: int) -> None:
    response = client.post(EDIT, content=content, headers={"Content-Type": kind})
    assert response.status_code == status and response.json()["error"]["message"]


def test_pages_of_other_sites_cannot_send_forms(client: httpx.Client, star: Image.Image) -> None:
    files = {"image": encoded(star)}
    data = {"prompt": "a star", "num_inference_steps": "1", "strength": "1"}
    elsewhere = client.post(EDIT, data=data, files=files, headers={"Origin": "http://example.com"})
    refused(elsewhere, 403, None, "cross_origin")
    here = client.post(EDIT, data=data, files=files, headers={"Origin": str(client.base_url).rstrip("/")})
    assert here.status_code == 200


def test_uploads_have_a_limit(pipeline: Pipeline, star: Image.Image) -> None:
    with serving(pipeline, Limits(upload=3000)) as client:
        noisy = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        refused(edit(client, encoded(noisy)), 413, None, "request_too_large")


def test_uploads_have_a_limit_together(pipeline: Pipeline, star: Image.Image) -> None:
    with serving(pipeline, Limits(upload=1 << 20)) as client:
        head = f"POST {EDIT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        with ExitStack() as arriving:
            for _ in range(LARGEST_AT_ONCE):
                slow = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)
                arriving.enter_context(slow)
                slow.sendall(f"{head}Content-Length: {1 << 20}\r\n\r\n".encode() + bytes((1 << 20) - 1))
            until(lambda: edit(client, encoded(star)).status_code == 429)
            response = edit(client, encoded(star))
            assert response.json()["error"]["code"] == "too_many_uploads" and response.headers["retry-after"]
        until(lambda: edit(client, encoded(star)).status_code == 200)


def test_an_image_that_lies_on_its_side_is_turned(client: httpx.Client, pipeline: Pipeline, star: Image.Image) -> None:
    """As cameras store it: EXIF orientation 6. The result is that of the upright image, with its width and height."""
    upright = star.resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = encoded(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    response = edit(client, lying, strength="0.6", seed="5")
    assert response.status_code == 200 and response.json()["size"] == "96x64"
    wanted = pipeline.generate("a small green ring", image=upright, strength=0.6, seed=5, num_inference_steps=8)
    assert same(received(response.json()), [np.asarray(image) for image in wanted.images])
    opened = Image.open(io.BytesIO(lying))
    direct = pipeline.generate("a small green ring", image=opened, strength=0.6, seed=5, num_inference_steps=8)
    assert same([np.asarray(image) for image in direct.images], [np.asarray(image) for image in wanted.images])
