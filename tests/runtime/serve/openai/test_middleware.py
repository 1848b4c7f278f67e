"""Around a request: its id, and what it is refused for."""

from __future__ import annotations

import httpx


def test_a_request_keeps_its_id(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {client.get("/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert client.get("/v1/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"
