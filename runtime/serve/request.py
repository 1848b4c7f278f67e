"""One request from its acceptance to its report, whichever protocol it came by, and the ways in which it can end."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, ContextVar, copy_context
from typing import Any

from runtime.call import Call
from runtime.serve.logs import REQUEST_ID

# of a request that another process accepted and passed on: the seconds that it has left
SECONDS_LEFT: ContextVar[float] = ContextVar("seconds_left", default=math.inf)


class QueueFullError(Exception):
    """The queue has no room; it should have some `retry_after` seconds from now."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class DrainingError(Exception):
    """The server is shutting down: it refuses new requests, and cancels those still running after `--drain`."""


class DeadlineError(Exception):
    """A request exceeded its time limit, waiting and running together."""


class CancelledError(Exception):
    """The client disconnected or cancelled."""


class Request:
    """A call with its id, its deadline and its outcome.

    `work(request)` runs on a thread of the engine and calls `check` between rounds; `future` ends with what it returns
    or raises. The id is in every log line of the request, in its answer and in its report.
    """

    def __init__(
        self, call: Call, work: Callable[[Request], Any], seconds: float, request_id: str | None = None
    ) -> None:
        self.id = request_id or uuid.uuid4().hex
        self.call, self.work, self.seconds = call, work, min(seconds, SECONDS_LEFT.get())
        self.accepted = time.monotonic()
        self.started: float | None = None  # when a thread of the engine took it
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # only `cancel` ends it early
        self.context: Context = copy_context()
        self.context.run(REQUEST_ID.set, self.id)
        self.on_cancel: Callable[[Request, Exception], None] | None = None  # the queue's, while it waits there
        self._reason: Exception | None = None

    def cancel(self, reason: Exception | None = None) -> None:
        """Ends it at once when it has not started, otherwise before its next round; the first reason counts."""
        self._reason = self._reason or reason or CancelledError("the client went away")
        if self.on_cancel is not None:
            self.on_cancel(self, self._reason)

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.seconds - (time.monotonic() - self.accepted)

    def deadline_error(self) -> DeadlineError:
        """What to raise when no seconds are left."""
        where = "in the queue" if self.started is None else "and was not finished"
        return DeadlineError(f"the request was {self.seconds:g} s old {where}: ask for fewer steps, or try later")

    def check(self) -> None:
        """Raises the reason of a cancellation, or DeadlineError."""
        if self._reason is not None:
            raise self._reason
        if self.seconds_left < 0:
            raise self.deadline_error()
