"""Runs TensorRT plans as lanes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from engines.base import Array
from engines.cuda import driver as cuda
from engines.cuda.backend import CudaBackend, Enqueue, Tensor, narrow, pinned, widen
from engines.cuda.backend import Network as LaneNetwork
from engines.cuda.driver import Device, Driver, release
from engines.cuda.kernels import BYTES, CACHE
from engines.devices import LaneSpec
from engines.errors import DeviceError
from engines.manifest import DENOISER, axes_of
from engines.nvidia import gpus_of, visible_gpus
from engines.store import Bundle, plan_key
from engines.tensorrt.build import build_missing, make_logger
from engines.tensorrt.plan import BATCHES, batches, package, plan_fields

__all__ = ["Engines", "build_missing", "trouble", "wanted"]
log = logging.getLogger(__name__)


def trouble() -> str | None:
    """See load.RuntimeModule."""
    return cuda.available()


def wanted(bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
    """See load.RuntimeModule: one plan per kind of GPU."""
    kinds, networks = list(dict.fromkeys(visible_gpus())), bundle.manifest.networks
    return {network: [plan_fields(bundle, network, gpu, runtime) for gpu in kinds] for network in networks}


class Engine:
    """A plan on one device. Its weights are there once, however many lanes use it."""

    def __init__(self, driver: Driver, device: Device, plan: bytes, name: str, trt: Any) -> None:
        self.driver, self.device, self.name = driver, device, name
        self._trt = trt
        self._messages: list[str] = []
        self._lock = threading.Lock()
        driver("cuCtxSetCurrent", device.context)
        free, total = driver("cuMemGetInfo")
        if len(plan) > free:
            raise DeviceError(
                f"{name} needs {len(plan) / 1e9:.2f} GB on {device.name} and {free / 1e9:.2f} of its "
                f"{total / 1e9:.2f} GB are free: end other programs there, or name another GPU"
            )
        self._runtime = self._trt.Runtime(make_logger(self._trt, self._messages))
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise DeviceError(
                f"TensorRT cannot load the plan of {name} on {device.name}: "
                f"{'; '.join(self._messages[-3:]) or 'it is for another GPU or version'}: "
                "free memory on the device, or build it again with `make engines`"
            )

        self._settings = self._runtime_settings()

    def _runtime_settings(self) -> Any:
        """How contexts are made: in memory of the caller's.

        TensorRT-RTX compiles kernels when a context is made: one cache for all contexts of the engine, and before the
        first run rather than behind it, or a captured graph would keep the provisional ones for ever.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._trt, "IRuntimeCache"):
            return strategy
        settings = self.engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = eager
        self._cache = settings.create_runtime_cache()
        settings.set_runtime_cache(self._cache)
        return settings

    def context(self, scratch: int, size: int) -> Any:
        """An execution context that works in the caller's memory."""
        with self._lock:  # images at the same time meet here
            context = self.engine.create_execution_context(self._settings)
        if context is None:
            raise DeviceError(f"{self.name}: TensorRT made no execution context: {'; '.join(self._messages[-3:])}")
        context.set_device_memory(scratch, size)
        return context

    def bind(
        self, scratch: int, size: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], stream: Any
    ) -> tuple[Enqueue, Any]:
        """What runs the engine on these addresses, which are set once, and its context."""
        context = self.context(scratch, size)
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tensor.shape):
                raise DeviceError(f"{self.name}: {name} cannot be of shape {tensor.shape} in this plan: build it again")
            context.set_tensor_address(name, tensor.pointer)
        for name, tensor in outputs.items():
            context.set_tensor_address(name, tensor.pointer)
        handle, execute = int(stream), context.execute_async_v3

        def enqueue() -> None:
            if not execute(handle):
                self.driver("cuMemGetInfo")  # says it when the device was lost, which TensorRT does not
                raise DeviceError(f"{self.name} failed in TensorRT: {'; '.join(self._messages[-3:])}")

        return enqueue, context

    @property
    def scratch_bytes(self) -> int:
        """How much memory one running context needs."""
        return max(int(self.engine.device_memory_size_v2), 256)


