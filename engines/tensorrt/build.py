"""Compiles ONNX networks to TensorRT plans."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engines.base import Progress
from engines.cuda.driver import Driver
from engines.cuda.kernels import CACHE
from engines.devices import LaneSpec
from engines.errors import DeviceError
from engines.files import written_whole
from engines.manifest import DENOISER, Manifest
from engines.memory import require
from engines.nvidia import Gpu, gpus_of, visible_gpus
from engines.store import Bundle, Plan, locked, plan_key
from engines.tensorrt.budget import Budget
from engines.tensorrt.plan import batches, package, plan_fields, runtime_name

log = logging.getLogger(__name__)
HOST_BYTES_PER_ONNX_BYTE = 3.5  # peak of a build: Stable Diffusion 1.5's UNet, 1.7 GB, takes 5.8 GB
HOST_BYTES = 1 << 29


def build(
    bundle: Bundle, network: str, gpu: Gpu, runtime: str, progress: Progress | None = None, timing: Path | None = None
) -> bytes:
    """A plan of a network, whose types it keeps, for one kind of GPU and all batches and sizes of the bundle.

    With tensorrt_rtx no GPU is needed. `timing` keeps measured kernel times between builds. DeviceError when the
    network cannot be built, or when this machine has too little memory for it.
    """
    trt, spec = package(runtime), bundle.manifest.networks[network]
    size = sum(file.bytes for file in spec.files)
    require(
        int(size * HOST_BYTES_PER_ONNX_BYTE + HOST_BYTES),
        f"building a plan of {network}",
        "copy build/ from a larger machine with the same GPU",
    )
    onnx = bundle.onnx(network)
    messages: list[str] = []
    logger = make_logger(trt, messages)
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
        timing.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(timing) as partial:
            partial.write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def make_logger(trt: Any, messages: list[str]) -> Any:
    """TensorRT's logger: errors into `messages`, everything into our log."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)
            log.debug("%s", message)

    return Logger()


def _names(trt: Any, gpu: Gpu) -> bool:
    """Whether the package can build for a kind of GPU wherever it runs, as tensorrt_rtx can for those that it names."""
    return hasattr(getattr(trt, "ComputeCapability", None), f"SM{gpu.capability[0]}{gpu.capability[1]}")


def unfit(trt: Any, gpu: Gpu) -> str | None:
    """Why no plan of a package runs on a kind of GPU, or None.

    tensorrt_rtx builds for any card and loads plans on those that it names and on later ones: an H100 (9.0) had to hear
    "supported compute capabilities: 8.0 8.6 8.9 12.0 12.1 >12.0".
    """
    if not hasattr(trt, "ComputeCapability") or _names(trt, gpu):
        return None
    named = [int(name[2:]) for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    if 10 * gpu.capability[0] + gpu.capability[1] > max(named):
        return None
    return f"{runtime_name(trt)} runs no plans on {gpu}: install tensorrt instead, pip install --editable '.[trt]'"


def _target(trt: Any, config: Any, gpu: Gpu) -> None:
    """Which GPU to build for. Of one that tensorrt_rtx does not name it may know enough where it finds one itself."""
    if not hasattr(trt, "ComputeCapability"):
        return
    if reason := unfit(trt, gpu):
        raise DeviceError(reason)
    if not _names(trt, gpu) and gpu not in visible_gpus():
        raise DeviceError(
            f"{runtime_name(trt)} builds no plans for {gpu} on another machine: build on one that has it, "
            "or install tensorrt instead of tensorrt_rtx"
        )
    name = f"SM{gpu.capability[0]}{gpu.capability[1]}" if _names(trt, gpu) else "CURRENT"
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)


def _profile(builder: Any, manifest: Manifest, network: str) -> Any:
    """The smallest, the usual and the largest shape of every input."""
    sizes, profile = manifest.sizes, builder.create_optimization_profile()
    images = ((sizes.least, sizes.least), (sizes.width, sizes.height), (sizes.most, sizes.most))
    several = [manifest.latent_axes(*image, batch) for image, batch in zip(images, batches(network), strict=True)]
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


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """Builds what is missing for the lanes' kinds of GPU, once each; the new plans, or None where one was there."""
    found: dict[str, Plan | None] = {}
    there, runtime = visible_gpus(), lanes[0].runtime
    gpus, networks = gpus_of(lanes), bundle.manifest.usual
    with locked(bundle.folder), ExitStack() as opened:
        fields = {(network, gpu): plan_fields(bundle, network, gpu, runtime) for gpu in gpus for network in networks}
        there_already = {key: bundle.has_intact_plan(one) for key, one in fields.items()}
        if not all(there_already.values()):
            _estimate(bundle, lanes)
        for gpu in gpus:
            if not _names(package(runtime), gpu):  # it builds for the GPU that is current
                driver = Driver()
                opened.callback(driver.close)
                driver("cuCtxSetCurrent", driver.device(there.index(gpu)).context)
            for network in networks:
                built = None if there_already[network, gpu] else _build_plan(bundle, network, gpu, runtime, progress)
                found[f"{network} for {gpu}"] = built
    return found


def _estimate(bundle: Bundle, lanes: Sequence[LaneSpec]) -> None:
    """What a start on these lanes will need at least; DeviceError where compiling would be for nothing."""
    ordinals, driver = [lane.gpu for lane in lanes if lane.gpu is not None], Driver()
    try:
        budget = Budget(driver, {ordinal: driver.device(ordinal) for ordinal in dict.fromkeys(ordinals)})
        for network in bundle.manifest.usual:
            spec = bundle.manifest.networks[network]
            for ordinal in dict.fromkeys(ordinals if network == DENOISER else ordinals[:1]):
                budget.add(ordinal, f"weights of {network}", sum(file.bytes for file in spec.files))
        budget.add_latents(bundle.manifest, ordinals)
        budget.estimate("use a smaller model or precision, or another GPU")
    finally:
        driver.close()


def _build_plan(bundle: Bundle, network: str, gpu: Gpu, runtime: str, progress: Progress | None) -> Plan:
    start = time.perf_counter()
    fields = plan_fields(bundle, network, gpu, runtime)
    timing = CACHE / "timing" / f"{plan_key({name: fields[name] for name in ('runtime', 'gpu', 'driver')})}.cache"
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=bundle.folder.parent) as scratch:
        target = Path(scratch) / f"{network}.plan"
        target.write_bytes(build(bundle, network, gpu, runtime, progress, timing))
        return bundle.add_plan(network, fields, [target], time.perf_counter() - start)
