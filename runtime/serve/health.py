"""Readiness: free lanes play a round of one evaluation, busy lanes are watched."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

from engines.errors import EngineError
from runtime.pipeline import Pipeline

log = logging.getLogger(__name__)
FRESH = 1.0  # seconds for which the result of a probe holds
RETRIES = (2.0, 10.0, 60.0)  # seconds, since a loss and between tries, after which lost lanes are tried again


class Health:
    """A probe never waits for images, and images wait at most for one round of a probe.

    Lost lanes are reopened as readiness is asked for, `RETRIES` seconds apart. After the last try the server is ready
    without them.
    """

    def __init__(self, pipeline: Pipeline, lane_seconds: float, draining: Callable[[], bool]) -> None:
        self._pipeline, self._seconds, self._draining = pipeline, lane_seconds, draining
        self._probe: asyncio.Future[None] | None = None
        self._fresh_until = 0.0
        self._lost: tuple[str, ...] = ()  # those that the tries are about
        self._tries, self._tried, self._trying = 0, 0.0, False

    async def trouble(self) -> dict[str, Any] | None:
        """Why the server is not ready, or None; answers within `lane_seconds`."""
        if self._draining():
            return {"status": "draining"}
        self._retry()
        if self._whole() and not (late := self._late()) and not self._working():
            try:
                await self._round()
            except TimeoutError:
                return {"status": "hanging", "message": f"a tiny round took more than {self._seconds:g} s"}
            except EngineError as error:
                if self._whole():
                    return {"status": "failing", "message": str(error)}
        if not self._whole():
            return {"status": "degraded", "lost": list(self._pipeline.lost or self._lost)}
        if late := self._late():
            message = f"a round has taken more than {self._seconds:g} s"
            return {"status": "hanging", "lanes": late, "message": message}
        return None

    @property
    def given_up(self) -> dict[str, Any]:
        """The lost lanes that the server is ready without."""
        return {"lost": list(self._pipeline.lost)} if self._pipeline.lost else {}

    def _whole(self) -> bool:
        """Whether no lane is lost but those that were given up."""
        given_up = self._pipeline.lost == self._lost and self._tries == len(RETRIES)
        return not self._trying and (not self._pipeline.lost or given_up)

    def _retry(self) -> None:
        if self._trying:  # `lost` may change meanwhile
            return
        if self._pipeline.lost != self._lost:  # another one, also after some were given up, or all are back
            self._lost, self._tries, self._tried = self._pipeline.lost, 0, time.monotonic()
        elif self._lost and time.monotonic() - self._tried > [*RETRIES, math.inf][self._tries]:
            self._trying = True
            threading.Thread(target=self._revive, daemon=True, name="revive").start()

    def _revive(self) -> None:
        lost = ", ".join(self._pipeline.lost)
        try:
            back = self._pipeline.revive()
        except Exception:
            log.exception("lost lanes could not be reopened")
            back = False
        self._tries, self._tried, self._trying = self._tries + 1, time.monotonic(), False
        if back:
            log.warning("%s came back", lost)
        elif self._tries == len(RETRIES):
            log.error("%s did not come back: the server goes on without until it is restarted", lost)

    def _late(self) -> list[str]:
        devices = self._pipeline.devices
        return [str(devices[lane]) for lane in self._pipeline.lanes.overdue(self._seconds) if lane < len(devices)]

    def _working(self) -> bool:
        """Whether images run, or a probe of the last second succeeded."""
        return bool(self._pipeline.lanes.running) or (self._probe is None and time.monotonic() < self._fresh_until)

    async def _round(self) -> None:
        if self._probe is None:
            self._probe = asyncio.get_running_loop().create_future()
            # no pool: a lane that hangs must not keep the process from ending
            play = partial(copy_context().run, self._play, self._probe)
            threading.Thread(target=play, daemon=True, name="probe").start()
        await asyncio.wait_for(asyncio.shield(self._probe), self._seconds)

    def _play(self, probe: asyncio.Future[None]) -> None:
        error: EngineError | None = None
        try:
            self._pipeline.probe()
        except EngineError as caught:
            error = caught
        except Exception as caught:
            log.exception("a tiny round failed")
            error = EngineError(f"unexpected error, see the server's log: {caught!r}")

        def tell() -> None:
            self._probe = None
            self._fresh_until = time.monotonic() + FRESH
            if error is None:
                probe.set_result(None)
            else:
                self._fresh_until = 0.0
                probe.set_exception(error)
                probe.exception()  # retrieved, also when nobody waits any more

        probe.get_loop().call_soon_threadsafe(tell)
