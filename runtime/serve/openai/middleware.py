"""Around every request: its id, its key, its line in the log, its outcome."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.logs import REQUEST
from runtime.serve.openai.errors import answer_error, error_body

log = logging.getLogger(__name__)


class AccessMiddleware:
    """Gives every request an id, refuses those without a key or on too many connections, counts and logs answers.

    Unexpected errors are answered here: what Starlette has for them lies outside, where nothing is counted.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], count: Callable[[str], None]) -> None:
        self._app, self._keys, self._count = app, keys, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path, start = Headers(scope=scope), scope["path"], time.monotonic()
        number = headers.get("x-request-id", "")
        if not (re.fullmatch(r"[!-~]{1,100}", number)):
            number = uuid.uuid4().hex
        REQUEST.set(number)
        state = scope["state"] = {**scope.get("state", {}), "outcome": 499}  # unless it is answered

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["outcome"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        target: ASGIApp = self._app
        if state.get("crowded") and not path.startswith("/health/"):
            message, more = "there are too many connections: try again", {"Retry-After": "1", "Connection": "close"}
            target = JSONResponse(error_body(503, message, None, "too_many_connections"), 503, more)
        elif self._keys and path.startswith("/v1/") and not has_key(headers.get("authorization", ""), self._keys):
            message = "send one of this server's keys as Authorization: Bearer KEY"
            target = JSONResponse(error_body(401, message, None, "invalid_api_key"), 401)
        try:
            await target(scope, receive, labelled)
        except Exception as error:
            if state["outcome"] != 499:  # it is too late for another answer: the connection ends
                state["outcome"] = 500
                raise
            await (await answer_error(Request(scope), error))(scope, receive, labelled)
        finally:
            if path.startswith("/v1/"):
                facts = (scope["method"], path, state["outcome"], time.monotonic() - start)
                log.info("method=%s path=%s status=%d seconds=%.3f", *facts)
            if path.startswith("/v1/images/"):
                self._count(str(state["outcome"]))


def has_key(header: str, keys: tuple[str, ...]) -> bool:
    """Whether a bearer token is one of the keys; takes as long for a near miss as for any other."""
    given = header.removeprefix("Bearer ")
    sent = given.encode("latin-1"), given.encode()  # by curl, whose bytes are UTF-8; by a browser, whose are Latin-1
    return sum(hmac.compare_digest(token, key.encode()) for token in sent for key in keys) > 0
