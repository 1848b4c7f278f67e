"""TensorRT: plans per kind of GPU, and lanes that run them.

One path for two packages with one API: `tensorrt` on data-centre cards, `tensorrt_rtx` on RTX cards. The second builds
plans for a named compute capability without a GPU, which is how they are built where there is none.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Array, Progress
from engines.cuda import CudaBackend, Enqueue, Tensor, narrow, pinned, widen
from engines.cuda import Network as LaneNetwork
from engines.devices import LaneSpec
from engines.driver import Device, Driver, available, release
from engines.errors import DeviceError
from engines.kernel import BYTES, CACHE
from engines.manifest import DENOISER, Manifest, axes_of
from engines.memory import require
from engines.store import Bundle, Plan, locked, plan_key

log = logging.getLogger(__name__)


BATCHES = (1, 4, 16)  # smallest, the one that kernels are chosen for, largest; larger calls run in parts
PIXEL_BATCHES = (1, 1, 1)  # of a VAE, whose memory grows with pixels: 16 pictures of 2048 × 2048 would take 69 GB
HOST_BYTES_PER_ONNX_BYTE = 3.5  # peak of a build: Stable Diffusion 1.5's UNet, 1.7 GB, takes 5.8 GB
HOST_BYTES = 1 << 29


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as far as plans depend on it."""

    name: str
    capability: tuple[int, int]
    driver: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})"


def package() -> Any:
    """`tensorrt`, or `tensorrt_rtx` where that is what is installed."""
    try:
        import tensorrt as trt
    except ImportError:
        try:
            import tensorrt_rtx as trt
        except ImportError:
            raise DeviceError(
                "TensorRT is missing: pip install --editable '.[trt]' on data-centre cards, '.[rtx]' on RTX cards, "
                "or use --devices cuda:0@onnxruntime"
            ) from None
    return trt


def runtime_name(trt: Any) -> str:
    """The package and its version, as plans record it."""
    return f"{trt.__name__} {trt.__version__}"


def gpus() -> list[Gpu]:
    """The GPUs of this machine in NVML's order, which is not CUDA's; empty where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(pynvml.nvmlDeviceGetName(h), tuple(pynvml.nvmlDeviceGetCudaComputeCapability(h)), version)
            for h in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> list[Gpu]:
    """The GPUs by their CUDA numbers, which are not NVML's: CUDA puts the fastest first, and may be told to hide some.

    The driver tells names and capabilities without opening a context; only its version is NVML's to tell.
    """
    found = gpus()
    if not found or available():
        return []
    driver = Driver()
    return [Gpu(*driver.describe(number), found[0].driver) for number in range(driver.count)]


def gpus_of(lanes: Sequence[LaneSpec]) -> list[Gpu]:
    """The distinct kinds of GPU that lanes run on; DeviceError for a GPU that is not there."""
    there = visible_gpus()
    for lane in lanes:
        if lane.gpu is None or lane.gpu >= len(there):
            number = len(there)
            has = f"this machine has cuda:0 … cuda:{number - 1}" if number else "this machine has no usable NVIDIA GPU"
            raise DeviceError(f"there is no {lane.device}: {has}; without one, use --devices cpu")
    return list(dict.fromkeys(there[lane.gpu] for lane in lanes if lane.gpu is not None))


def plan_fields(bundle: Bundle, network: str, gpu: Gpu) -> dict[str, str]:
    """Everything that the compiled form of a network depends on."""
    sizes = bundle.manifest.sizes
    return {
        "network": network,
        "onnx_sha256": bundle.manifest.networks[network].sha256,
        "precision": bundle.manifest.precision,
        "runtime": runtime_name(package()),
        "gpu": gpu.name,
        "capability": f"{gpu.capability[0]}.{gpu.capability[1]}",
        "driver": gpu.driver,
        "batches": "-".join(map(str, batches(network))),
        "sides": f"{sizes.least}-{sizes.width}x{sizes.height}-{sizes.most}",
        "flags": "strongly typed, user allocation",
    }


def batches(network: str) -> tuple[int, int, int]:
    """Rows that a plan of a network takes: the fewest, those that kernels are chosen for, the most."""
    return PIXEL_BATCHES if network.startswith("vae_") else BATCHES


# --- building --------------------------------------------------------------------------------------------------------


def build(
    bundle: Bundle, network: str, gpu: Gpu, progress: Progress | None = None, timing: Path | None = None
) -> bytes:
    """A plan of a network, whose types it keeps, for one kind of GPU and all batches and sizes of the bundle.

    With tensorrt_rtx no GPU is needed. `timing` keeps measured kernel times between builds. DeviceError when the
    network cannot be built, or when this machine has too little memory for it.
    """
    trt, spec = package(), bundle.manifest.networks[network]
    size = sum(file.bytes for file in spec.files)
    require(
        int(size * HOST_BYTES_PER_ONNX_BYTE + HOST_BYTES),
        f"building a plan of {network}",
        "copy build/ from a larger machine with the same GPU",
    )
    onnx = bundle.onnx(network)
    messages: list[str] = []
    logger = _logger(trt, messages)
    builder = trt.Builder(logger)
    graph = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(graph, logger)
    if not parser.parse_from_file(str(onnx)):
        errors = "; ".join(parser.get_error(n).desc() for n in range(parser.num_errors))
        raise DeviceError(f"TensorRT cannot read {onnx}: {errors}")
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # without it a lane may not be captured
    _target(trt, config, gpu)
    config.add_optimization_profile(_profile(builder, bundle.manifest, network))
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    cache = _timing_cache(trt, config, timing)
    plan = builder.build_serialized_network(graph, config)
    if plan is None:
        raise DeviceError(f"TensorRT cannot build {network} for {gpu}: {'; '.join(messages[-3:]) or 'it says no more'}")
    if timing is not None and cache is not None:
        _replace(timing, bytes(cache.serialize()))
    return bytes(plan)


def _logger(trt: Any, messages: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)
            log.debug("%s", message)

    return Logger()


def _target(trt: Any, config: Any, gpu: Gpu) -> None:
    """Which GPU to build for, where the package can build for others than the one that is here."""
    if not hasattr(trt, "ComputeCapability"):
        return
    capability = getattr(trt.ComputeCapability, f"SM{gpu.capability[0]}{gpu.capability[1]}", None)
    if capability is None:
        raise DeviceError(f"{runtime_name(trt)} builds no plans for {gpu}: install tensorrt instead of tensorrt_rtx")
    config.num_compute_capabilities = 1
    config.set_compute_capability(capability, 0)


def _profile(builder: Any, manifest: Manifest, network: str) -> Any:
    """The smallest, the usual and the largest shape of every input."""
    sizes, profile = manifest.sizes, builder.create_optimization_profile()
    pictures = ((sizes.least, sizes.least), (sizes.width, sizes.height), (sizes.most, sizes.most))
    several = [manifest.latent_axes(*picture, batch) for picture, batch in zip(pictures, batches(network), strict=True)]
    for one in manifest.networks[network].inputs:
        profile.set_shape(one.name, *(one.resolve(axes) for axes in several))
    return profile


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            progress(name, 0, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress(name, step + 1, self.steps[name])
            return True

        def phase_finish(self, name: str) -> None:
            progress(name, self.steps[name], self.steps.pop(name))

    return Monitor()


def _timing_cache(trt: Any, config: Any, path: Path | None) -> Any:
    if path is None or hasattr(trt, "ComputeCapability"):  # tensorrt_rtx chooses kernels without timing them
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    return cache if config.set_timing_cache(cache, False) else None


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        partial.write(content)
    os.replace(partial.name, path)


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """Builds what is missing for the lanes' kinds of GPU, once each; the new plans, or None where one was there."""
    found: dict[str, Plan | None] = {}
    there = visible_gpus()
    with locked(bundle.folder):
        for gpu in gpus_of(lanes):
            if not hasattr(package(), "ComputeCapability"):  # it builds for the GPU that is current
                driver = Driver()
                driver("cuCtxSetCurrent", driver.device(there.index(gpu)).context)
            for network in bundle.manifest.networks:
                fields = plan_fields(bundle, network, gpu)
                name = f"{network} for {gpu}"
                found[name] = None if bundle.has_intact_plan(fields) else _build_plan(bundle, network, gpu, progress)
    return found


