"""`python -m bench gpu`: every part of the CUDA path tested and measured on this machine's GPUs, without network.

Each part ends as passed, failed, or not possible here and why. `make gpu-check` runs all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from bench.torch_lane import TorchNetwork
from engines.base import Array, Backend
from engines.cuda.backend import CudaBackend, Enqueue, Tensor, narrow, widen
from engines.cuda.driver import Driver, available
from engines.cuda.kernels import BLOCK, BYTES, CACHE, Combination, Kernels, combination
from engines.errors import EngineError
from engines.host import FunctionLane, HostBackend
from runtime.sampling.execute import denoise
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import schedule_from_config

PACKAGES = (
    "cuda-python", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-ml-py", "tensorrt", "tensorrt-rtx", "torch",
    "diffusers", "onnxruntime", "onnxruntime-gpu", "numpy",
)  # fmt: skip
SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 26)
SHAPES = ((1, 4), (5, 1), (11, 5))  # inputs, outputs: draft, refine, both with guidance; k = 4
STABLE_DIFFUSION = {
    "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000,
}  # fmt: skip
STEPS, GUIDANCE, REPEATS, IN_A_ROW = 50, 7.5, 7, 20
MODES: tuple[tuple[str, Options], ...] = (
    ("sequential", Options(k=1)),
    ("conservative", Options(k=4, drafts="corrected")),
    ("aggressive", Options(k=4, drafts="corrected")),
    ("srds", Options(k=4, iterations=1)),
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4], help="numbers of lanes on the first GPU")


def measure(lanes: Sequence[int]) -> list[dict[str, Any]]:
    """One row per part; lines are shown as they are found."""
    return gpu(lanes, lambda line: print(line, flush=True))  # noqa: T201


class NotPossibleError(Exception):
    """A part that this machine has no means for."""


@dataclass
class Check:
    """The parts that ran, as rows of the result file; `show` gets a line for everything that is found."""

    show: Callable[[str], None]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def part(self, name: str, work: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """Runs one part; what it yields before an error stays."""
        start, figures = time.perf_counter(), []
        status, reason = "passed", ""
        try:
            for row in work():
                figures.append(row)
                self.show("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()))
        except NotPossibleError as error:
            status, reason = "not possible here", str(error)
        except Exception as error:  # noqa: BLE001 - the report of the other parts must not be lost
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            status, reason = "failed", f"{type(error).__name__} at {where}: {error}"
        seconds = round(time.perf_counter() - start, 1)
        self.rows.append({"part": name, "status": status, "reason": reason, "seconds": seconds, "figures": figures})
        self.show(f"{name}: {status}{f' ({reason})' if reason else ''}, {seconds:g} s")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def gpu(
    lanes: Sequence[int], show: Callable[[str], None], cache: Path = CACHE / "kernels", driver: Driver | None = None
) -> list[dict[str, Any]]:
    """Every part on this machine's GPUs, as rows with their status and figures."""
    check = Check(show)
    check.part("installed", _installed)
    reason = None if driver else available()
    if driver is None and reason is None:
        try:
            driver = Driver()
        except EngineError as error:
            reason = str(error)

    def need(work: Callable[[Driver], Iterator[dict[str, Any]]]) -> Callable[[], Iterator[dict[str, Any]]]:
        def run() -> Iterator[dict[str, Any]]:
            if driver is None:
                raise NotPossibleError(reason)
            yield from work(driver)

        return run

    parts: dict[str, Callable[[Driver], Iterator[dict[str, Any]]]] = {
        "kernel correctness": lambda d: _correct(d, cache),
        "kernel bandwidth": lambda d: _bandwidth(d, cache),
        "peer copies": lambda d: _pairs(d, cache),
        "engine overhead": lambda d: _overhead(d, cache, lanes),
        "shapes on PyTorch lanes": lambda d: _torch(d, cache, lanes, _shapes_unet, 16, "float32"),
        "SD 1.5-shaped UNet on PyTorch lanes": lambda d: _torch(d, cache, lanes, _large_unet, 64, "float16"),
        "shapes on TensorRT": lambda d: _pipeline("tensorrt", lanes),
        "shapes on ONNX Runtime": lambda d: _pipeline("onnxruntime", lanes),
    }
    for name, work in parts.items():
        check.part(name, need(work))
    return check.rows


