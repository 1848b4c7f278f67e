"""The one model of a server as the protocol sees it: its name, its requests, its statistics."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from engines.errors import EngineError, ParameterError
from runtime.call import Call
from runtime.pipeline import Result
from runtime.serve.kserve.codec import (
    IMAGE,
    Inference,
    check_outputs,
    config,
    file_format,
    metadata,
    to_call,
    to_outputs,
)
from runtime.serve.kserve.refused import Refused
from runtime.serve.kserve.regions import Regions
from runtime.serve.kserve.tensor import Tensor
from runtime.serve.request import CancelledError, DeadlineError, DrainingError, QueueFullError, Request
from runtime.serve.service import Previews, Service

VERSION = "1"
EXTENSIONS = ("binary_tensor_data", "model_repository", "model_configuration", "statistics", "parameters")
DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")


class UnknownModelError(Exception):
    """A model or a version that this server does not have."""


class Model:
    """Requests for the model of a service, by whichever transport. Statistics cover both."""

    def __init__(self, service: Service, regions: Regions | None = None) -> None:
        self.service, self.regions = service, regions or Regions()
        self.name = service.pipeline.manifest.model
        edits = service.pipeline.manifest.image_to_image
        self.metadata, self.config = metadata(self.name, edits=edits), config(self.name, edits=edits)
        self.extensions = (*EXTENSIONS, *(f"{kind}_shared_memory" for kind in sorted(self.regions.allowed)))
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(DURATIONS, (0, 0))
        self._images, self._last = 0, 0

    def check(self, name: str, version: str = "") -> None:
        """UnknownModelError for any model but the one of this server."""
        if name != self.name or version not in ("", VERSION):
            asked = f"{name!r}" + (f" of version {version!r}" if version else "")
            raise UnknownModelError(f"there is no model {asked}: this server has {self.name!r} of version {VERSION!r}")

    async def call(self, inference: Inference, pixel_bytes: int = 1) -> Call:
        """What the engine is asked for, checked; ParameterError. pixel_bytes: that one number of a pixel takes inline.

        Images are decoded on a thread: they would keep the event loop from other clients.
        """

        def checked() -> Call:
            check_outputs(inference)
            call = to_call(inference, self.service.limits, self.service.defaults)
            self._check_size(inference, call, pixel_bytes)
            return call

        return await asyncio.to_thread(checked) if IMAGE in inference.inputs else checked()

    def submit(
        self, inference: Inference, call: Call, previews: Previews | None = None, *, request_id: str | None = None,
        seconds: float | None = None, place: Callable[[list[Tensor]], Any] = lambda outputs: outputs,
    ) -> Request:  # fmt: skip
        """Queues a request; its future gets what `place` makes of the outputs, on a thread of the engine.

        ParameterError, QueueFullError or DrainingError at once.
        """

        def encode(result: Result) -> Any:
            start = time.perf_counter()
            made = place(to_outputs(inference, result))
            self._made(result, time.perf_counter() - start)
            return made

        began = time.monotonic()
        parts = (self.regions.part(name, its) for name, its in inference.outputs.items())
        held = self.regions.hold([part for part in parts if part is not None])
        try:
            request = self.service.submit(call, encode, previews, request_id=request_id, seconds=seconds)
        except BaseException:
            self.regions.release(held)
            raise
        request.future.add_done_callback(lambda _: self.regions.release(held))
        request.future.add_done_callback(
            lambda one: self._count("fail", time.monotonic() - began) if one.exception() else None
        )
        return request

    def _check_size(self, inference: Inference, call: Call, pixel_bytes: int) -> None:
        """ParameterError for pixels that will exceed the limit of an answer, before they are made."""
        wanted = (inference.outputs or {"image": {}}).get("image")
        inline = wanted is not None and "shared_memory_region" not in wanted
        if wanted is None or not inline or file_format("image", wanted, inference.parameters):
            return
        sizes = self.service.pipeline.manifest.sizes
        side = call.image.size if isinstance(call.image, Image.Image) else (sizes.width, sizes.height)
        self.check_answer((call.width or side[0]) * (call.height or side[1]) * 3 * call.images * pixel_bytes)

    def check_answer(self, size: int) -> None:
        """ParameterError for an answer beyond the limit."""
        if size > self.service.limits.answer:
            message = f"the answer would have {size} bytes, this server sends {self.service.limits.answer}"
            raise ParameterError(
                "outputs", f"{message}: ask for fewer or smaller images, a file format, or name memory"
            )

    def in_region(self, inference: Inference, tensor: Tensor) -> dict[str, Any] | None:
        """Writes an output where the request wants it; the parameters that say so, or None for an inline one."""
        wanted = inference.outputs.get(tensor.name, {})
        part = self.regions.part(tensor.name, wanted)
        if part is None:
            return None
        data = tensor.raw()
        part.write(tensor.name, data)
        place = {"shared_memory_region": part.region.name, "shared_memory_byte_size": data.nbytes}
        offset = wanted.get("shared_memory_offset", 0)
        return place | ({"shared_memory_offset": offset} if offset else {})

    def seconds(self, parameters: Mapping[str, Any]) -> float | None:
        """The client's own deadline: the parameter `timeout`, in microseconds."""
        micros = parameters.get("timeout")
        if micros is None:
            return None
        if isinstance(micros, bool) or not isinstance(micros, int) or micros <= 0:
            raise ParameterError("timeout", f"timeout must be a whole number of microseconds above 0, not {micros!r}")
        return micros / 1e6

    def _count(self, name: str, seconds: float) -> None:
        with self._lock:
            count, total = self._counts[name]
            self._counts[name] = (count + 1, total + round(seconds * 1e9))

    def _made(self, result: Result, encoding: float) -> None:
        seconds = result.report.seconds
        for name, value in (
            ("success", seconds["total"] + encoding), ("queue", seconds["wait"]),
            ("compute_input", seconds["text"]),
            ("compute_infer", seconds["total"] - seconds["wait"] - seconds["text"]), ("compute_output", encoding),
        ):  # fmt: skip
            self._count(name, value)
        with self._lock:
            self._images += result.report.images
            self._last = time.time_ns() // 1_000_000

    def statistics(self) -> dict[str, Any]:
        """Triton's statistics of the model; an inference is an image, an execution a request."""
        with self._lock:
            counts = {name: {"count": count, "ns": total} for name, (count, total) in self._counts.items()}
            return {
                "name": self.name, "version": VERSION, "last_inference": self._last, "inference_count": self._images,
                "execution_count": counts["success"]["count"], "inference_stats": counts,
            }  # fmt: skip


def status_of(error: Exception) -> tuple[int, str] | None:
    """The HTTP status and the name of the gRPC status of an error; None for what nobody expects."""
    for kind, status in (
        (UnknownModelError, (404, "NOT_FOUND")), (Refused, (400, "UNIMPLEMENTED")),
        (ParameterError, (400, "INVALID_ARGUMENT")), (QueueFullError, (429, "RESOURCE_EXHAUSTED")),
        (DrainingError, (503, "UNAVAILABLE")), (DeadlineError, (504, "DEADLINE_EXCEEDED")),
        (CancelledError, (499, "CANCELLED")), (EngineError, (500, "INTERNAL")),
    ):  # fmt: skip
        if isinstance(error, kind):
            return status
    return None
