"""The process of a server: it answers until a signal, then drains."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from types import FrameType

import uvicorn

from runtime.serve.access import Access
from runtime.serve.openai.app import make_app
from runtime.serve.openai.connection import limited_connection
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")
LATE_SECONDS = 5.0  # for the last bytes, and for the lanes to stop


class Server(uvicorn.Server):
    """Answers until a signal; then it refuses new requests and finishes accepted ones. A second Ctrl-C ends it."""

    def __init__(self, service: Service, access: Access | None = None) -> None:
        config = uvicorn.Config(
            make_app(service, access or Access()), http=limited_connection(service.limits), log_config=None, ws="none",
            timeout_graceful_shutdown=int(LATE_SECONDS),
        )  # fmt: skip
        super().__init__(config)
        self._service = service
        self._draining = False

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