def _installed() -> Iterator[dict[str, Any]]:
    for package in PACKAGES:
        try:
            yield {"package": package, "version": version(package)}
        except PackageNotFoundError:
            yield {"package": package, "version": "missing"}
    from engines.nvidia import gpus

    for number, one in enumerate(gpus()):
        yield {"gpu": number, "name": one.name, "capability": list(one.capability), "driver": one.driver}


# --- the kernel ------------------------------------------------------------------------------------------------------


class Bench:
    """Memory, a stream and the kernels of one type on the first GPU."""

    def __init__(self, driver: Driver, cache: Path, dtype: str) -> None:
        self.driver, self.dtype, self.device = driver, dtype, driver.device(0)
        driver("cuCtxSetCurrent", self.device.context)
        self.kernels = Kernels(driver, self.device, dtype, cache)
        self.stream = driver.stream()
        self.started, self.ended = driver.event(timing=True), driver.event(timing=True)
        self.allocated: list[int] = []
        self.table, self.small = self.allocate(1 << 16), self.allocate(256)
        self.driver("cuMemsetD32Async", self.small, 0, 64, self.stream)

    def allocate(self, size: int) -> int:
        """Device memory that `close` frees."""
        self.allocated.append(int(self.driver("cuMemAlloc", size)))
        return self.allocated[-1]

    def close(self) -> None:
        """Frees everything."""
        self.settle()
        for pointer in self.allocated:
            self.driver("cuMemFree", pointer)
        self.driver("cuStreamDestroy", self.stream)

    def settle(self) -> None:
        """Waits for the stream."""
        self.driver("cuEventRecord", self.ended, self.stream)
        self.driver.wait(self.ended, "the benchmark")

    def to_device(self, pointer: int, value: Any) -> None:
        """Copies an array there."""
        self.driver("cuMemcpyHtoDAsync", pointer, value.ctypes.data, value.nbytes, self.stream)
        self.settle()

    def to_host(self, pointer: int, size: int) -> Any:
        """Copies bytes back."""
        value = np.empty(size, np.uint8)
        self.driver("cuMemcpyDtoHAsync", value.ctypes.data, pointer, size, self.stream)
        self.settle()
        return value

    def prepared(self, inputs: Sequence[int], outputs: Sequence[int], elements: int) -> tuple[Any, int, Combination]:
        """What `launch` takes for a combination of pointers, with the coefficients that are in `table`."""
        parameters = combination(inputs, [[one] for one in outputs], elements)
        parameters.data, parameters.round, parameters.not_finite = self.table, self.small, self.small + 4
        return (*self.kernels.combination(parameters, len(outputs)), parameters)

    def launch(self, function: Any, grid: int, parameters: Combination) -> None:
        """One combination."""
        self.driver.launch(function, grid, BLOCK, self.stream, [parameters])

    def copy(self, target: int, source: int, size: int) -> None:
        """Bytes from pointer to pointer."""
        self.driver("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def empty(self) -> None:
        """The smallest kernel that there is."""
        parameters = [ctypes.c_void_p(self.small), ctypes.c_uint(1)]
        self.driver.launch(self.kernels.function("advance"), 1, 1, self.stream, parameters)

    def seconds(self, work: Callable[..., None], *arguments: Any, repeats: int = 20) -> float:
        """Median device seconds of a piece of work, between two events around a graph with many of it.

        Between events alone a small launch would be as long as the host takes to ask for it.
        """
        found = []
        work(*arguments)  # loads what is loaded late
        self.settle()

        def many() -> None:
            for _ in range(IN_A_ROW):
                work(*arguments)

        graph = self.driver.capture(self.stream, many)
        for _ in range(repeats + 2):
            self.driver("cuEventRecord", self.started, self.stream)
            self.driver("cuGraphLaunch", graph, self.stream)
            self.settle()
            found.append(self.driver("cuEventElapsedTime", self.started, self.ended) / 1e3 / IN_A_ROW)
        self.driver("cuGraphExecDestroy", graph)
        return float(np.median(found[2:]))


def _correct(driver: Driver, cache: Path) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng()
    for dtype in BYTES:
        bench, worst = Bench(driver, cache, dtype), 0.0
        epsilon = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}[dtype]
        for elements, inputs, outputs in ((1, 2, 1), (31, 3, 4), (257, 11, 5), (16384, 36, 17), (16387, 67, 33)):
            values = rng.standard_normal((inputs, elements), np.float32)
            size = elements * BYTES[dtype]
            pointers = [bench.allocate(size) for _ in range(max(inputs, outputs))]
            raw = [narrow(value, dtype) for value in values]
            for pointer, value in zip(pointers, raw, strict=False):
                bench.to_device(pointer, value)
            rows = rng.standard_normal((outputs, inputs)).astype(np.float32)
            bench.to_device(bench.table, np.ascontiguousarray(rows.T))
            function, grid, parameters = bench.prepared(pointers[:inputs], pointers[:outputs], elements)
            bench.launch(function, grid, parameters)
            bench.settle()
            stored = np.stack([widen(one.view(np.uint8), dtype) for one in raw]).astype(np.float64)
            wanted = rows.astype(np.float64) @ stored
            got = np.stack([widen(bench.to_host(pointer, size), dtype) for pointer in pointers[:outputs]])
            bound = 1.01 * epsilon * np.abs(wanted) + inputs * 2**-23 * (np.abs(rows) @ np.abs(stored)) + 1e-7
            worst = max(worst, float((np.abs(got - wanted) / bound).max()))
        flag = int(bench.to_host(bench.small + 4, 4).view(np.uint32)[0])
        yield {"dtype": dtype, "error_over_bound": worst, "flag": flag}
        assert worst <= 1 and not flag, f"{dtype}: the kernel is wrong by {worst:.3g} times what rounding explains"
        bench.close()


