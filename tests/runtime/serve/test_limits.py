"""Limits: kept, told and documented."""

from __future__ import annotations

from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from tests.client import GENERATE, PROMPT, serving


def test_limits_are_kept_told_and_documented(pipeline: Pipeline) -> None:
    limits = Limits(body=4000, prompt=50, side=64, steps=7, n=2)
    with serving(pipeline, limits) as client:
        for body, param, said in (
            ({"prompt": "a" * 51}, "prompt", "50"), ({"negative_prompt": "a" * 51}, "negative_prompt", "50"),
            ({"n": 3}, "n", "2"), ({"num_inference_steps": 8}, "num_inference_steps", "7"),
            ({"size": "64x72"}, "size", "64"),
        ):  # fmt: skip
            response = client.post(GENERATE, json={"prompt": PROMPT, **body})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
            assert said in response.json()["error"]["message"]
        large = client.post(GENERATE, json={"prompt": PROMPT, "user": "x" * 4000})
        assert large.status_code == 413 and "4000" in large.json()["error"]["message"]
        assert client.post(GENERATE, json={"prompt": "a star"}).json()["report"]["steps"] == 7, "the default fits"
        told = client.get("/v1/models").json()["data"][0]["limits"]
        assert told == {
            "queue": 32, "connections": 512, "seconds": 120.0, "body_bytes": 4000, "upload_bytes": Limits.upload,
            "answer_bytes": Limits.answer, "prompt_characters": 50, "side_pixels": 64,
            "num_inference_steps": 7, "n": 2, "priorities": False,
        }  # fmt: skip
        document = client.get("/openapi.json").json()["paths"][GENERATE]["post"]["requestBody"]
        properties = document["content"]["application/json"]["schema"]["properties"]
        assert properties["n"]["maximum"] == 2 and properties["num_inference_steps"]["maximum"] == 7
