"""Answers whole and streamed, to the clients that people use."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.client import (
    GENERATE,
    PROMPT,
    ask,
    decoded,
    events,
)


@pytest.mark.parametrize("partial", [0, 1, 3])
@pytest.mark.parametrize("mode", ["sequential", "aggressive", "srds"])
def test_a_stream_shows_the_image_as_it_becomes(client: httpx.Client, mode: str, partial: int) -> None:
    body = {"prompt": PROMPT, "mode": mode, "k": 2, "num_inference_steps": 12, "seed": 4}
    response = client.post(GENERATE, json={**body, "stream": True, "partial_images": partial})
    assert response.headers["content-type"].startswith("text/event-stream")
    *partials, last = events(response)
    assert [event["type"] for event in partials] == ["image_generation.partial_image"] * len(partials)
    assert [event["partial_image_index"] for event in partials] == list(range(len(partials)))
    assert len(partials) == partial if mode != "srds" else len(partials) <= partial
    whole = ask(client, **body)
    assert last["type"] == "image_generation.completed"
    assert last["b64_json"] == whole["data"][0]["b64_json"]
    finished = decoded(last["b64_json"])
    distances = [np.abs(decoded(event["b64_json"]) - finished).mean() for event in partials]
    assert distances == sorted(distances, reverse=True) or mode == "srds"


def test_the_openai_client(client: httpx.Client) -> None:
    """The package that most callers have, streaming and not."""
    made = openai.OpenAI(base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="any")
    more = {"num_inference_steps": 6, "seed": 2}
    plain = made.images.generate(prompt=PROMPT, model="shapes", n=2, extra_body=more)
    assert plain.data and len(plain.data) == 2
    stream = made.images.generate(prompt=PROMPT, model="shapes", stream=True, partial_images=2, extra_body=more)
    *partials, last = stream
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 2
    assert last.type == "image_generation.completed"
    assert plain.usage and plain.usage.model_dump(exclude_unset=True) == last.usage.model_dump(exclude_unset=True)
    assert plain.usage.input_tokens_details.text_tokens == plain.usage.total_tokens == 0
    with pytest.raises(openai.BadRequestError, match="unknown mode"):
        made.images.generate(prompt=PROMPT, extra_body={"mode": "magic"})
    with pytest.raises(openai.BadRequestError, match="unknown mode"):
        made.images.generate(prompt=PROMPT, stream=True, extra_body={"mode": "magic"})


@pytest.mark.parametrize(
    ("body", "param"),
    [({"stream": True, "n": 2}, "n"), ({"partial_images": 1}, "partial_images"),
     ({"stream": True, "partial_images": 4}, "partial_images")],
)  # fmt: skip
def test_streams_that_cannot_be(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = client.post(GENERATE, json={"prompt": PROMPT, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_png_files_say_how_they_were_made_unless_told_not_to(client: httpx.Client) -> None:
    def chunks(**more: Any) -> list[dict[str, Any]]:
        body = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 5, "mode": "sequential", **more}
        answer = client.post(GENERATE, json=body).json()
        images = [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))) for one in answer["data"]]
        return [{str(name): value for name, value in image.info.items()} for image in images]

    first, second = chunks(n=2)
    wanted = f"{PROMPT}\nSteps: 3, Sampler: DDIM, CFG scale: 4, Seed: 5, Size: 64x64, Model hash: "
    assert first["parameters"].startswith(wanted)
    assert "Batch pos: 1" in second["parameters"] and json.loads(second["driffusion"])["image"] == 1
    assert not {"parameters", "driffusion"} & set(chunks(metadata=False)[0])
    assert not {"parameters", "driffusion"} & set(chunks(output_format="jpeg")[0])
