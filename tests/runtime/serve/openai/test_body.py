"""Bodies that are no request."""

from __future__ import annotations

import httpx
import pytest

from runtime.serve.limits import Limits
from tests.client import (
    GENERATE,
    JSON,
    refused,
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
