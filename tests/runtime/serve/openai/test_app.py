"""Routes: images as the pipeline makes them, models, health, the page."""

from __future__ import annotations

import io
import re
import subprocess
from dataclasses import fields
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from runtime.call import MAX_SEED, OPTIONS
from runtime.pipeline import Pipeline
from runtime.report import Report
from runtime.serve.limits import Limits
from tests.client import GENERATE, ask, expected, files, received, refused, same


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"mode": "conservative", "k": 2, "guidance_scale": 1},
        {"mode": "aggressive", "k": 3, "guidance_scale": 7.5, "negative_prompt": "a ring", "num_inference_steps": 5},
    ],
)
def test_a_png_holds_the_pipelines_pixels(client: httpx.Client, pipeline: Pipeline, options: dict[str, Any]) -> None:
    assert same(received(ask(client, **options)), expected(pipeline, **options))


def test_several_images_are_different(client: httpx.Client, pipeline: Pipeline) -> None:
    images = received(ask(client, n=3))
    assert same(images, expected(pipeline, num_images_per_prompt=3))
    assert len({image.tobytes() for image in images}) == 3


def test_seed_zero_is_a_seed(client: httpx.Client) -> None:
    zero, again, one = (ask(client, seed=seed) for seed in (0, 0, 1))
    assert [answer["report"]["seed"] for answer in (zero, again, one)] == [0, 0, 1]
    assert files(zero) == files(again) != files(one)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_formats(client: httpx.Client, pipeline: Pipeline, output_format: str) -> None:
    answer = ask(client, output_format=output_format)
    image = Image.open(io.BytesIO(files(answer)[0]))
    image.load()
    size = (pipeline.manifest.sizes.width, pipeline.manifest.sizes.height)
    assert (image.format, image.size, image.mode) == (output_format.upper(), size, "RGB")
    assert (answer["output_format"], answer["size"]) == (output_format, f"{size[0]}x{size[1]}")


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_makes_smaller_files(client: httpx.Client, output_format: str) -> None:
    large, small = (ask(client, output_format=output_format, output_compression=value) for value in (100, 10))
    assert len(files(small)[0]) < len(files(large)[0])


def test_the_report_is_the_pipelines(client: httpx.Client, pipeline: Pipeline) -> None:
    report = ask(client, mode="aggressive", k=2, num_inference_steps=5, n=2, seed=4)["report"]
    assert set(report) == {field.name for field in fields(Report)}
    stated = {"model": pipeline.manifest.model, "mode": "aggressive", "steps": 5, "k": 2, "rounds": 3, "images": 2}
    assert {name: report[name] for name in stated} == stated
    assert report["seconds"]["total"] > 0
    assert report["warnings"] == []


def test_lanes_and_their_timeline_can_be_asked_for(client: httpx.Client) -> None:
    assert ask(client)["report"]["timeline"] is None
    report = ask(client, lanes=1, timeline=True)["report"]
    assert report["lanes"] == 1
    spans = [span for span in report["timeline"] if span["kind"] == "call"]
    assert [(span["round"], span["lane"], span["steps"], span["branches"]) for span in spans] == [
        (n + 1, 0, [n], 2) for n in range(3)
    ]


def test_a_prompt_that_was_cut_is_reported(client: httpx.Client) -> None:
    cut, unknown = ask(client, prompt="a red star " * 40 + "swallowed")["report"]["warnings"]
    assert "cut" in cut and "swallowed" in cut
    assert "trained without swallowed" in unknown


def test_models(client: httpx.Client, pipeline: Pipeline) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert (model["id"], model["object"]) == (pipeline.manifest.model, "model")
    assert model["modes"] == ["auto", "sequential", "conservative", "aggressive", "srds", "adaptive", "speculative"]
    assert (model["devices"], model["lanes"]) == (["cpu/0", "cpu/1"], 2)
    assert model["limits"]["n"] == 10 and model["limits"]["body_bytes"] == Limits.body
    own = {"num_inference_steps": 50, "guidance_scale": 4.0, "scheduler": None}
    defaults = {name: OPTIONS[name].default for name in ("mode", "seed", "tolerance")}
    assert model["defaults"] == own | defaults


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health/live", "/health/ready", "/metrics", "/v1/models", "/v1/models/shapes"])
def test_head_is_get_without_a_body(client: httpx.Client, path: str) -> None:
    """As monitors ask, and curl with -I."""
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    curl = subprocess.run(["curl", "-sSI", str(client.base_url.join(path))], capture_output=True, text=True, check=True)
    assert curl.stdout.startswith("HTTP/1.1 200 OK")


def test_one_model(client: httpx.Client) -> None:
    made = openai.OpenAI(base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="any")
    (listed,) = made.models.list()
    assert made.models.retrieve("shapes") == listed and listed.id == "shapes"
    assert client.get("/v1/models/shapes").json() == client.get("/v1/models").json()["data"][0]
    with pytest.raises(openai.NotFoundError, match="dall-e-3"):
        made.models.retrieve("dall-e-3")
    for name in ("some/other", "shapes/"):
        refused(client.get(f"/v1/models/{name}"), 404, "model", "model_not_found")


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self' 'unsafe-inline'; img-src 'self' data:" in response.headers["content-security-policy"]
    text = response.text.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    assert not re.search(r"https?://|@import", text)


@pytest.mark.parametrize("path", ["/v1/images/variations", "/nothing", "/docs", "/%00%ff", "/../serve.py"])
def test_unknown_routes(client: httpx.Client, path: str) -> None:
    refused(client.get(path), 404, None, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", GENERATE), ("DELETE", "/v1/models"), ("POST", "/")])
def test_wrong_methods(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    refused(response, 405, None, "method_not_allowed")
    assert response.headers["allow"]
