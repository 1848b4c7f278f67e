"""What `/openapi.json` says of the routes beside their code."""

from __future__ import annotations

from typing import Any

from runtime.serve.openai.schema import Body

STATUSES = {
    400: "A field cannot be used; `param` names it.", 401: "A key is needed.",
    403: "The Host header names another server, or another site's page sent a form.", 404: "There is no such model.",
    408: "The body did not arrive in time.", 413: "The body is too large.", 415: "The body is of another type.",
    429: "The queue is full, or too many bodies arrive; see Retry-After.", 500: "The engine failed.",
    503: "The server is shutting down, or too many connect; see Retry-After.", 504: "The request became too old.",
}  # fmt: skip


ERROR_SCHEMA = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
    }},
}  # fmt: skip


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of an operation, for the document."""
    error = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": STATUSES[status], "content": error} for status in statuses}


def operation(kind: str, model: type[Body]) -> dict[str, Any]:
    """What makes images, for the document."""
    answered = {"type": "object", "required": ["created", "data"]}
    made = {"application/json": {"schema": answered}, "text/event-stream": {}}
    body = {"required": True, "content": {kind: {"schema": model.model_json_schema()}}}
    return {
        "response_model": None, "openapi_extra": {"requestBody": body},
        "responses": described(*STATUSES) | {200: {"description": "The images, or events.", "content": made}},
    }  # fmt: skip