class EngineNetwork:
    """The noise predictor of one lane: the device's engine with scratch memory of this lane's own."""

    def __init__(self, engine: Engine, output: str) -> None:
        self._engine, self._output = engine, output
        self.device = engine.device.ordinal
        engine.driver("cuCtxSetCurrent", engine.device.context)
        self._scratch = int(engine.driver("cuMemAlloc", engine.scratch_bytes))
        self.capturable = True
        self._bound: dict[tuple[object, ...], Enqueue] = {}

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """See cuda.Network. Calls beyond the plan's largest batch run in parts, one after the other.

        Rounds of different samplers meet in the same addresses: those share a context.
        """
        key = (*inputs.items(), output, int(stream))
        return self._bound.get(key) or self._bound.setdefault(key, self._bind(inputs, output, stream))

    def _bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        batch, largest = output.shape[0], BATCHES[-1]
        parts = []
        for start in range(0, batch, largest):
            rows = slice(start, min(start + largest, batch))
            own = {name: _rows(tensor, rows) for name, tensor in inputs.items()}
            enqueue, context = self._engine.bind(
                self._scratch, self._engine.scratch_bytes, own, {self._output: _rows(output, rows)}, stream
            )
            if hasattr(context, "is_stream_capturable"):
                self.capturable = self.capturable and bool(context.is_stream_capturable(int(stream)))
            parts.append(enqueue)
        if len(parts) == 1:
            return parts[0]

        def run() -> None:
            for part in parts:
                part()

        return run

    def close(self) -> None:
        """Frees the scratch memory."""
        self._engine.driver("cuCtxSetCurrent", self._engine.device.context)
        self._engine.driver("cuMemFree", self._scratch)


def _rows(tensor: Tensor, rows: slice) -> Tensor:
    size = BYTES[tensor.dtype] * int(np.prod(tensor.shape[1:], dtype=np.int64))
    return Tensor(tensor.pointer + rows.start * size, (rows.stop - rows.start, *tensor.shape[1:]), tensor.dtype)


