"""The server's log: lines that belong to a request carry its id, also those of the engine's threads."""

from __future__ import annotations

import logging
from contextvars import ContextVar

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")


class Formatter(logging.Formatter):
    """Writes `request=ID` before the message, where there is a request."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        request_id = REQUEST_ID.get()
        vars(record)["request"] = f"request={request_id} " if request_id else ""
        return super().format(record)
