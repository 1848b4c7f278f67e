"""A client of the server, on a real socket, for the tests of the server."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from runtime.limits import Limits
from runtime.serve import Server
from runtime.service import Service

GENERATE = "/v1/images/generations"
PROMPT = "a large red star at the left on blue background"


@contextmanager
def serving(pipeline: Any, limits: Limits | None = None) -> Iterator[httpx.Client]:
    """Speaks to the application on a real socket, served by a thread of this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(Service(pipeline, limits or Limits()))
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()
        try:
            with connect(listener.getsockname()[1]) as connected:
                yield connected
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