def _bandwidth(driver: Driver, cache: Path) -> Iterator[dict[str, Any]]:
    for dtype in ("float16", "float32"):
        bench, size = Bench(driver, cache, dtype), BYTES[dtype]
        for elements in SIZES:
            pointers = [bench.allocate(elements * size) for _ in range(16)]
            for number, pointer in enumerate(pointers):
                driver("cuMemsetD8Async", pointer, 0x31 + number, elements * size, bench.stream)
            copied = 2 * elements * size / bench.seconds(bench.copy, pointers[0], pointers[1], elements * size)
            empty = bench.seconds(bench.empty)
            for inputs, outputs in SHAPES:
                prepared = bench.prepared(pointers[:inputs], pointers[inputs : inputs + outputs], elements)
                seconds = bench.seconds(bench.launch, *prepared)
                rate = (inputs + outputs) * elements * size / seconds
                yield {
                    "dtype": dtype, "elements": elements, "shape": f"{inputs}→{outputs}", "us": seconds * 1e6,
                    "gb_per_s": rate / 1e9, "of_copy": rate / copied, "of_empty_launch": seconds / empty,
                }  # fmt: skip
            bench.settle()
            for pointer in pointers:
                driver("cuMemFree", pointer)
                bench.allocated.remove(pointer)
        bench.close()


