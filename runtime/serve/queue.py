"""A bounded queue in front of the engine's threads: by priority, then first come, first served."""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runtime.call import Call
from runtime.serve.request import DrainingError, QueueFullError, Request


class RequestQueue:
    """At most `limit` requests wait beside the `lanes` that may be running.

    There are two threads more than requests that may have lanes, `running`, so that texts are encoded and images
    decoded while all lanes denoise. `running` is the number of lanes, or more where requests share calls.
    """

    def __init__(self, limit: int, lanes: int = 1, running: int | None = None) -> None:
        self._limit, self._lanes = limit, lanes
        running = running or lanes
        self._workers = running + 2 if running > 1 else 1
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="engine")
        self._changed = threading.Condition()
        self._open = True
        self._waiting: deque[Request] = deque()
        self._requests: set[Request] = set()  # waiting and running
        self._typical = 1.0  # seconds that a thread spends on a request, a running mean

    @property
    def depth(self) -> int:
        """Requests waiting or running."""
        return len(self._requests)

    @property
    def calls(self) -> tuple[Call, ...]:
        """What the requests ask for."""
        with self._changed:
            return tuple(request.call for request in self._requests)

    @property
    def typical_seconds(self) -> float:
        """That a thread spends on a request."""
        return self._typical

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""
        return not self._open

    def submit(self, request: Request) -> None:
        """Queues a request; QueueFullError, or DrainingError after `drain`."""
        with self._changed:
            if not self._open:
                raise DrainingError("the server is shutting down: ask another one, or this one when it is back")
            if self.depth >= self._limit + self._lanes:
                later = math.ceil(self.depth * self._typical / self._workers)
                raise QueueFullError(self.depth - self._lanes, max(1, later))
            request.on_cancel = self._remove
            self._requests.add(request)
            insort(self._waiting, request, key=lambda one: one.call.priority)
        self._pool.submit(self._next)

    def drain(self, seconds: float, grace: float = 5.0) -> int:
        """Refuses new requests, finishes the accepted ones, and cancels those still running after `seconds`.

        Returns how many were cancelled; `depth` is above 0 when some did not reach their next round within `grace`.
        """
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._requests, seconds)
            late = list(self._requests)
            for request in late:
                request.cancel(DrainingError(f"the server shut down and did not finish this within {seconds:g} s"))
            self._changed.wait_for(lambda: not self._requests, grace)
        return len(late)

    def close(self) -> None:
        """Waits for the accepted requests and ends the threads."""
        self._pool.shutdown()

    def _remove(self, request: Request, reason: Exception) -> None:
        """Frees the place of a cancelled request, unless a thread has it already."""
        with self._changed:
            if request not in self._waiting:
                return
            self._waiting.remove(request)
            self._requests.discard(request)
            self._changed.notify_all()
        request.future.set_exception(reason)

    def _next(self) -> None:
        with self._changed:
            if not self._waiting:  # the request that this was scheduled for was cancelled
                return
            request = self._waiting.popleft()
        try:
            result = request.context.run(self._run, request)
        except BaseException as error:  # noqa: BLE001 - carried to whoever waits and raised there
            request.future.set_exception(error)
        else:
            request.future.set_result(result)

    def _run(self, request: Request) -> Any:
        try:
            request.check()
            request.started = time.monotonic()
            result = request.work(request)
            self._typical += 0.2 * (time.monotonic() - request.started - self._typical)
            return result
        finally:
            with self._changed:
                self._requests.discard(request)
                self._changed.notify_all()
