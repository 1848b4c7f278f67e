"""Connections: how many there may be, and how long a client may take for the head of a request."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.limits import Limits

HEAD_SECONDS = 10.0  # for the request line and the headers
SPARE = 16  # connections beyond the limit at once: they get health checks and the reason of their refusal
SPARE_SECONDS = 1.0  # that such a connection may be idle


def limited_connection(limits: Limits) -> type[H11Protocol]:
    """The class of a server's connections. Requests on those beyond the limit find `crowded` in their state.

    More than `SPARE` beyond the limit push out the one that has been idle longest.
    """
    head_seconds = min(HEAD_SECONDS, limits.seconds)
    spare: dict[H11Protocol, None] = {}  # by age

    class Connection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _seconds = head_seconds

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self.app_state = {**self.app_state, "crowded": True}
                self._seconds = min(SPARE_SECONDS, head_seconds)
                spare[self] = None
                if len(spare) > SPARE:
                    idle = [one for one in spare if one.conn.their_state is h11.IDLE]
                    idle[0].transport.abort()
                    del spare[idle[0]]
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            spare.pop(self, None)
            self._cancel_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self in spare:  # others keep uvicorn's own time between two requests
                self._cancel_timer()
                self._watch()

        def _watch(self) -> None:
            """Limits the time for a head, and for the rest of a body that has been refused.

            One timer for all of it: sending byte after byte gains no time.
            """
            refused = self.cycle is not None and self.cycle.response_complete
            waiting = self.conn.their_state is h11.IDLE or (self.conn.their_state is h11.SEND_BODY and refused)
            if not waiting:
                self._cancel_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(self._seconds, self.timeout_keep_alive_handler)

        def _cancel_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Connection
