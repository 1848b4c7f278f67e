"""The process of a server: it answers until a signal, then drains."""

from __future__ import annotations

import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from runtime.serve.access import Access
from runtime.serve.openai.app import make_app
from runtime.serve.openai.connection import limited_connection
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")
LATE_SECONDS = 5.0  # for the last bytes, and for the lanes to stop


class Guest(Protocol):
    """A further protocol in the same process, on the same event loop."""

    def add_routes(self, app: FastAPI) -> None:
        """Adds what it answers over HTTP."""

    async def start(self) -> None:
        """Opens what it has beside HTTP."""

    async def stop(self, seconds: float) -> None:
        """Ends it; calls that still run have so many seconds."""


class Server(uvicorn.Server):
    """Answers until a signal; then it refuses new requests and finishes accepted ones. A second Ctrl-C ends it."""

    def __init__(self, service: Service, access: Access | None = None, guests: Sequence[Guest] = ()) -> None:
        app = make_app(service, access or Access())
        for guest in guests:
            guest.add_routes(app)
        config = uvicorn.Config(
            app, http=limited_connection(service.limits), log_config=None, ws="none",
            timeout_graceful_shutdown=int(LATE_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self._service, self._guests = service, guests
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Guests first: who can reach HTTP can reach all."""
        for guest in self._guests:
            await guest.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends all."""
        for guest in self._guests:
            await guest.stop(0 if self.force_exit else float(self.config.timeout_graceful_shutdown or 0))
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts draining; on a second SIGINT ends at once."""
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, daemon=True).start()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        seconds = self._service.limits.drain
        end = time.monotonic() + seconds
        log.info("Shutting down: %d requests are finished first, within %g s", self._service.queue.depth, seconds)
        late = self._service.queue.drain(seconds)
        if late:
            log.warning("%d requests were cancelled after %g s", late, seconds)
        self.config.timeout_graceful_shutdown = math.ceil(max(end - time.monotonic(), LATE_SECONDS))  # to send answers
        self.should_exit = True
