"""Errors of the engine: OpenAI's shape, counted and logged."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

from engines.errors import DeviceError
from engines.host import HostBackend
from engines.store import Bundle
from runtime.call import Call, Callbacks
from runtime.pipeline import Pipeline, Result
from runtime.serve.logs import Formatter
from tests.client import GENERATE, PROMPT, ask, received, refused, serving


@contextmanager
def failing(pipeline: Pipeline, error: Exception, after: int = 0) -> Iterator[None]:
    """A pipeline that fails, after so many steps."""
    made = pipeline.run

    def broken(call: Call, callbacks: Callbacks) -> Result:
        def until_then(finished: int, steps: int) -> None:
            assert callbacks.progress is not None
            callbacks.progress(finished, steps)
            if finished == after:
                raise error

        if not after:
            raise error
        return made(call, replace(callbacks, progress=until_then))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "run", broken)
        yield


def outcomes(client: httpx.Client) -> dict[str, float]:
    """How many requests for images ended how."""
    lines = client.get("/metrics").text.splitlines()
    counted = (line.rsplit(" ", 1) for line in lines if line.startswith("driffusion_requests_total"))
    return {name.split('"')[1]: float(number) for name, number in counted}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged, as the server writes it."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(caplog.handler, "formatter", Formatter())
    return caplog


def failures(log: pytest.LogCaptureFixture, number: str) -> list[str]:
    """Lines of a request that failed."""
    return [
        line
        for line in log.text.splitlines()
        if f"ERROR runtime.serve.openai.errors: request={number} request failed" in line
    ]


ERRORS = [
    (DeviceError("lane 1 stopped: start the server again"), "engine_error", "lane 1 stopped: start the server again"),
    (RuntimeError("/home/secret"), None, "unexpected error, see the server's log"),
    (TimeoutError("/home/secret"), None, "unexpected error, see the server's log"),
]


@pytest.mark.parametrize(("error", "code", "said"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_of_the_engine_is_told_counted_and_logged(
    pipeline: Pipeline, error: Exception, code: str | None, said: str, log: pytest.LogCaptureFixture
) -> None:
    with serving(pipeline) as client:
        with failing(pipeline, error):
            response = client.post(GENERATE, json={"prompt": PROMPT}, headers={"x-request-id": "mine-1"})
        assert refused(response, 500, None, code) == said
        assert response.headers["x-request-id"] == "mine-1"
        assert received(ask(client))
        assert outcomes(client) == {"500": 1, "200": 1}
    (line,) = failures(log, "mine-1")
    assert repr(error) in line
    assert ("Traceback" in log.text) == (code is None)
    assert log.text.count("Traceback") <= 1
    assert "request=mine-1 method=POST path=/v1/images/generations status=500" in log.text


@pytest.mark.parametrize(("error", "code", "said"), ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_in_the_middle_of_a_stream_is_told_counted_and_logged(
    pipeline: Pipeline, error: Exception, code: str | None, said: str, log: pytest.LogCaptureFixture
) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 4, "mode": "sequential", "stream": True, "partial_images": 1}
    with serving(pipeline) as client:
        with failing(pipeline, error, after=2):
            response = client.post(GENERATE, json=body, headers={"x-request-id": "mine-2"})
        partial, last = response.text.strip().split("\n\n")
        assert partial.startswith("event: image_generation.partial_image")
        content = {"type": "error", "error": {"message": said, "type": "server_error", "param": None, "code": code}}
        assert last == f"event: error\ndata: {json.dumps(content)}"
        assert outcomes(client) == {"500": 1}
    (line,) = failures(log, "mine-2")
    assert repr(error) in line
    assert ("Traceback" in log.text) == (code is None)
    assert "request=mine-2 method=POST path=/v1/images/generations status=500" in log.text


def test_an_error_outside_the_engine_is_answered_too(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    with serving(pipeline) as client:
        monkeypatch.setattr("runtime.serve.metrics.Metrics.text", lambda self: 1 / 0)
        response = client.get("/metrics", headers={"x-request-id": "mine-3"})
    assert "division" not in refused(response, 500)
    assert response.headers["x-request-id"] == "mine-3"
    assert len(failures(log, "mine-3")) == log.text.count("Traceback") == 1


def test_a_lane_that_dies_is_logged_with_the_request(shapes: Bundle, log: pytest.LogCaptureFixture) -> None:
    def burnt_out() -> None:
        raise DeviceError("burnt out")

    pipeline = Pipeline(shapes, "cpu*2")
    with serving(pipeline) as client, pytest.MonkeyPatch.context() as patch:
        assert isinstance(pipeline.backend, HostBackend)
        patch.setattr(pipeline.backend._lanes[1], "bind", lambda inputs, output: burnt_out, raising=False)
        response = client.post(GENERATE, json={"prompt": PROMPT}, headers={"x-request-id": "mine-4"})
        assert "cpu/1 stopped working" in response.json()["report"]["warnings"][0]
    assert "ERROR runtime.machine: request=mine-4 cpu/1 stopped working (burnt out)" in log.text
    pipeline.close()


def test_a_client_that_leaves_is_no_error(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as leaving:
        leaving.sendall(head.encode() + b'{"prompt')
    time.sleep(0.3)
    assert client.get("/health/live").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
