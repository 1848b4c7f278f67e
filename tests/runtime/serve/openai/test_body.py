"""Bodies that are no request."""

from __future__ import annotations

import time
from contextlib import suppress

import httpx
import pytest

from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from tests.client import (
    GENERATE,
    JSON,
    POST,
    opened,
    refused,
    serving,
)


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


def test_a_declared_length_over_the_limit_is_refused_at_once(client: httpx.Client) -> None:
    """Before any byte of the body, and without asking for it (100 Continue)."""
    for limit, path, kind in (
        (Limits.body, GENERATE, "application/json"),
        (Limits.upload, "/v1/images/edits", "multipart/form-data; boundary=a"),
    ):
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nExpect: 100-continue\r\n"
        with opened(client) as connection:
            connection.settimeout(5)
            connection.sendall(f"{head}Content-Length: {limit + 1}\r\n\r\n".encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_the_rest_of_a_refused_body_has_little_time(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(seconds=0.5)) as client, opened(client) as connection:
        connection.sendall(f"{POST}Content-Length: {2 * Limits.body}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
        start = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - start < 10:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 5, "byte after byte gains no time"


@pytest.mark.parametrize("charset", ["", "; charset=latin-1", "; charset=utf-16", "; charset=unicode_escape"])
def test_a_text_of_a_form_that_is_no_utf8_is_refused(client: httpx.Client, charset: str) -> None:
    """Starlette would read it as Latin-1, and make an image of another prompt."""
    part = b'--a\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na \xffstar\r\n--a--\r\n'
    headers = {"Content-Type": f"multipart/form-data; boundary=a{charset}"}
    message = refused(client.post("/v1/images/edits", content=part, headers=headers), 400, None, "invalid_value")
    assert "UTF-8" in message
