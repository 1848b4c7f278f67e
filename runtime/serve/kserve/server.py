"""Both transports of the protocol as a part of a server's process: HTTP on its application, gRPC on its event loop."""

from __future__ import annotations

import logging
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

from fastapi import FastAPI

from engines.errors import EngineError
from runtime.serve.access import Access
from runtime.serve.kserve.http import add_routes
from runtime.serve.kserve.model import Model
from runtime.serve.kserve.regions import Regions
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")


class KServe:
    """See openai.server.Guest. `grpc` is HOST:PORT, or None for HTTP alone; `grpc_port` is known once it started.

    memory: the kinds of shared memory that clients may register, of `FLAGS` in regions.
    """

    def __init__(
        self, service: Service, access: Access | None = None, grpc: str | None = None, memory: Collection[str] = ()
    ) -> None:
        self._access, self._grpc = access or Access(), grpc
        self.model = Model(service, Regions(memory))
        self.grpc_port: int | None = None
        self._rpc: Any = None

    def add_routes(self, app: FastAPI) -> None:
        """Everything below /v2."""
        add_routes(app, self.model, self._access)

    async def start(self) -> None:
        """Opens gRPC; EngineError where it cannot listen."""
        if self._grpc is None:
            return
        check_grpc()
        from runtime.serve.kserve.rpc import make_server

        self._rpc, self.grpc_port = make_server(self.model, self._access, self._grpc)
        await self._rpc.start()
        log.info("gRPC on port %d", self.grpc_port)

    async def stop(self, seconds: float) -> None:
        """Ends gRPC, and closes the clients' shared memory."""
        if self._rpc is not None:
            await self._rpc.stop(seconds)
        self.model.regions.close()


def check_grpc() -> None:
    """EngineError where gRPC's packages are missing."""
    missing = [name for name in ("grpc", "google.protobuf") if not _found(name)]
    if missing:
        raise EngineError(f"--grpc-port needs {' and '.join(missing)}: pip install --editable '.[kserve]'")


def check_cuda() -> None:
    """EngineError where there is no GPU whose memory clients could share."""
    from engines.cuda.driver import available, bindings

    reason = available()
    if reason is not None:
        raise EngineError(f"--cuda-shared-memory needs an NVIDIA GPU, but {reason}: leave it out")
    bindings()


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a parent
        return False