def _pairs(driver: Driver, cache: Path) -> Iterator[dict[str, Any]]:
    if driver.count < 2:
        raise NotPossibleError("this machine has one GPU")
    backend = CudaBackend(driver, [CopyNetwork(driver, n) for n in range(driver.count)], "float16", cache)
    for of in range(driver.count):
        for to in range(driver.count):
            if of != to:
                yield {"from": of, "to": to, "copies": "staged" if (of, to) in backend.measurements.staged else "peer"}
    backend.close()


# --- the engine ------------------------------------------------------------------------------------------------------


class CopyNetwork:
    """Predicts its input: a model that costs one small copy, so that what is left is this engine."""

    capturable = True

    def __init__(self, driver: Driver, device: int) -> None:
        self.driver, self.device = driver, device

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """See cuda.Network."""
        source, size = inputs["sample"].pointer, int(np.prod(output.shape)) * BYTES[output.dtype]
        return lambda: self.driver("cuMemcpyDtoDAsync", output.pointer, source, size, stream)


def schedule(steps: int) -> Schedule:
    """Stable Diffusion's schedule under DDIM."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return schedule_from_config(STABLE_DIFFUSION, alphas.tolist(), steps)


def _image(
    backend: Backend, shape: tuple[int, ...], words: Array, mode: str, options: Options, steps: int = STEPS
) -> tuple[Array, int, float]:
    """The latents of one image, its rounds, and its seconds from the first write to the last read."""
    noise = np.random.default_rng(1).standard_normal(shape, np.float32)
    conditioning = [{"encoder_hidden_states": branch[None]} for branch in words]
    plan, start = schedule(steps), time.perf_counter()
    latents, counts = denoise(
        backend,
        noise * np.float32(plan.init_noise_sigma),
        conditioning,
        plan,
        mode,
        options,
        GUIDANCE,
        0,
        lambda step: None,
    )
    return latents, counts.rounds, time.perf_counter() - start


def _distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _overhead(driver: Driver, cache: Path, lanes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Microseconds per round beside the model, by graphs and by streams, at the latents of SD 1.5 and SDXL."""
    words = np.zeros((2, 1, 1), np.float32)
    for side in (64, 128):
        shape = (1, 4, side, side)
        host = HostBackend([FunctionLane(lambda sample, timestep, conditioning: sample)])
        wanted = {mode: _image(host, shape, words, mode, options)[0] for mode, options in MODES}
        host.close()
        for count in lanes:
            for graphs in (True, False):
                networks = [CopyNetwork(driver, 0) for _ in range(count)]
                backend = CudaBackend(driver, networks, "float32", cache, graphs=graphs)
                for mode, options in MODES:
                    seconds = []
                    for _ in range(REPEATS + 2):
                        latents, rounds, taken = _image(backend, shape, words, mode, options)
                        seconds.append(taken)
                    off = _distance(latents, wanted[mode])
                    yield {
                        "latent": side, "lanes": count, "graphs": graphs, "mode": mode, "rounds": rounds,
                        "us_per_round": float(np.median(seconds[2:])) / rounds * 1e6, "distance_to_cpu": off,
                    }  # fmt: skip
                    assert off < 1e-4, f"{mode} on {count} lanes is {off:.3g} away from the CPU backend"
                backend.close()


def _shapes_unet() -> tuple[Any, Array]:
    from diffusers import UNet2DConditionModel

    folder = Path(__file__).resolve().parent.parent / "export" / "shapes" / "model" / "unet"
    words = np.random.default_rng(2).standard_normal((2, 32, 128), np.float32)
    return UNet2DConditionModel.from_pretrained(folder), words


