"""OpenVINO on CPU cores: plans with static shapes, and lanes that share the weights of one compiled model.

A network that lanes run is compiled once per number of rows in `batches`, for the model's own size: static shapes are a
quarter to a third faster than dynamic ones. A call of another number of rows runs in parts, and images of another size
on a plan with dynamic shapes. What runs once per image has only that. Opening a plan takes longer than all else when a
model is loaded: the one for a row is opened then, the others when the first call needs them.

Every lane is a stream of the compiled model: weights are in memory once, and a stream has its lane's threads. Streams
are not pinned to cores: on two cores that gained nothing, and two processes would sit on the same ones.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.base import Array, Progress
from engines.batches import Run
from engines.devices import LaneSpec, cores, machine
from engines.errors import BundleError, DeviceError
from engines.host import CLOSED, HostBackend
from engines.manifest import DENOISER, Manifest, Network, Parity, TensorSpec
from engines.memory import give_back, have_room
from engines.process import Owner
from engines.runtimes import RUNTIMES
from engines.store import Bundle, Plan, locked, plan_key

if TYPE_CHECKING:
    import openvino

KEY = "openvino"
BATCHES = (1, 2, 4, 8)
LARGE = 1 << 30  # bytes of weights above which they are in memory once, not once per number of rows
BOUNDS = {"fp32": 1e-4, "bf16": 1e-1}  # as for exports
HINTS = {"fp32": "f32", "bf16": "bf16"}  # always said: by itself OpenVINO takes bf16 where the processor has it


@dataclass(frozen=True)
class Shape:
    """What a plan is compiled for: so many rows of the model's own size, or anything."""

    rows: int | None

    def __str__(self) -> str:
        return "dynamic" if self.rows is None else f"static, batch {self.rows}"


DYNAMIC = Shape(None)


def trouble() -> str | None:
    """See load.RuntimeModule."""
    if RUNTIMES[KEY].installed:
        return None
    return "OpenVINO is not installed (pip install --editable '.[openvino]')"


def batches(network: Network) -> tuple[int, ...]:
    """The numbers of rows that a network is compiled for."""
    return BATCHES if sum(file.bytes for file in network.files) < LARGE else BATCHES[:1]


