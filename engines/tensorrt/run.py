"""Runs TensorRT plans as lanes."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engines.base import Array
from engines.cuda import driver as cuda
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import LANE_TIMEOUT, SERIAL, Driver, abandon, release
from engines.cuda.kernels import BYTES, CACHE
from engines.cuda.memory import Tensor, narrow, pinned, widen
from engines.cuda.rounds import Enqueue
from engines.devices import LaneSpec
from engines.errors import DeviceError
from engines.manifest import DENOISER, Manifest, axes_of
from engines.nvidia import gpus_of, visible_gpus
from engines.store import Bundle, Plan
from engines.tensorrt.budget import Budget, branches
from engines.tensorrt.build import build_missing
from engines.tensorrt.contexts import CONTEXTS, Context, Contexts, Engine, Held, Shapes
from engines.tensorrt.plan import BATCHES, batches, package, plan_fields

__all__ = ["Engines", "build_missing", "trouble", "wanted"]


def trouble() -> str | None:
    """See load.RuntimeModule."""
    return cuda.available()


def wanted(bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
    """See load.RuntimeModule: one plan per kind of GPU."""
    kinds, networks = list(dict.fromkeys(visible_gpus())), bundle.manifest.usual
    return {network: [plan_fields(bundle, network, gpu, runtime) for gpu in kinds] for network in networks}


class EngineNetwork:
    """The noise predictor of one lane: the device's engine with contexts and scratch memory of this lane's own."""

    def __init__(self, engine: Engine, output: str) -> None:
        self._engine, self._output = engine, output
        self.device = engine.device.ordinal
        self.capturable = True
        self.held: Held | None = None
        self._contexts = Contexts(engine)

    @property
    def contexts(self) -> int:
        """See rounds.LaneNetwork."""
        return len(self._contexts)

    @property
    def outgrown(self) -> int:
        """See rounds.LaneNetwork."""
        return self._contexts.outgrown

    def scratch(self, shapes: Shapes) -> int:
        """The bytes of scratch memory that a shape needs."""
        return self._contexts.size(shapes)

    def reserve(self, size: int) -> None:
        """Scratch memory of at least that size."""
        self._contexts.reserve(size)

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """See rounds.LaneNetwork. Calls beyond the plan's largest batch run in parts, one after the other.

        Rounds of different samplers meet in the same shapes: those share a context, which is pointed at their memory.
        """
        batch, largest, handle, parts = output.shape[0], BATCHES[-1], int(stream), []
        for start in range(0, batch, largest):
            rows = slice(start, min(start + largest, batch))
            own = {name: _rows(tensor, rows) for name, tensor in inputs.items()}
            shapes = tuple((name, tensor.shape) for name, tensor in own.items())
            self.capturable = self._contexts.get(shapes).capturable(handle) and self.capturable
            parts.append((shapes, own | {self._output: _rows(output, rows)}))

        return _Run(self, self._contexts, handle, parts)

    def trim(self, idle: Callable[[], bool]) -> None:
        """See rounds.LaneNetwork."""
        if self._contexts.untidy:
            with SERIAL:
                self.held = None  # who captured it has it
                self._contexts.trim(idle)

    def close(self) -> None:
        """Frees contexts and scratch memory."""
        self.held = None
        self._contexts.close()


class _Run:
    """One call of a lane, in parts. Contexts that were let go meanwhile are made again, but never during a capture."""

    def __init__(
        self, network: EngineNetwork, contexts: Contexts, stream: int, parts: Sequence[tuple[Shapes, dict[str, Tensor]]]
    ) -> None:
        self._network, self._contexts, self._stream, self._parts = network, contexts, stream, parts
        self._ready: list[Context] = []

    def prepare(self) -> None:
        """See rounds.Prepared."""
        self._ready = [self._contexts.get(shapes) for shapes, _ in self._parts]

    def __call__(self) -> None:
        with SERIAL:  # another thread may trim
            used, self._ready = self._ready or [self._contexts.get(shapes) for shapes, _ in self._parts], []
            for context, (_, tensors) in zip(used, self._parts, strict=True):
                context.point(tensors)
                context.run(self._stream)
            self._network.held = Held(used)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    size = BYTES[tensor.dtype] * int(np.prod(tensor.shape[1:], dtype=np.int64))
    return Tensor(tensor.pointer + rows.start * size, (rows.stop - rows.start, *tensor.shape[1:]), tensor.dtype)


@dataclass
class _Bound:
    """Memory for one shape of all inputs and outputs of a network: on the device, and pinned beside it."""

    tensors: dict[str, Tensor]
    hosts: dict[str, np.ndarray]
    freed: list[Callable[[], None]]


class EngineSession:
    """A network that runs once per image, from host memory to host memory.

    Memory and contexts of a few shapes are kept. Threads take turns.
    """

    def __init__(self, engine: Engine, bundle: Bundle, network: str, lane_timeout: float = LANE_TIMEOUT) -> None:
        self._engine, self._spec, self._largest = engine, bundle.manifest.networks[network], batches(network)[-1]
        self._lock = threading.Lock()
        self._bound: OrderedDict[Shapes, _Bound] = OrderedDict()
        self._contexts, self._timeout, self.hangs = Contexts(engine), lane_timeout, False
        driver = engine.driver
        driver("cuCtxSetCurrent", engine.device.context)
        self._stream, self._done = driver.stream(), driver.event()

    def scratch(self, shapes: Shapes) -> int:
        """The bytes of scratch memory that a shape needs."""
        return self._contexts.size(shapes)

    def reserve(self, size: int) -> None:
        """Scratch memory of at least that size."""
        self._contexts.reserve(size)

    def run(self, **inputs: np.ndarray) -> dict[str, Array]:
        """See load.Runner."""
        batch, largest = len(next(iter(inputs.values()))), self._largest
        parts = (slice(start, start + largest) for start in range(0, batch, largest))
        with self._lock:
            found = [self._run({name: value[part] for name, value in inputs.items()}) for part in parts]
        return {one.name: np.concatenate([part[one.name] for part in found]) for one in self._spec.outputs}

    def close(self) -> None:
        """Frees the memory, after a run of another thread."""
        with self._lock:
            driver = self._engine.driver
            driver("cuCtxSetCurrent", self._engine.device.context)
            freed: list[Callable[[], None]] = [
                partial(driver, "cuStreamDestroy", self._stream),
                partial(driver, "cuEventDestroy", self._done),
            ]
            freed += [self._contexts.close, *(one for bound in self._bound.values() for one in bound.freed)]
            self._bound.clear()
            release(freed)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Array]:
        engine, driver = self._engine, self._engine.driver
        driver("cuCtxSetCurrent", engine.device.context)
        shapes = tuple((one.name, inputs[one.name].shape) for one in self._spec.inputs)
        context, bound = self._context(shapes), self._memory(shapes)
        for one in self._spec.inputs:
            host, value = bound.hosts[one.name], inputs[one.name]
            host[...] = narrow(value, "bfloat16") if one.dtype == "bfloat16" else value
            driver("cuMemcpyHtoDAsync", bound.tensors[one.name].pointer, host.ctypes.data, host.nbytes, self._stream)
        context.point(bound.tensors)
        context.run(int(self._stream))
        for one in self._spec.outputs:
            host = bound.hosts[one.name]
            driver("cuMemcpyDtoHAsync", host.ctypes.data, bound.tensors[one.name].pointer, host.nbytes, self._stream)
        driver("cuEventRecord", self._done, self._stream)
        self.hangs = True  # unless it ends
        driver.wait(self._done, f"{engine.name} on {engine.device.name}", self._timeout)
        self.hangs = False
        self._contexts.trim(_always)
        hosts = {one.name: (bound.hosts[one.name], one.dtype) for one in self._spec.outputs}
        return {
            name: widen(host.reshape(-1).view(np.uint8), dtype).reshape(host.shape)
            for name, (host, dtype) in hosts.items()
        }

    def _context(self, shapes: Shapes) -> Context:
        """Of a shape; where there is too little memory, in place of that of smaller ones."""
        try:
            return self._contexts.get(shapes)
        except DeviceError:
            self._contexts.trim(_always)
            return self._contexts.get(shapes)

    def _memory(self, shapes: Shapes) -> _Bound:
        found = self._bound.get(shapes)
        if found is None:
            while len(self._bound) >= CONTEXTS:  # nothing runs between runs
                release(self._bound.popitem(last=False)[1].freed)
            found = self._bound[shapes] = self._bind(dict(shapes))
        self._bound.move_to_end(shapes)
        return found

    def _bind(self, shapes: Mapping[str, tuple[int, ...]]) -> _Bound:
        spec, driver = self._spec, self._engine.driver
        axes, bound = axes_of(spec.inputs, shapes), _Bound({}, {}, [])
        for one in (*spec.inputs, *spec.outputs):
            shape = one.resolve(axes)
            dtype = np.dtype("uint16" if one.dtype == "bfloat16" else one.dtype)
            size = int(np.prod(shape)) * dtype.itemsize
            host, free = pinned(driver, size)
            pointer = int(driver("cuMemAlloc", max(size, 256)))
            bound.freed += [free, partial(driver, "cuMemFree", pointer)]
            bound.tensors[one.name] = Tensor(pointer, shape, one.dtype)
            bound.hosts[one.name] = host.view(dtype).reshape(shape)
        return bound


class Engines:
    """A loaded model on GPUs: what runs once per image on the first lane's device, and the lanes."""

    def __init__(
        self, bundle: Bundle, lanes: Sequence[LaneSpec], driver: Driver | None = None, *,
        lane_timeout: float = LANE_TIMEOUT,
    ) -> None:  # fmt: skip
        gpus_of(lanes)
        self._driver, self._own = driver or Driver(), driver is None
        self._networks: list[EngineNetwork] = []
        self.runners: dict[str, EngineSession] = {}
        self._siblings: list[CudaBackend] = []
        self._engines: list[Engine] = []
        try:
            self._load(bundle, lanes, lane_timeout)
        except BaseException:
            self._free()
            raise
        output = bundle.manifest.networks[DENOISER].outputs[0]
        self._open = partial(
            CudaBackend, self._driver, self._networks, output.dtype, CACHE / "kernels", lane_timeout=lane_timeout
        )
        self.backend = self._open()

    def _load(self, bundle: Bundle, lanes: Sequence[LaneSpec], lane_timeout: float) -> None:
        """Weights, once per device, then scratch memory: what does not fit is refused before it is taken."""
        runtime = lanes[0].runtime
        there, trt = visible_gpus(), package(runtime)
        ordinals = [lane.gpu for lane in lanes if lane.gpu is not None]
        plans: dict[tuple[str, int], Plan] = {}
        for network in bundle.manifest.usual:
            for ordinal in dict.fromkeys(ordinals if network == DENOISER else ordinals[:1]):
                fields = plan_fields(bundle, network, there[ordinal], runtime)
                plans[network, ordinal] = bundle.plan(network, fields)
        devices = {ordinal: self._driver.device(ordinal) for ordinal in dict.fromkeys(ordinals)}
        budget = Budget(self._driver, devices)
        for (network, ordinal), plan in plans.items():
            budget.add(ordinal, f"weights of {network}", plan.bytes)
        budget.check("use a smaller model or precision, or another GPU")

        def engine(network: str, ordinal: int) -> Engine:
            plan = plans[network, ordinal]
            jit = bundle.plan_folder(plan.key) / "jit.cache"
            made = Engine(self._driver, devices[ordinal], bundle.plan_content(plan), network, trt, jit)
            self._engines.append(made)
            return made

        for network, ordinal in plans:
            if network != DENOISER:
                self.runners[network] = EngineSession(engine(network, ordinal), bundle, network, lane_timeout)
        denoisers = {ordinal: engine(DENOISER, ordinal) for ordinal in devices}
        output = bundle.manifest.networks[DENOISER].outputs[0]
        self._networks += [EngineNetwork(denoisers[ordinal], output.name) for ordinal in ordinals]
        self.plan_folder = bundle.plan_folder(plans[DENOISER, ordinals[0]].key)
        budget.taken()
        self._reserve(bundle.manifest, ordinals, budget)

    def _reserve(self, manifest: Manifest, ordinals: Sequence[int], budget: Budget) -> None:
        """Scratch memory for images of the usual size, one at a time: a start that cannot make them fails now.

        Larger shapes take more when they come.
        """
        shapes = {name: _usual(manifest, name, 1) for name in self.runners}
        once = {name: runner.scratch(shapes[name]) for name, runner in self.runners.items()}
        usual = _usual(manifest, DENOISER, branches(manifest, len(ordinals)))
        first = {ordinal: self._networks[ordinals.index(ordinal)] for ordinal in dict.fromkeys(ordinals)}
        sizes = {ordinal: network.scratch(usual) for ordinal, network in first.items()}
        budget.add_latents(manifest, ordinals)
        for name, size in once.items():
            budget.add(ordinals[0], f"scratch of {name}", size)
        for lane, ordinal in enumerate(ordinals):
            budget.add(ordinal, f"scratch of lane {lane}", sizes[ordinal])
        budget.check("use fewer lanes, a smaller model, or another GPU")
        for name, runner in self.runners.items():
            runner.reserve(once[name])
        for ordinal, network in zip(ordinals, self._networks, strict=True):
            network.reserve(sizes[ordinal])

    def sibling(self, home: int) -> CudaBackend:
        """See load.Engines."""
        self._siblings.append(self._open(home=home, sibling_of=self.backend))
        return self._siblings[-1]

    def close(self) -> None:
        """Waits for the lanes and frees their memory, or keeps all of it where something hangs."""
        for backend in (*self._siblings, self.backend):
            backend.close()
        if self.backend.hangs or any(runner.hangs for runner in self.runners.values()):
            abandon(self._networks, dict(self.runners))
            return
        self._free()

    def _free(self) -> None:
        release([network.close for network in self._networks])
        release([runner.close for runner in self.runners.values()])
        self.runners.clear()
        self._networks.clear()
        release([engine.close for engine in self._engines])
        self._engines.clear()
        with SERIAL:
            gc.collect()  # what TensorRT made is freed before its device's context is let go
        if self._own:
            self._driver.close()


def _always() -> bool:
    return True  # nothing runs between runs


def _usual(manifest: Manifest, network: str, batch: int) -> Shapes:
    """The shapes of a network's inputs for images of the model's own size."""
    axes = manifest.latent_axes(manifest.sizes.width, manifest.sizes.height, batch)
    return tuple((one.name, one.resolve(axes)) for one in manifest.networks[network].inputs)
