"""Around a request: its id, its log line, and framing that proxies read in two ways."""

from __future__ import annotations

import logging
import re

import httpx
import pytest

from tests.client import GENERATE, POST, PROMPT, ask, opened


def test_a_request_keeps_its_id(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {client.get("/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert client.get("/v1/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_one_id_from_the_socket_to_the_report(
    client: httpx.Client, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"prompt": PROMPT, "num_inference_steps": 2, "stream": stream}
    answer = client.post(GENERATE, json=body, headers={"x-request-id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    assert re.findall(r'"request_id": "([^"]*)"', answer.text) == ["mine-7"]
    without = client.post(GENERATE, json={**body, "stream": False})
    assert without.json()["report"]["request_id"] == without.headers["x-request-id"] != "mine-7"


def test_content_length_with_transfer_encoding_ends_the_connection(client: httpx.Client) -> None:
    """What one of two readers takes for the body is another request for the other."""
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with opened(client) as connection:
        head = f"{POST}Content-Length: {5 + len(smuggled)}\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"0\r\n\r\n" + smuggled)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer.lower() and b"invalid_framing" in answer
    assert ask(client, num_inference_steps=1)["data"]
