"""Connections: how many there may be, and how long the head of a request may take."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.limits import Limits

HEAD_SECONDS = 10.0  # for the request line and the headers


def limited_connection(limits: Limits) -> type[H11Protocol]:
    """The class of a server's connections. Requests on those beyond the limit find `crowded` in their state."""
    seconds = min(HEAD_SECONDS, limits.seconds)

    class Connection(H11Protocol):
        _late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self.app_state = {**self.app_state, "crowded": True}
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def _watch(self) -> None:
            """One timer per head: who sends byte after byte gains no time."""
            if self.conn.their_state is not h11.IDLE and self._late is not None:
                self._late.cancel()
                self._late = None
            elif self.conn.their_state is h11.IDLE and self._late is None:
                self._late = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    return Connection
