"""One engine, many requests: a bounded queue in front of one thread, with deadlines and cancelling."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class QueueFullError(Exception):
    """There is no room for another request; `retry_after` seconds from now there should be."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after} s")
        self.retry_after = retry_after


class DeadlineError(Exception):
    """A request took longer than it may, in the queue and in the engine together."""


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """One request on its way: `check` is called between rounds, and `future` ends with its result or error."""

    future: Future[Any]

    def __init__(self, seconds: float) -> None:
        self.asked = time.monotonic()
        self.started: float | None = None
        self._seconds = seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """It ends before its next round, or before it begins."""
        self._cancelled.set()

    def check(self) -> None:
        """CancelledError or DeadlineError when there is no point in going on."""
        if self._cancelled.is_set():
            raise CancelledError
        if time.monotonic() - self.asked > self._seconds:
            where = "in the queue" if self.started is None else "and was not finished"
            raise DeadlineError(f"the request was {self._seconds:g} s old {where}: ask for fewer steps, or try later")


class Jobs:
    """First come, first served. At most `limit` requests wait beside the one that is being made."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._lock = threading.Lock()
        self.depth = 0  # waiting or being made
        self._typical = 1.0  # seconds that the engine spends on a request, a running mean

    def submit(self, work: Callable[[Job], Any], seconds: float) -> Job:
        """Queues work that may take so long from now on; QueueFullError when too many wait."""
        job = Job(seconds)
        with self._lock:
            if self.depth > self._limit:
                raise QueueFullError(self.depth - 1, max(1, math.ceil(self.depth * self._typical)))
            self.depth += 1
        job.future = self._worker.submit(self._run, job, work)
        return job

    def close(self) -> None:
        """Takes no more, and waits for the one that is being made."""
        self._worker.shutdown(cancel_futures=True)

    def _run(self, job: Job, work: Callable[[Job], Any]) -> Any:
        try:
            job.check()
            job.started = time.monotonic()
            result = work(job)
            self._typical += 0.2 * (time.monotonic() - job.started - self._typical)
            return result
        finally:
            with self._lock:
                self.depth -= 1
