"""The server over HTTP: the pipeline's images, OpenAI's error shape for everything else, a clean start and end."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines.errors import DeviceError
from engines.host import HostBackend
from engines.store import Bundle
from runtime.call import MAX_SEED
from runtime.pipeline import Pipeline
from runtime.report import Report
from runtime.serve.__main__ import listen
from runtime.serve.limits import Limits
from runtime.serve.logs import Formatter
from runtime.serve.openai.schema import UNSUPPORTED, ImageRequest
from tests.client import GENERATE, PROMPT, ask, connect, files, serving

JSON = {"Content-Type": "application/json"}
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "matplotlib")
Pixels = NDArray[np.uint8]


def received(answer: dict[str, Any]) -> list[Pixels]:
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files(answer)]


def expected(pipeline: Pipeline, **options: Any) -> list[Pixels]:
    result = pipeline.generate(PROMPT, **{"num_inference_steps": 3, **options})
    return [np.asarray(image) for image in result.images]


def same(a: list[Pixels], b: list[Pixels], within: int = 0) -> bool:
    """Under load rounds run on fewer lanes, which may round otherwise."""
    near = (np.abs(x.astype(int) - y.astype(int)).max() <= within for x, y in zip(a, b, strict=True))
    return len(a) == len(b) and all(near)


def refused(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    """The message of an error that has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert error == {"message": error["message"], "type": kind, "param": param, "code": code}
    assert error["message"]
    assert "Traceback" not in response.text
    return str(error["message"])


# ---- images


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
    assert [(span["round"], span["lane"], span["steps"], span["halves"]) for span in spans] == [
        (n + 1, 0, [n], 2) for n in range(3)
    ]


def test_a_prompt_that_was_cut_is_reported(client: httpx.Client) -> None:
    (warning,) = ask(client, prompt="a red star " * 40 + "swallowed")["report"]["warnings"]
    assert "cut" in warning
    assert "swallowed" in warning


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
    optional = [name for name, field in ImageRequest.model_fields.items() if not field.is_required()]
    nothing = dict.fromkeys([*optional, *UNSUPPORTED]) | {"num_inference_steps": 3}
    assert {"n", "size", "output_format", "moderation", "style", "seed"} <= set(nothing)
    assert files(ask(client, **nothing)) == files(ask(client))


# ---- what else it answers


def test_models(client: httpx.Client, pipeline: Pipeline) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert (model["id"], model["object"]) == (pipeline.manifest.model, "model")
    assert model["modes"] == ["auto", "sequential", "conservative", "aggressive", "srds", "adaptive"]
    assert (model["devices"], model["lanes"]) == (["cpu/0", "cpu/1"], 2)
    assert model["limits"]["n"] == 10 and model["limits"]["body_bytes"] == Limits.body
    assert model["defaults"] == {"num_inference_steps": 50, "guidance_scale": 4.0, "mode": "auto", "seed": 0}


def test_the_end_of_an_answer_does_not_wait_until_its_beginning_is_confirmed() -> None:
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_health(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


def test_a_server_that_lost_a_lane_is_not_ready() -> None:
    class Degraded:
        lost, devices = ("cuda:1/0",), ("cuda:0/0",)
        manifest = SimpleNamespace(model="none", defaults=SimpleNamespace(num_inference_steps=1, guidance_scale=1.0))

    with serving(Degraded()) as client:
        response = client.get("/health/ready")
        assert (response.status_code, response.json()) == (503, {"status": "degraded", "lost": ["cuda:1/0"]})
        assert client.get("/health/live").status_code == 200


def test_the_page_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self' 'unsafe-inline'; img-src 'self' data:" in response.headers["content-security-policy"]
    assert not re.search(r"https?://|@import", response.text)


# ---- what it refuses


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


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"", None, "invalid_value"),
        (b"a star", None, "invalid_value"),
        (b'{"prompt": "a star"', None, "invalid_value"),
        (b'{"prompt": "a star"} {}', None, "invalid_value"),
        (b"[]", None, "invalid_value"),
        (b"null", None, "invalid_value"),
        (b"{}", "prompt", "missing_required_parameter"),
        (b'{"prompt": "a \xff"}', None, "invalid_value"),
        (rb'{"prompt": "a \ud800"}', None, "invalid_value"),
        (rb'{"prompt": "a", "\udc00": 1}', None, "invalid_value"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale", "invalid_value"),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', "guidance_scale", "invalid_value"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "guidance_scale", "invalid_value"),
        (b'{"prompt": "a", "seed": NaN}', "seed", "invalid_value"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 9999 + b"}", None, "invalid_value"),
        (b"[" * 500_000, None, "invalid_value"),
        (b'{"prompt":' * 50_000, None, "invalid_value"),
        ('{"prompt": "a"}'.encode("utf-16"), None, "invalid_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_body_that_cannot_be_used_is_refused(
    client: httpx.Client, content: bytes, param: str | None, code: str
) -> None:
    refused(client.post(GENERATE, content=content, headers=JSON), 400, param, code)


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}]
)
def test_other_sites_cannot_have_images_made(client: httpx.Client, headers: dict[str, str]) -> None:
    """A browser sends these content types anywhere without asking."""
    response = client.post(GENERATE, content=b'{"prompt": "a star"}', headers=headers)
    assert "application/json" in refused(response, 415, None, "unsupported_media_type")


