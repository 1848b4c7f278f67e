"""The server's log: a line that belongs to a request says which, also where a thread of the engine writes it."""

from __future__ import annotations

import logging
from contextvars import ContextVar

REQUEST: ContextVar[str] = ContextVar("request", default="")  # the id of the one that is being answered


class Formatter(logging.Formatter):
    """Lines with `request=ID` before the message, where there is a request."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(request)s%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        number = REQUEST.get()
        vars(record)["request"] = f"request={number} " if number else ""
        return super().format(record)
