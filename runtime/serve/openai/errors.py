"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from engines.errors import EngineError, ParameterError
from runtime.call import OPTIONS
from runtime.serve.http.body import BodyError
from runtime.serve.request import CancelledError, DeadlineError, DrainingError, QueueFullError

log = logging.getLogger(__name__)


class ApiError(HTTPException):
    """A refusal with its HTTP status, OpenAI's `code`, and the parameter that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body of any error. Those that are no fault of the client are logged."""
    if isinstance(error, ApiError):
        return error.status_code, error_body(error.status_code, error.detail, error.param, error.code)
    if isinstance(error, ParameterError):
        option = OPTIONS.get(error.param)
        param = option.http if option and option.http else error.param
        return 400, error_body(400, str(error), param, "invalid_value")
    if isinstance(error, EngineError):
        log.error("request failed: %r", error)
        return 500, error_body(500, str(error), None, "engine_error")
    log.error("request failed: %r", error, exc_info=error)
    return 500, error_body(500, "unexpected error, see the server's log", None, None)


RETRY_SECONDS = 10  # a supervisor needs about that long to start another process


def to_api_error(error: Exception) -> Exception:
    """The errors of `runtime.serve.request` and of bodies as HTTP statuses; others as they are."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), None, "queue_full", {"Retry-After": str(error.retry_after)})
    if isinstance(error, DrainingError):
        return ApiError(503, str(error), None, "shutting_down", {"Retry-After": str(RETRY_SECONDS)})
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), None, "deadline_exceeded")
    if isinstance(error, BodyError):
        retry = {"Retry-After": str(error.retry_after)} if error.retry_after else None
        return ApiError(error.status, str(error), None, error.code, retry)
    if isinstance(error, CancelledError):
        return ApiError(499, "the client went away", None, "cancelled")
    return error


def shaped(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's error object, or below /v2 that of the Open Inference Protocol: {"error": MESSAGE}."""
    return {"error": content["error"]["message"]} if path == "/v2" or path.startswith("/v2/") else content


async def answer_error(request: HttpRequest, error: Exception) -> JSONResponse:
    """Any exception as {"error": {"message", "type", "param", "code"}}."""
    error = to_api_error(error)
    headers = getattr(error, "headers", None)
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):  # the router's own
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", None, code)
    status, content = error_response(error)
    return JSONResponse(shaped(request.url.path, content), status, headers)