class EngineSession:
    """A network that runs once per image, from host memory to host memory.

    Memory and bindings of every shape that was met are kept. Threads take turns.
    """

    def __init__(self, engine: Engine, bundle: Bundle, network: str) -> None:
        self._engine, self._spec, self._largest = engine, bundle.manifest.networks[network], batches(network)[-1]
        self._lock = threading.Lock()
        self._freed: list[Callable[[], None]] = []
        self._bound: dict[tuple[tuple[int, ...], ...], tuple[Enqueue, dict[str, tuple[int, np.ndarray]]]] = {}
        driver = engine.driver
        driver("cuCtxSetCurrent", engine.device.context)
        self._stream, self._done = driver.stream(), driver.event()
        self._freed += [
            lambda: driver("cuEventDestroy", self._done),
            lambda: driver("cuStreamDestroy", self._stream),
        ]
        self._scratch = self._allocate(engine.scratch_bytes)

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
            self._engine.driver("cuCtxSetCurrent", self._engine.device.context)
            release(self._freed)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Array]:
        engine, driver = self._engine, self._engine.driver
        driver("cuCtxSetCurrent", engine.device.context)
        shapes = tuple(inputs[one.name].shape for one in self._spec.inputs)
        enqueue, memory = self._bound.get(shapes) or self._bound.setdefault(shapes, self._bind(shapes))
        for one in self._spec.inputs:
            pointer, host = memory[one.name]
            value = inputs[one.name]
            host[...] = narrow(value, "bfloat16") if one.dtype == "bfloat16" else value
            driver("cuMemcpyHtoDAsync", pointer, host.ctypes.data, host.nbytes, self._stream)
        enqueue()
        for one in self._spec.outputs:
            pointer, host = memory[one.name]
            driver("cuMemcpyDtoHAsync", host.ctypes.data, pointer, host.nbytes, self._stream)
        driver("cuEventRecord", self._done, self._stream)
        driver.wait(self._done, f"{engine.name} on {engine.device.name}")
        hosts = {one.name: (memory[one.name][1], one.dtype) for one in self._spec.outputs}
        return {
            name: widen(host.reshape(-1).view(np.uint8), dtype).reshape(host.shape)
            for name, (host, dtype) in hosts.items()
        }

    def _bind(self, shapes: Sequence[tuple[int, ...]]) -> tuple[Enqueue, dict[str, tuple[int, np.ndarray]]]:
        spec = self._spec
        axes = axes_of(spec.inputs, dict(zip((one.name for one in spec.inputs), shapes, strict=True)))
        memory, tensors = {}, {}
        for one in (*spec.inputs, *spec.outputs):
            shape = one.resolve(axes)
            dtype = np.dtype("uint16" if one.dtype == "bfloat16" else one.dtype)
            size = int(np.prod(shape)) * dtype.itemsize
            host, free = pinned(self._engine.driver, size)
            self._freed.append(free)
            tensors[one.name] = Tensor(self._allocate(size), shape, one.dtype)
            memory[one.name] = tensors[one.name].pointer, host.view(dtype).reshape(shape)
        goals = {one.name: tensors.pop(one.name) for one in spec.outputs}
        enqueue, _ = self._engine.bind(self._scratch, self._engine.scratch_bytes, tensors, goals, self._stream)
        return enqueue, memory

    def _allocate(self, size: int) -> int:
        pointer = int(self._engine.driver("cuMemAlloc", max(size, 256)))
        self._freed.append(lambda: self._engine.driver("cuMemFree", pointer))
        return pointer


class Engines:
    """A loaded model on GPUs: what runs once per image on the first lane's device, and the lanes."""

    def __init__(self, bundle: Bundle, lanes: Sequence[LaneSpec], driver: Driver | None = None) -> None:
        driver, runtime = driver or Driver(), lanes[0].runtime
        gpus_of(lanes)
        there = visible_gpus()
        fields = {lane.gpu: there[lane.gpu] for lane in lanes if lane.gpu is not None}
        devices = {ordinal: driver.device(ordinal) for ordinal in fields}
        home = next(iter(devices))

        def engine(network: str, ordinal: int) -> Engine:
            content = bundle.plan_content(bundle.plan(network, plan_fields(bundle, network, fields[ordinal], runtime)))
            return Engine(driver, devices[ordinal], content, network, package(runtime))

        once = [network for network in bundle.manifest.networks if network != DENOISER]
        self.runners = {network: EngineSession(engine(network, home), bundle, network) for network in once}
        denoisers = {ordinal: engine(DENOISER, ordinal) for ordinal in devices}
        output = bundle.manifest.networks[DENOISER].outputs[0]
        self._networks = [EngineNetwork(denoisers[lane.gpu], output.name) for lane in lanes if lane.gpu is not None]
        self.plan_folder = bundle.plan_folder(plan_key(plan_fields(bundle, DENOISER, fields[home], runtime)))
        dtype = output.dtype
        networks: Sequence[LaneNetwork] = self._networks
        self._siblings: list[CudaBackend] = []
        self._open = partial(CudaBackend, driver, networks, dtype, CACHE / "kernels")
        self.backend = self._open()

    def sibling(self, home: int) -> CudaBackend:
        """See load.Engines."""
        self._siblings.append(self._open(home=home, sibling_of=self.backend))
        return self._siblings[-1]

    def close(self) -> None:
        """Waits for the lanes and frees their memory."""
        for backend in (*self._siblings, self.backend):
            backend.close()
        release([network.close for network in self._networks])
        release([runner.close for runner in self.runners.values()])