def _large_unet() -> tuple[Any, Array]:
    """Stable Diffusion 1.5's architecture with random weights."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return unet, np.random.default_rng(2).standard_normal((2, 77, 768), np.float32)


def _torch(
    driver: Driver, cache: Path, lanes: Sequence[int], make: Callable[[], tuple[Any, Array]], side: int, dtype: str
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Each sampler's seconds on lanes of one card, side by side, and the distance to the CPU backend."""
    try:
        import torch

        torch.manual_seed(0)
        unet, words = make()
    except ImportError as error:
        raise NotPossibleError(f"{error.name} is missing") from None
    if not torch.cuda.is_available():
        raise NotPossibleError("this PyTorch has no CUDA")
    shape, unet = (1, 4, side, side), unet.eval().requires_grad_(requires_grad=False)
    wanted = {}
    if dtype == "float32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

        def on_cpu(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
            inputs = (sample, timestep, conditioning["encoder_hidden_states"])
            return np.asarray(unet(*(torch.from_numpy(np.array(one)) for one in inputs)).sample.numpy())

        host = HostBackend([FunctionLane(on_cpu)])
        wanted = {mode: _image(host, shape, words, mode, options)[0] for mode, options in MODES}
        host.close()
    unet = unet.to("cuda:0", getattr(torch, dtype))

    def model(sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return unet(sample, timestep, encoder_hidden_states).sample

    baseline = 0.0
    for count in lanes:
        backend = CudaBackend(driver, [TorchNetwork(model, 0) for _ in range(count)], dtype, cache)
        taken: dict[str, list[float]] = {mode: [] for mode, _ in MODES}
        rounds, latents = {}, {}
        for _ in range(REPEATS + 1):  # interleaved: a clock that drifts hits all alike
            for mode, options in MODES:
                latents[mode], rounds[mode], seconds = _image(backend, shape, words, mode, options)
                taken[mode].append(seconds)
        for mode, _ in MODES:
            median = float(np.median(taken[mode][1:]))
            baseline = baseline or median
            row: dict[str, Any] = {
                "lanes": count, "mode": mode, "k": dict(MODES)[mode].k, "rounds": rounds[mode], "seconds": median,
                "speedup": baseline / median, "drift": _distance(latents[mode], latents["sequential"]),
            }  # fmt: skip
            if wanted:
                row["distance_to_cpu"] = _distance(latents[mode], wanted[mode])
                yield row
                assert row["distance_to_cpu"] < 5e-2, f"{mode} on {count} lanes differs from the CPU backend"
            else:
                yield row
        backend.close()


def onnxruntime_providers() -> Sequence[str]:
    """What the installed ONNX Runtime was built with; nothing without one."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    return list(onnxruntime.get_available_providers())


def _pipeline(runtime: str, lanes: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The embedded model end to end, from the exported bundle."""
    from engines.devices import parse_devices
    from engines.load import build_missing
    from engines.runtimes import RUNTIMES, default_runtime
    from engines.store import BUILD, Bundle
    from runtime.pipeline import Pipeline

    suffix = "@onnxruntime" if runtime == "onnxruntime" else ""
    if runtime == "onnxruntime" and "CUDAExecutionProvider" not in onnxruntime_providers():
        raise NotPossibleError("ONNX Runtime is not installed with CUDA here")
    if runtime == "tensorrt" and not RUNTIMES[default_runtime("cuda")].installed:
        raise NotPossibleError("TensorRT is not installed")
    try:
        bundle = Bundle.open("shapes", BUILD, "fp16")
    except EngineError as error:
        raise NotPossibleError(str(error)) from None
    build_missing(bundle, parse_devices(f"cuda:0{suffix}"))
    for count in lanes:
        pipeline = Pipeline.load("shapes", f"cuda:0{suffix}*{count}")
        for mode, options in MODES:
            seconds = []
            for _ in range(REPEATS + 2):
                result = pipeline.generate(
                    "a large red star at the left on blue background", mode=mode, k=options.k, seed=0
                )
                seconds.append(result.report.seconds["denoise"])
            median = float(np.median(seconds[2:]))
            yield {"lanes": count, "mode": mode, "rounds": result.report.rounds, "seconds": median}
        pipeline.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per part."""
    lines = [f"{row['part']:<40} {row['status']}{': ' + row['reason'] if row['reason'] else ''}" for row in rows]
    return "\n".join(lines)
