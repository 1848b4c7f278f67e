"""One engine, many requests: a bounded queue in front of a few threads, with deadlines, cancelling and a last call."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
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

    def __init__(self, work: Callable[[Job], Any], seconds: float, leave: Callable[[Job, Exception], None]) -> None:
        self.work = work
        self.context = copy_context()  # log lines of the engine's threads name the request, too
        self.future: Future[Any] = Future()
        self.future.set_running_or_notify_cancel()  # only `cancel` ends it early
        self.asked = time.monotonic()
        self.started: float | None = None
        self._seconds, self._leave = seconds, leave
        self._reason: Exception | None = None

    def cancel(self, reason: Exception | None = None) -> None:
        """It ends before its next round, or at once when it has not begun; the first reason counts."""
        self._reason = self._reason or reason or CancelledError()
        self._leave(self, self._reason)

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

    There are two threads more than lanes, so that texts are encoded and images decoded while all lanes are at work.
    """

    def __init__(self, limit: int, lanes: int = 1) -> None:
        self._limit, self._lanes = limit, lanes
        self._workers = lanes + 2 if lanes > 1 else 1
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="engine")
        self._changed = threading.Condition()
        self._open = True
        self._waiting: deque[Job] = deque()
        self._jobs: set[Job] = set()  # with those that threads have
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
        job = Job(work, seconds, self._leave)
        with self._changed:
            if not self._open:
                raise ShutdownError("the server is shutting down: ask another one, or this one when it is back")
            if self.depth >= self._limit + self._lanes:
                later = math.ceil(self.depth * self._typical / self._workers)
                raise QueueFullError(self.depth - self._lanes, max(1, later))
            self._jobs.add(job)
            self._waiting.append(job)
        self._pool.submit(self._next)
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
        """Takes no more, and waits for those that there are."""
        self._pool.shutdown()

    def _leave(self, job: Job, reason: Exception) -> None:
        """Makes room for another one, unless a thread has the job already."""
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self._jobs.discard(job)
            self._changed.notify_all()
        job.future.set_exception(reason)

    def _next(self) -> None:
        with self._changed:
            if not self._waiting:  # who this was for has left
                return
            job = self._waiting.popleft()
        try:
            result = job.context.run(self._run, job)
        except BaseException as error:  # noqa: BLE001 - carried to whoever waits and raised there
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _run(self, job: Job) -> Any:
        try:
            job.check()
            job.started = time.monotonic()
            result = job.work(job)
            self._typical += 0.2 * (time.monotonic() - job.started - self._typical)
            return result
        finally:
            with self._changed:
                self._jobs.discard(job)
                self._changed.notify_all()