def _build_plan(bundle: Bundle, network: str, gpu: Gpu, progress: Progress | None) -> Plan:
    start = time.perf_counter()
    fields = plan_fields(bundle, network, gpu)
    timing = CACHE / "timing" / f"{plan_key({name: fields[name] for name in ('runtime', 'gpu', 'driver')})}.cache"
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=bundle.folder.parent) as scratch:
        target = Path(scratch) / f"{network}.plan"
        target.write_bytes(build(bundle, network, gpu, progress, timing))
        return bundle.add_plan(network, fields, [target], time.perf_counter() - start)


# --- running ---------------------------------------------------------------------------------------------------------


class Engine:
    """A plan on one device. Its weights are there once, however many lanes use it."""

    def __init__(self, driver: Driver, device: Device, plan: bytes, name: str) -> None:
        self.driver, self.device, self.name = driver, device, name
        self._trt = package()
        self._messages: list[str] = []
        self._lock = threading.Lock()
        driver("cuCtxSetCurrent", device.context)
        free, total = driver("cuMemGetInfo")
        if len(plan) > free:
            raise DeviceError(
                f"{name} needs {len(plan) / 1e9:.2f} GB on {device.name} and {free / 1e9:.2f} of its "
                f"{total / 1e9:.2f} GB are free: end other programs there, or name another GPU"
            )
        self._runtime = self._trt.Runtime(_logger(self._trt, self._messages))
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
        with self._lock:  # pictures at the same time meet here
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
        driver = driver or Driver()
        gpus_of(lanes)
        there = visible_gpus()
        fields = {lane.gpu: there[lane.gpu] for lane in lanes if lane.gpu is not None}
        devices = {ordinal: driver.device(ordinal) for ordinal in fields}
        home = next(iter(devices))

        def engine(network: str, ordinal: int) -> Engine:
            content = bundle.plan_content(bundle.plan(network, plan_fields(bundle, network, fields[ordinal])))
            return Engine(driver, devices[ordinal], content, network)

        once = [network for network in bundle.manifest.networks if network != DENOISER]
        self.runners = {network: EngineSession(engine(network, home), bundle, network) for network in once}
        denoisers = {ordinal: engine(DENOISER, ordinal) for ordinal in devices}
        output = bundle.manifest.networks[DENOISER].outputs[0]
        self._networks = [EngineNetwork(denoisers[lane.gpu], output.name) for lane in lanes if lane.gpu is not None]
        self.plan_folder = bundle.plan_folder(plan_key(plan_fields(bundle, DENOISER, fields[home])))
        dtype = output.dtype
        networks: Sequence[LaneNetwork] = self._networks
        self._beside: list[CudaBackend] = []
        self._open = partial(CudaBackend, driver, networks, dtype, CACHE / "kernels")
        self.backend = self._open()

    def beside(self, home: int) -> CudaBackend:
        """See load.Engines."""
        self._beside.append(self._open(home=home, beside=self.backend))
        return self._beside[-1]

    def close(self) -> None:
        """Waits for the lanes and frees their memory."""
        for backend in (*self._beside, self.backend):
            backend.close()
        release([network.close for network in self._networks])
        release([runner.close for runner in self.runners.values()])
