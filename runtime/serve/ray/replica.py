"""A replica: the engine and all its protocols in an actor of Ray, asked by the ingress in place of a socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve

from engines.errors import EngineError
from runtime.call import CHOSEN_SEED, Call
from runtime.pipeline import Pipeline
from runtime.serve.kserve.server import KServe
from runtime.serve.openai.app import make_app
from runtime.serve.ray.cost import device_seconds
from runtime.serve.ray.message import Asked, Part
from runtime.serve.ray.node import claim, prepare
from runtime.serve.ray.settings import ModelSettings, Settings
from runtime.serve.request import SECONDS_LEFT
from runtime.serve.service import Service

log = logging.getLogger("runtime.serve")


class Replica:
    """Loads a model, and answers like a server of its own. Methods are called by Ray Serve and by the ingress."""

    def __init__(self, model: ModelSettings, settings: Settings) -> None:
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        claim(settings.build, context.app_name, ray.get_runtime_context().gcs_address, _alive)
        prepare(model, settings)
        self._pipeline = Pipeline.load(model.model, model.devices, settings.build, settings.served.lane_seconds)
        self._pipeline.run(Call("", num_inference_steps=1, scheduler=model.scheduler))  # as the single server does
        self._service = Service(self._pipeline, settings.served, model.scheduler)
        self._app = make_app(self._service, settings.access)
        kserve = KServe(self._service, settings.access)
        kserve.add_routes(self._app)
        self._model = kserve.model
        self._gone: dict[str, asyncio.Event] = {}
        self._playing: set[asyncio.Task[None]] = set()

    async def answer(self, asked: Asked) -> AsyncIterator[Part]:
        """The parts of the answer. Closing the iterator is the client's disconnection.

        The same id asked again takes the place of the first: one image is made of it at a time.
        """
        if (earlier := self._gone.get(asked.id)) is not None:
            earlier.set()
        gone = self._gone[asked.id] = asyncio.Event()
        messages: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.create_task(self._play(asked, gone, messages))
        self._playing.add(task)
        task.add_done_callback(self._playing.discard)
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            head: dict[str, Any] | None = None
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    head = message
                    continue
                part = Part(message.get("body", b""), message.get("more_body", False))
                if head is not None:
                    part, head = part._replace(status=head["status"], headers=tuple(map(tuple, head["headers"]))), None
                yield part
            await task
        finally:
            gone.set()
            if self._gone.get(asked.id) is gone:
                del self._gone[asked.id]

    async def _play(self, asked: Asked, gone: asyncio.Event, messages: asyncio.Queue[Any]) -> None:
        """The application's run of one request."""
        SECONDS_LEFT.set(asked.seconds)
        CHOSEN_SEED.set(asked.seed)
        scope = {
            # before 2.4, applications listen for the disconnection while they stream
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "scheme": "http", "method": asked.method, "path": asked.path, "raw_path": asked.path.encode(),
            "query_string": asked.query, "root_path": "", "headers": list(asked.headers),
            "client": None, "server": None, "state": {},
        }  # fmt: skip
        bodies = [asked.body]

        async def receive() -> dict[str, Any]:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.put_nowait(message)

        await self._app(scope, receive, send)

    async def check_health(self) -> None:
        """The engine's readiness. Ray drains and replaces a replica after three EngineErrors in a row."""
        if trouble := await self._service.health.trouble():
            raise EngineError(f"not ready: {trouble}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `runtime.serve.ray.scaling`."""
        calls = self._service.queue.calls
        return {"device_seconds": sum(map(self._cost, calls)), "requests": float(len(calls))}

    def _cost(self, call: Call) -> float:
        """Device-seconds of a request; of one that will be refused, none."""
        try:
            measured = device_seconds(self._pipeline, call)
        except EngineError:
            return 0.0
        return self._service.queue.typical_seconds * len(self._pipeline.devices) if measured is None else measured

    def metrics(self) -> tuple[str, bytes]:
        """The replica's name, and Prometheus' text of it."""
        return self._id, self._service.metrics.text()

    def statistics(self) -> dict[str, Any]:
        """Triton's statistics of this replica."""
        return self._model.statistics()

    def __del__(self) -> None:
        """Ray calls it once no request is left."""
        if hasattr(self, "_service"):
            self._service.queue.drain(0)
            self._pipeline.close()


def _alive(application: str) -> bool:
    """Whether an application of that name is on this cluster."""
    return application in serve.status().applications