def test_the_body_has_a_limit(client: httpx.Client) -> None:
    """With a length in the header or without one; at the limit it is read, and found to be half a JSON object."""
    body = b'{"prompt": "%s"}' % (b"a" * Limits.body)
    refused(client.post(GENERATE, content=body[: Limits.body + 1], headers=JSON), 413, None, "request_too_large")
    refused(client.post(GENERATE, content=iter([body, body]), headers=JSON), 413, None, "request_too_large")
    refused(client.post(GENERATE, content=body[: Limits.body], headers=JSON), 400, None, "invalid_value")


def test_an_unknown_model(client: httpx.Client) -> None:
    response = client.post(GENERATE, json={"prompt": PROMPT, "model": "dall-e-3"})
    assert "dall-e-3" in refused(response, 404, "model", "model_not_found")


@pytest.mark.parametrize("path", ["/v1/images/variations", "/nothing", "/docs", "/%00%ff", "/../serve.py"])
def test_unknown_routes(client: httpx.Client, path: str) -> None:
    refused(client.get(path), 404, None, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", GENERATE), ("DELETE", "/v1/models"), ("POST", "/")])
def test_wrong_methods(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    refused(response, 405, None, "method_not_allowed")
    assert response.headers["allow"]


# ---- when the engine fails


@contextmanager
def failing(pipeline: Pipeline, error: Exception, after: int = 0) -> Iterator[None]:
    """A pipeline that fails, after so many steps."""
    made = pipeline.generate

    def broken(*args: Any, progress: Callable[[int, int], None], **more: Any) -> Any:
        def until_then(finished: int, steps: int) -> None:
            progress(finished, steps)
            if finished == after:
                raise error

        if not after:
            raise error
        return made(*args, progress=until_then, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "generate", broken)
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
    return [line for line in log.text.splitlines() if f"ERROR runtime.request: request={number} request failed" in line]


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
        monkeypatch.setattr("runtime.service.Metrics.text", lambda self: 1 / 0)
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
    assert "ERROR runtime.pipeline: request=mine-4 cpu/1 stopped working (burnt out)" in log.text
    pipeline.close()


def test_a_client_that_leaves_is_no_error(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as leaving:
        leaving.sendall(head.encode() + b'{"prompt')
    time.sleep(0.3)
    assert client.get("/health/live").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# ---- several at once


def test_requests_in_flight_do_not_mix(client: httpx.Client, pipeline: Pipeline) -> None:
    options: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "mode": "aggressive", "k": 2},
        {"seed": 3, "guidance_scale": 1, "num_inference_steps": 5},
        {"seed": 4, "negative_prompt": "a ring"},
    ]
    with ThreadPoolExecutor(len(options)) as threads:
        answers = list(threads.map(lambda choice: ask(client, **choice), options))
    for answer, choice in zip(answers, options, strict=True):
        assert same(received(answer), expected(pipeline, **choice), within=2)


def test_the_server_answers_while_a_image_is_made(client: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as thread:
        image = thread.submit(ask, client, num_inference_steps=200, guidance_scale=1)
        seconds = []
        while not image.done():
            started = time.perf_counter()
            assert client.get("/health/live").status_code == 200
            seconds.append(time.perf_counter() - started)
            time.sleep(0.05)
    assert image.result()["report"]["steps"] == 200
    assert len(seconds) > 5
    assert sorted(seconds)[len(seconds) // 2] < 0.5


# ---- the process


@contextmanager
def launched(shapes: Bundle, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m runtime.serve`; its log also says what was imported."""
    command = [sys.executable, "-X", "importtime", "-m", "runtime.serve", "--model", str(shapes.folder), "--port", "0"]
    command += ["--devices", "cpu*2", *options]
    with log.open("wb") as output, subprocess.Popen(command, stderr=output) as server:
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def process(shapes: Bundle, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The same when it takes requests, and its port."""
    with launched(shapes, log, *options) as server:
        address = wait_for(r"http://127.0.0.1:(\d+)", log, server)
        yield server, int(address[1])


def wait_for(pattern: str, log: Path, server: subprocess.Popen[bytes]) -> re.Match[str]:
    for _ in range(12_000):
        found = re.search(pattern, log.read_text())
        if found:
            return found
        assert server.poll() is None, log.read_text()[-3000:]
        time.sleep(0.005)
    raise AssertionError(f"no {pattern} in {log.read_text()[-3000:]}")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_the_image_is_finished(shapes: Bundle, tmp_path: Path, stop: signal.Signals) -> None:
    log = tmp_path / "log"
    with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(1) as thread:
        assert client.get("/health/ready").status_code == 200
        image = thread.submit(ask, client, num_inference_steps=60)
        time.sleep(0.5)
        server.send_signal(stop)
        assert len(received(image.result())) == 1
        assert server.wait(30) == 0
    lines = log.read_text().splitlines()
    assert not [line for line in lines if "Traceback" in line or "ERROR" in line]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "onnxruntime" in imported
    assert not imported & set(HEAVY)


def test_a_second_interrupt_does_not_wait(shapes: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(1) as thread:
        image = thread.submit(ask, client, num_inference_steps=999, n=4)
        time.sleep(0.5)
        server.send_signal(signal.SIGINT)
        wait_for("Shutting down", log, server)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 1
        assert image.exception()


def start(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "runtime.serve", *options], capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_one_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start("--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
    assert "Address already in use" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [("--port", "65536"), ("--port", "0", "--model", "nothing"), ("--port", "0", "--max-side", "63")],
    ids=lambda options: options[-2],
)
def test_what_cannot_be_served_is_one_message(options: tuple[str, ...]) -> None:
    done = start(*options)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*: (choose|make).*\n", done.stderr)
