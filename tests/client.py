"""A client of the server, on a real socket, for the tests of the server."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from runtime.serve.__main__ import Server
from runtime.serve.limits import Limits
from runtime.serve.service import Service

GENERATE = "/v1/images/generations"
PROMPT = "a large red star at the left on blue background"


@contextmanager
def serving(pipeline: Any, limits: Limits | None = None) -> Iterator[httpx.Client]:
    """Speaks to the application on a real socket, served by a thread of this process."""
    with running(Server(Service(pipeline, limits or Limits()))) as port, connect(port) as connected:
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
