"""Reads the bodies of requests within their limits, whichever protocol they belong to."""

from __future__ import annotations

import asyncio

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from runtime.serve.limits import Limits

LARGEST_AT_ONCE = 8  # bodies of the largest size, whose bytes may be arriving at the same time


class BodyError(Exception):
    """A body that was not read: the HTTP status, and a code for protocols that have one."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class Bodies:
    """Reads bodies in time, each up to its limit, and all at once up to so many of the largest."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._free = LARGEST_AT_ONCE * max(limits.body, limits.upload)

    async def read(self, http: HttpRequest, most: int) -> bytes:
        """One body of up to so many bytes; BodyError. A longer Content-Length is refused before the body has come."""
        too_large = BodyError(413, f"the body is larger than {most} bytes", "request_too_large")
        if int(http.headers.get("content-length", 0)) > most:
            raise too_large
        body, seconds = bytearray(), self.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in http.stream():
                    body += chunk
                    self._free -= len(chunk)
                    if len(body) > most:
                        raise too_large
                    if self._free < 0:
                        raise BodyError(429, "too many large bodies arrive at once: try again", "too_many_uploads", 1)
        except ClientDisconnect:
            raise BodyError(400, "the client went away before its request was complete") from None
        except TimeoutError:
            raise BodyError(408, f"the body did not arrive within {seconds:g} s", "request_timeout") from None
        finally:
            self._free += len(body)
        return bytes(body)
