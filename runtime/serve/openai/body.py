"""Reads the bodies of requests within their limits: JSON, and forms with a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from runtime.serve.limits import Limits
from runtime.serve.openai.errors import ApiError
from runtime.serve.openai.schema import EditRequest, ImageRequest, checked

TOGETHER = 8  # of the largest bodies, whose bytes may be arriving at the same time


class Bodies:
    """Reads bodies in time, each up to its limit, and all at once up to so many of the largest."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._free = TOGETHER * max(limits.body, limits.upload)

    async def read(self, request: Request, most: int) -> bytes:
        """One body of up to so many bytes."""
        body, seconds = bytearray(), self.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._free -= len(chunk)
                    if len(body) > most:
                        raise ApiError(413, f"the body is larger than {most} bytes", None, "request_too_large")
                    if self._free < 0:
                        message = "too many large bodies arrive at once: try again"
                        raise ApiError(429, message, None, "too_many_uploads", {"Retry-After": "1"})
        except ClientDisconnect:
            raise ApiError(400, "the client went away before its request was complete") from None
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", None, "request_timeout") from None
        finally:
            self._free += len(body)
        return bytes(body)


async def read_json(request: Request, model: type[ImageRequest], bodies: Bodies) -> ImageRequest:
    """The body as a request of that model; ApiError names the first field that cannot be used."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        # not only a courtesy: other sites' pages may send forms and text to a local server, but not JSON
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", None, "unsupported_media_type")
    body = await bodies.read(request, bodies.limits.body)
    return checked(lambda: model.model_validate_json(body), bodies.limits)


async def read_form(request: Request, model: type[EditRequest], bodies: Bodies) -> EditRequest:
    """The same of a form with a file, as OpenAI's clients send it."""
    limits = bodies.limits
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send a form: Content-Type: multipart/form-data", None, "unsupported_media_type")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        # a browser sends forms of other sites' pages to a local server without asking; JSON it would not send
        raise ApiError(403, f"forms of pages of {origin} are not taken", None, "cross_origin")
    body = await bodies.read(request, limits.upload)

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    values: dict[str, Any] = {}
    try:
        parser = MultiPartParser(request.headers, once(), max_files=8, max_fields=50, max_part_size=limits.body)
        parser.spool_max_size = limits.upload  # nothing goes to the disk
        form = await parser.parse()
        try:
            for name, value in form.multi_items():
                key = name.removesuffix("[]")  # a list of one
                if key in values:
                    raise ApiError(400, f"{key}: send it once", key, "invalid_value")
                values[key] = value if isinstance(value, str) else await value.read()
        finally:
            await form.close()
    except (MultiPartException, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ApiError(400, f"the body is no form ({error})", None, "invalid_value") from None
    if isinstance(values.get("image"), str):
        raise ApiError(400, "image: send a file", "image", "invalid_value")
    asked = checked(lambda: model.model_validate(values, strict=False), limits)
    await asyncio.to_thread(asked.open, limits.side)
    return asked
