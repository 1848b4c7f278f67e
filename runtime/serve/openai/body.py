"""Bodies of OpenAI's requests: JSON, and forms with a file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request as HttpRequest
from starlette.formparsers import MultiPartException, MultiPartParser

from runtime.serve.access import Access
from runtime.serve.http.body import Bodies
from runtime.serve.limits import Limits
from runtime.serve.openai.errors import ApiError
from runtime.serve.openai.schema import Body, Edit, checked


class StrictParser(MultiPartParser):
    """Starlette's parser reads texts that are not valid UTF-8 as Latin-1: another prompt than the one sent."""

    def on_part_begin(self) -> None:
        """See MultiPartParser. Forms are UTF-8 whatever charset they name (RFC 7578)."""
        super().on_part_begin()
        self._charset = "utf-8"

    def on_part_end(self) -> None:
        """See MultiPartParser; UnicodeDecodeError."""
        if self._current_part.file is None:
            self._current_part.data.decode("utf-8")
        super().on_part_end()


async def read_json(http: HttpRequest, model: type[Body], bodies: Bodies) -> Body:
    """A JSON body; ApiError names the first field that cannot be used."""
    if not http.headers.get("content-type", "").lower().startswith("application/json"):
        # not only a courtesy: other sites' pages may send forms and text to a local server, but not JSON
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", None, "unsupported_media_type")
    content = await bodies.read(http, bodies.limits.body)
    return checked(model, lambda: model.model_validate_json(content), bodies.limits)


async def read_form(http: HttpRequest, model: type[Edit], bodies: Bodies, access: Access) -> Edit:
    """The same of a form with a file, as OpenAI's clients send it."""
    limits = bodies.limits
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send a form: Content-Type: multipart/form-data", None, "unsupported_media_type")
    origin = http.headers.get("origin")
    if not access.has_origin(origin, http.headers.get("host")):
        # a browser sends forms of other sites' pages to a local server without asking; JSON it would not send
        message = f"forms of pages of {origin} are not taken: start the server with --allow-origin {origin}"
        raise ApiError(403, message, None, "cross_origin")
    values = await parse_form(http, await bodies.read(http, limits.upload), limits)
    if isinstance(values.get("image"), str):
        raise ApiError(400, "image: send a file", "image", "invalid_value")
    body = checked(model, lambda: model.model_validate(values, strict=False), limits)
    await asyncio.to_thread(body.open, limits.side)
    return body


async def parse_form(http: HttpRequest, content: bytes, limits: Limits) -> dict[str, Any]:
    """Texts and bytes of files by name; ApiError when it is no form, or no UTF-8, or a name comes twice."""

    async def once() -> AsyncGenerator[bytes, None]:
        yield content

    values: dict[str, Any] = {}
    try:
        parser = StrictParser(http.headers, once(), max_files=8, max_fields=50, max_part_size=limits.body)
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
    except UnicodeDecodeError as error:
        raise ApiError(400, f"a text of the form is not valid UTF-8 ({error.reason})", None, "invalid_value") from None
    except MultiPartException as error:
        raise ApiError(400, f"the body is no form ({error.message})", None, "invalid_value") from None
    except (ValueError, KeyError) as error:
        raise ApiError(400, f"the body is no form ({error})", None, "invalid_value") from None
    return values
