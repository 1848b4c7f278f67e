"""Whether a server can make pictures now: lanes that are free play a tiny round, lanes at work are watched."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

from engines.errors import EngineError
from runtime.pipeline import Pipeline

log = logging.getLogger(__name__)
FRESH = 1.0  # seconds that the answer of free lanes is good for


class Health:
    """Readiness. A probe never waits for pictures, and pictures at most for one round of a probe."""

    def __init__(self, pipeline: Pipeline, lane_seconds: float, draining: Callable[[], bool]) -> None:
        self._pipeline, self._seconds, self._draining = pipeline, lane_seconds, draining
        self._probe: asyncio.Future[None] | None = None
        self._fresh_until = 0.0

    async def trouble(self) -> dict[str, Any] | None:
        """Why nothing should be sent here, or None; answers within `lane_seconds`."""
        if self._draining():
            return {"status": "draining"}
        if not self._pipeline.lost and not (late := self._late()) and not self._working():
            try:
                await self._round()
            except TimeoutError:
                return {"status": "hanging", "message": f"a tiny round took more than {self._seconds:g} s"}
            except EngineError as error:
                if not self._pipeline.lost:
                    return {"status": "failing", "message": str(error)}
        if self._pipeline.lost:
            return {"status": "degraded", "lost": list(self._pipeline.lost)}
        if late := self._late():
            message = f"a round has taken more than {self._seconds:g} s"
            return {"status": "hanging", "lanes": late, "message": message}
        return None

    def _late(self) -> list[str]:
        devices = self._pipeline.devices
        return [str(devices[lane]) for lane in self._pipeline.lanes.overdue(self._seconds) if lane < len(devices)]

    def _working(self) -> bool:
        """Whether rounds of pictures, or of the last second, say all that a probe would."""
        return bool(self._pipeline.lanes.seated) or (self._probe is None and time.monotonic() < self._fresh_until)

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
                probe.exception()  # looked at, whether or not anyone still waits

        probe.get_loop().call_soon_threadsafe(tell)
