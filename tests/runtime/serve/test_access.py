"""Who may ask: keys, host names, origins."""

from __future__ import annotations

from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from tests.client import GENERATE, PROMPT, serving


def test_keys(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(keys=("secret-1", "schlüssel"))) as client:
        body = {"prompt": PROMPT, "num_inference_steps": 1}
        for header in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "Bearer secret-12"}):
            refused = client.post(GENERATE, json=body, headers=header)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in (b"secret-1", "schlüssel".encode(), "schlüssel".encode("latin-1")):
            assert client.post(GENERATE, json=body, headers={b"Authorization": b"Bearer " + key}).status_code == 200
        for key in (b"schlussel", "schlÃ¼sse".encode(), b"schl\xffssel"):
            assert client.post(GENERATE, json=body, headers={b"Authorization": b"Bearer " + key}).status_code == 401
        assert client.get("/health/live").status_code == 200
        assert client.get("/v1/models").status_code == 401