def parts(rows: int, compiled: Sequence[int]) -> list[int]:
    """A call's rows as calls of plans that there are, the largest first."""
    found = []
    for size in sorted(compiled, reverse=True):
        found += [size] * (rows // size)
        rows %= size
    return found


def shapes(bundle: Bundle, network: str) -> tuple[Shape, ...]:
    """The plans of a network."""
    static = batches(bundle.manifest.networks[network]) if network == DENOISER else ()
    return (*map(Shape, static), DYNAMIC)


def plan_fields(bundle: Bundle, network: str, shape: Shape, precision: str) -> dict[str, str]:
    """Everything that the compiled form of a network depends on; what runs once per image stays in fp32."""
    sizes = bundle.manifest.sizes
    return {
        "network": network,
        "onnx_sha256": bundle.manifest.networks[network].sha256,
        "precision": precision if network == DENOISER else "fp32",
        "runtime": f"openvino {_version()}",
        "shapes": str(shape) if shape == DYNAMIC else f"{shape}, {sizes.width}x{sizes.height}",
        "machine": machine(),
    }


@cache
def _version() -> str:
    return version("openvino")  # reads a file each time, and plans are named dozens of times


def wanted(bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
    """See load.RuntimeModule."""
    found: dict[str, list[dict[str, str]]] = {}
    for network in bundle.manifest.usual:
        kinds = RUNTIMES[KEY].precisions if network == DENOISER else ("fp32",)
        found[network] = [
            plan_fields(bundle, network, shape, kind) for kind in kinds for shape in shapes(bundle, network)
        ]
    return found


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """See load.RuntimeModule. A plan serves any number of lanes."""
    precision = lanes[0].precision
    _check(precision)
    todo = [(network, shape) for network in bundle.manifest.usual for shape in shapes(bundle, network)]
    found: dict[str, Plan | None] = {}
    with locked(bundle.folder):
        for done, (network, shape) in enumerate(todo):
            if progress is not None:
                progress("compile", done, len(todo))
            there = bundle.has_intact_plan(plan_fields(bundle, network, shape, precision))
            made = None if there else build_plan(bundle, network, shape, precision)
            found[network if shape == DYNAMIC else f"{network} ({shape})"] = made
    return found


def build_plan(bundle: Bundle, network: str, shape: Shape, precision: str) -> Plan:
    """Compiles one network for this processor, holds it against ONNX Runtime on random inputs, and stores it."""
    start = time.perf_counter()
    source, spec = bundle.onnx(network), bundle.manifest.networks[network]
    fields = plan_fields(bundle, network, shape, precision)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=bundle.folder.parent) as scratch:
        target = Path(scratch) / f"{network}.blob"
        try:
            axes = None if shape.rows is None else _axes(bundle.manifest, shape.rows)
            static = None if axes is None else {one.name: one.resolve(axes) for one in spec.inputs}
            compiled = compile_network(source, static, fields["precision"], cores())
            with target.open("wb") as file:
                file.write(compiled.export_model().getbuffer())
        except Exception as error:  # the library raises many types of its own
            raise BundleError(
                f"{source} cannot be compiled by OpenVINO ({_line(error)}): see that the disk is not full, "
                f"or {bundle.repair}"
            ) from error
        seconds = time.perf_counter() - start
        parity = measure_parity(source, spec, bundle.manifest, shape, compiled, BOUNDS[fields["precision"]])
        return bundle.add_plan(network, fields, [target], seconds, parity)


def compile_network(
    source: Path, static: Mapping[str, Sequence[int]] | None, precision: str, threads: int
) -> openvino.CompiledModel:
    """An ONNX file for calls one at a time; `static` has the shapes of all inputs, without it they are dynamic."""
    core = _core()
    model = core.read_model(source)
    if static is not None:
        model.reshape({name: list(shape) for name, shape in static.items()})
    return core.compile_model(model, "CPU", _options(precision, 1, threads))


def measure_parity(
    source: Path, spec: Network, manifest: Manifest, shape: Shape, compiled: openvino.CompiledModel, bound: float
) -> Parity:  # fmt: skip
    """OpenVINO against ONNX Runtime, whose difference from torch the manifest has, on random inputs.

    BundleError when they are further apart than `bound`, by the scale of an output.
    """
    try:
        import onnxruntime
    except ImportError:
        raise DeviceError(
            "a new plan is held against ONNX Runtime, which is not installed: pip install --editable '.[cpu]'"
        ) from None

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    rows = (1, 3) if shape.rows is None else (shape.rows,)
    worst = largest = 0.0
    for count in rows:
        inputs = _random_inputs(spec, manifest, count)
        expected = session.run(None, inputs)
        actual = compiled.create_infer_request().infer(inputs)
        for output, reference in zip(spec.outputs, expected, strict=True):
            error = float(np.abs(actual[output.name] - reference).max())
            if not np.isfinite(error):
                raise BundleError(f"{source} gives NaN or infinity in OpenVINO or in ONNX Runtime")
            worst, largest = max(worst, error / float(np.abs(reference).max())), max(largest, error)
    if worst > bound:
        raise BundleError(
            f"{source} compiled by OpenVINO ({shape}) differs from ONNX Runtime by {worst:.1e} of the output's scale, "
            f"more than {bound:g}: use --devices cpu@onnxruntime"
        )
    return Parity(relative_error=worst, max_abs_error=largest, bound=bound, batches=rows)


def _random_inputs(spec: Network, manifest: Manifest, rows: int) -> dict[str, np.ndarray]:
    """Noise, timesteps, and tokens of the vocabulary below its end-of-text token."""
    rng, axes = np.random.default_rng(), _axes(manifest, rows)
    most = {one.input: max(one.eos_token_id, one.pad_token_id, 1) for one in manifest.tokenizers}

    def values(one: TensorSpec) -> np.ndarray:
        shape = one.resolve(axes)
        if one.dtype.startswith("int"):
            return rng.integers(0, most.get(one.name, manifest.clip_skip), shape, np.dtype(one.dtype), endpoint=True)
        noise = rng.uniform(0, 1000, shape) if one.name == "timestep" else rng.standard_normal(shape)
        return noise.astype(one.dtype)

    return {one.name: values(one) for one in spec.inputs}


class Compiled:
    """The plans of one network that are open, with a stream per lane."""

    def __init__(self, bundle: Bundle, network: str, precision: str, streams: int, threads: int) -> None:
        self.network, self.spec = network, bundle.manifest.networks[network]
        self._bundle, self._precision, self._options = bundle, precision, _options(precision, streams, threads)
        axes = _axes(bundle.manifest, 1)
        self._own = {one.name: one.resolve(axes)[1:] for one in self.spec.inputs}
        self._opening, self._owner = threading.Lock(), Owner()
        self._plans = {shape: bundle.plan(network, self.fields(shape)) for shape in shapes(bundle, network)}
        self._open: dict[Shape, openvino.CompiledModel] | None = {}
        self._pages: list[np.ndarray] = []  # of plans' files: calls read weights there, as long as there are calls

    def fields(self, shape: Shape) -> dict[str, str]:
        """Those of a plan of it."""
        return plan_fields(self._bundle, self.network, shape, self._precision)

    def open(self, shape: Shape) -> openvino.CompiledModel:
        """A plan, opened when it is asked for the first time; BundleError when its file was altered."""
        with self._opening:
            if self._open is None:
                raise DeviceError(CLOSED)
            if shape not in self._open:
                pages = np.memmap(self._bundle.plan_file(self._plans[shape]), np.uint8, "c")
                have_room(pages.nbytes, self.network)
                try:
                    self._open[shape] = _imported(pages, self._options)
                except Exception as error:  # the library raises many types of its own
                    if "bad_alloc" in str(error) or "Cannot allocate memory" in str(error):
                        raise MemoryError(f"{self.network} cannot be loaded") from error
                    raise DeviceError(f"{self.network} cannot be loaded by OpenVINO: {_line(error)}") from error
                self._pages.append(pages)
            return self._open[shape]

    def check_files(self) -> None:
        """BundleError for a plan whose file was altered; MemoryError where the static ones would not fit together."""
        files = [self._bundle.plan_file(plan) for shape, plan in self._plans.items() if shape != DYNAMIC]
        have_room(sum(file.stat().st_size for file in files), self.network)

    def close(self) -> None:
        """Frees the network's memory and threads when no call is bound to it any more."""
        with self._opening:
            self._open = None

    def check(self) -> None:
        """DeviceError when it is closed, or of the process that this one was forked from."""
        self._owner.check()
        if self._open is None:
            raise DeviceError(CLOSED)

    def request(self, inputs: Mapping[str, np.ndarray], shape: Shape) -> openvino.InferRequest:
        """A call that reads the arrays themselves, which live as long as it does."""
        import openvino

        request = self.open(shape).create_infer_request()
        for name, value in inputs.items():
            request.set_tensor(name, openvino.Tensor(value, shared_memory=True))
        return request

    def bind(self, inputs: Mapping[str, Array], output: Array) -> Run:
        """See host.Lane. The network reads and writes the arrays themselves, in parts where no plan has their size."""
        import openvino

        own = all(value.shape[1:] == self._own[name] for name, value in inputs.items())
        static = [shape.rows for shape in self._plans if shape.rows is not None]
        start, requests, held = 0, [], []
        for rows in parts(len(output), static) if own else [len(output)]:
            rows_of = slice(start, start + rows)
            given = {name: value[rows_of] for name, value in inputs.items()}
            target, start = output[rows_of], start + rows
            try:
                request = self.request(given, Shape(rows) if own else DYNAMIC)
                request.set_output_tensor(openvino.Tensor(target, shared_memory=True))
            except RuntimeError as error:
                raise DeviceError(f"{self.network} failed in OpenVINO: {_line(error)}") from error
            requests.append(request)
            held.append((given, target))
        return self._runs(requests, held)

    def _runs(self, requests: Sequence[openvino.InferRequest], held: object) -> Run:
        """`held` are the arrays of the requests, which do not keep them alive."""

        def run(held: object = held) -> None:
            self.check()
            try:
                for request in requests:
                    request.infer(share_outputs=True)
            except Exception as error:  # the library raises many types of its own
                raise DeviceError(f"{self.network} failed in OpenVINO: {_line(error)}") from error

        return run

    def run(self, **inputs: np.ndarray) -> dict[str, Array]:
        """See load.Runner."""
        self.check()
        given = {name: np.require(value, requirements=("C", "W")) for name, value in inputs.items()}
        try:
            found = self.request(given, DYNAMIC).infer()
        except RuntimeError as error:
            raise DeviceError(f"{self.network} failed in OpenVINO: {_line(error)}") from error
        return {one.name: found[one.name] for one in self.spec.outputs}


class Engines:
    """A loaded model: what runs once per image on all cores, and the lanes of the denoiser."""

    def __init__(self, bundle: Bundle, lanes: Sequence[LaneSpec], *, lane_timeout: float = 0.0) -> None:
        _check(lanes[0].precision)
        threads = sum(lane.threads for lane in lanes)
        self._denoiser = Compiled(bundle, DENOISER, lanes[0].precision, len(lanes), threads)
        own = max(cores() if len(lanes) > 1 else threads, 1)
        self.runners = {network: Compiled(bundle, network, "fp32", 1, own) for network in bundle.manifest.once}
        self._denoiser.check_files()
        work: list[tuple[Compiled, Shape]] = [(self._denoiser, shapes(bundle, DENOISER)[0])]
        work += [(one, DYNAMIC) for one in self.runners.values()]
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(lambda one: one[0].open(one[1]), work))
        self.plan_folder = bundle.plan_folder(plan_key(self._denoiser.fields(Shape(1))))
        self.backend = HostBackend([self._denoiser for _ in lanes])
        self._siblings: list[HostBackend] = []

    def sibling(self, home: int) -> HostBackend:
        """See load.Engines."""
        self._siblings.append(self.backend.sibling())
        return self._siblings[-1]

    def close(self) -> None:
        """Stops the lanes and frees their memory."""
        for backend in (*self._siblings, self.backend):
            backend.close()
        for compiled in (*self.runners.values(), self._denoiser):
            compiled.close()
        give_back()


def _core() -> openvino.Core:
    import openvino

    global _CORE
    with _STARTING:
        if _CORE is None:
            _CORE = openvino.Core()
        return _CORE


def _imported(pages: np.ndarray, options: Mapping[str, Any]) -> openvino.CompiledModel:
    """Opens a plan on the pages of its file, which are to live as long as the model and its calls."""
    import openvino

    return _core().import_model(openvino.Tensor(pages, shared_memory=True), "CPU", options)


_CORE: Any = None  # one per process: it loads the plugin
_STARTING = threading.Lock()


def computes(precision: str) -> bool:
    """Whether this processor can."""
    return precision != "bf16" or "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _check(precision: str) -> None:
    if not computes(precision):
        raise DeviceError("this processor cannot compute in bf16: leave it out, as in cpu@openvino")


def _options(precision: str, streams: int, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
    }


def _axes(manifest: Manifest, rows: int) -> Mapping[str, int]:
    return manifest.latent_axes(manifest.sizes.width, manifest.sizes.height, rows)


def _line(error: Exception) -> str:
    """What an error of OpenVINO says, without the places in its source that come first."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1]
