"""Around every HTTP request: its id, whether it may ask, its line in the log, its outcome."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serve.access import Access, host_name
from runtime.serve.logs import REQUEST_ID
from runtime.serve.openai.errors import answer_error, error_body, shaped

log = logging.getLogger(__name__)


def needs_key(path: str) -> bool:
    """Whether a path is of an API; health, metrics and the page are open."""
    return path == "/v2" or (path.startswith(("/v1/", "/v2/")) and not path.startswith("/v2/health/"))


class AccessMiddleware:
    """Gives every request an id, refuses those that may not ask, counts and logs answers.

    Unexpected errors are answered here: Starlette's own handler lies outside, where nothing is counted.
    """

    def __init__(self, app: ASGIApp, access: Access, count: Callable[[str], None]) -> None:
        self._app, self._access, self._count = app, access, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path, start = Headers(scope=scope), scope["path"], time.monotonic()
        request_id = headers.get("x-request-id", "")
        if not re.fullmatch(r"[!-~]{1,100}", request_id):
            request_id = uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        # 499 unless it is answered
        state = scope["state"] = {**scope.get("state", {}), "outcome": 499, "request_id": request_id}

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["outcome"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            target = self._refusal(headers, path, crowded=state.get("crowded", False)) or self._app
            await target(scope, receive, labelled)
        except Exception as error:
            if state["outcome"] != 499:  # it is too late for another answer: the connection ends
                state["outcome"] = 500
                raise
            await (await answer_error(HttpRequest(scope), error))(scope, receive, labelled)
        finally:
            if needs_key(path):
                facts = (scope["method"], path, state["outcome"], time.monotonic() - start)
                log.info("method=%s path=%s status=%d seconds=%.3f", *facts)
            if path.startswith("/v1/images/") or (path.startswith("/v2/") and path.endswith("/infer")):
                self._count(str(state["outcome"]))

    def _refusal(self, headers: Headers, path: str, *, crowded: bool) -> JSONResponse | None:
        """The answer to a request that may not ask."""
        if "transfer-encoding" in headers and "content-length" in headers:
            # a proxy in front may have read the other one, and would take the rest for another request
            message = "send Content-Length or Transfer-Encoding, not both"
            return JSONResponse(
                shaped(path, error_body(400, message, None, "invalid_framing")), 400, {"Connection": "close"}
            )
        host = headers.get("host")
        if not self._access.has_host(host):
            message = f"this server does not answer to {host!r}: start it with --allowed-hosts {host_name(host or '')}"
            return JSONResponse(shaped(path, error_body(403, message, None, "host_not_allowed")), 403)
        if crowded and not path.startswith(("/health/", "/v2/health/")):
            more = {"Retry-After": "1", "Connection": "close"}
            message = "there are too many connections: try again"
            return JSONResponse(shaped(path, error_body(503, message, None, "too_many_connections")), 503, more)
        if needs_key(path) and not self._access.has_key(headers.get("authorization", "")):
            message = "send one of this server's keys as Authorization: Bearer KEY"
            body = shaped(path, error_body(401, message, None, "invalid_api_key"))
            return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        return None
