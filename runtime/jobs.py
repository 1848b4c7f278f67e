"""One engine, many requests: a bounded queue in front of a few threads, with deadlines, cancelling and a last call."""

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


class ShutdownError(Exception):
    """The server takes nothing new, or gives up what it could not finish in time."""


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
        self._reason: Exception | None = None

    def cancel(self, reason: Exception | None = None) -> None:
        """It ends before its next round, or before it begins; the first reason counts."""
        self._reason = self._reason or reason or CancelledError()

    @property
    def left(self) -> float:
        """Seconds until it is too old."""
        return self._seconds - (time.monotonic() - self.asked)

    def late(self) -> DeadlineError:
        """What is said when it is too old."""
        where = "in the queue" if self.started is None else "and was not finished"
        return DeadlineError(f"the request was {self._seconds:g} s old {where}: ask for fewer steps, or try later")

    def check(self) -> None:
        """Raises the reason, or DeadlineError, when there is no point in going on."""
        if self._reason is not None:
            raise self._reason
        if self.left < 0:
            raise self.late()


class Jobs:
    """First come, first served. At most `limit` requests wait beside the `lanes` that may be being made.

    There are two threads more than lanes, so that texts are encoded and pictures decoded while all lanes are at work.
    """

    def __init__(self, limit: int, lanes: int = 1) -> None:
        self._limit, self._lanes = limit, lanes
        self._workers = lanes + 2 if lanes > 1 else 1
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="engine")
        self._changed = threading.Condition()
        self._open = True
        self._jobs: set[Job] = set()
        self._typical = 1.0  # seconds that a thread spends on a request, a running mean

    @property
    def depth(self) -> int:
        """Requests waiting or being made."""
        return len(self._jobs)

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return not self._open

    def submit(self, work: Callable[[Job], Any], seconds: float) -> Job:
        """Queues work that may take so long from now on; QueueFullError, or ShutdownError after `drain`."""
        job = Job(seconds)
        with self._changed:
            if not self._open:
                raise ShutdownError("the server is shutting down: ask another one, or this one when it is back")
            if self.depth >= self._limit + self._lanes:
                later = math.ceil(self.depth * self._typical / self._workers)
                raise QueueFullError(self.depth - self._lanes, max(1, later))
            self._jobs.add(job)
        job.future = self._pool.submit(self._run, job, work)
        return job

    def drain(self, seconds: float, grace: float = 5.0) -> int:
        """Takes nothing new and finishes what was taken; what is left then is given up at its next round.

        Returns how many were given up; `depth` is not 0 when some did not even come to their next round.
        """
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._jobs, seconds)
            late = list(self._jobs)
            for job in late:
                job.cancel(ShutdownError(f"the server shut down and did not finish this within {seconds:g} s"))
            self._changed.wait_for(lambda: not self._jobs, grace)
        return len(late)

    def close(self) -> None:
        """Takes no more, and waits for those that are being made."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, job: Job, work: Callable[[Job], Any]) -> Any:
        try:
            job.check()
            job.started = time.monotonic()
            result = work(job)
            self._typical += 0.2 * (time.monotonic() - job.started - self._typical)
            return result
        finally:
            with self._changed:
                self._jobs.discard(job)
                self._changed.notify_all()
