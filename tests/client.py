"""A client of the server, on a real socket, and what the tests of the server share."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.store import Bundle
from runtime.pipeline import Pipeline
from runtime.serve.access import Access
from runtime.serve.kserve.server import KServe
from runtime.serve.limits import Limits
from runtime.serve.openai.server import Server
from runtime.serve.service import Service

GENERATE = "/v1/images/generations"
POST = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"  # on a raw socket

PROMPT = "a large red star at the left on blue background"


@contextmanager
def serving(pipeline: Any, limits: Limits | None = None, access: Access | None = None) -> Iterator[httpx.Client]:
    """Speaks to the application on a real socket, served by a thread of this process."""
    service = Service(pipeline, limits or Limits())
    server = Server(service, access, [KServe(service, access)])
    with running(server) as port, connect(port) as connected:
        yield connected


@contextmanager
def running(server: Server, send_buffer: int | None = None) -> Iterator[int]:
    """A server in a thread, and its port; what is sent waits in the server beyond so many bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def connect(port: int) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=110, trust_env=False)


def ask(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post(GENERATE, json={"prompt": PROMPT, "num_inference_steps": 3, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def files(answer: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(item["b64_json"], validate=True) for item in answer["data"]]


JSON = {"Content-Type": "application/json"}

Pixels = NDArray[np.uint8]


def decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB"), float)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; names and types agree."""
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never was"
        time.sleep(0.01)


def depth(client: httpx.Client) -> float:
    """Requests that wait or are being made."""
    (found,) = (one for one in client.get("/metrics").text.splitlines() if one.startswith("driffusion_queue_depth "))
    return float(found.split()[1])


def values(client: httpx.Client) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def opened(client: httpx.Client) -> socket.socket:
    """A connection of its own to the same server."""
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)


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
