"""A torch module to an ONNX file, and the proof that they compute the same."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from engines.errors import DeviceError, ExportError
from engines.manifest import Axes, File, Network, Parity, TensorSpec
from export.families import Sides
from export.foreign import reading
from export.networks import Axis, Exported

OPSET = 20  # the newest that needs no Attention operator, which TensorRT-RTX cannot build
MAX_BATCH = 32  # that torch is told of; a graph runs any. At 64 it refuses convolutions and traces them once more
# of an output's largest value; every layer rounds to 5e-4 in fp16 and to 4e-3 in bfloat16
PARITY_BOUND = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
BATCHES, FEW = (1, 3, 4), (1, 2)  # rows of fresh inputs that are compared; few where one takes minutes
WIDE = 256  # pixels of the smallest sides from which they are few for a VAE, whose memory grows with them
LARGE = 1_500_000_000  # bytes of weights from which they are few, and lie beside the graph: the format ends at 2 GB
# Peak memory, files apart: by the bytes of weights, by the pixels that a VAE is compared on, for what flows through
# another network at most, and for the libraries.
PER_WEIGHT = {"fp32": 2.6, "fp16": 2.6, "bf16": 5.0}
PER_PIXEL = {"fp32": 10_000, "fp16": 7_000, "bf16": 10_000}
FLOWING, ALWAYS = 1_000_000_000, 1_500_000_000
STAGES = ("loads", "writes ONNX", "runs torch", "runs ONNX Runtime")  # of a network's export, for who shows progress
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def export_network(
    name: str, make: Callable[[], Exported], folder: Path, sides: Sides, factor: int,
    stage: Callable[[str], None] = lambda _: None,
) -> Network:  # fmt: skip
    """Writes `<name>.onnx` with dynamic axes and measures it against torch in float32 with the same weights.

    `factor` is how many pixels a latent is wide; `stage` is called with each of STAGES when it begins. ExportError when
    the largest difference exceeds PARITY_BOUND of the output's scale, or is not finite. Torch has let go of the weights
    before ONNX Runtime loads them, in a process of its own.
    """
    path = folder / f"{name}.onnx"
    stage(STAGES[0])
    with reading(f"{name} cannot be exported"):
        network = make()
    network.module.eval().requires_grad_(requires_grad=False)
    weights = sum(one.numel() * one.element_size() for one in network.module.state_dict().values())
    batches = compared(name, weights, sides)
    axes: list[Axes] = [_axes(sides, factor, batch) for batch in batches]
    precision = _precision(network.module)
    with torch.no_grad():
        stage(STAGES[1])
        _write(network, path, sides, factor, beside=weights >= LARGE)
        stage(STAGES[2])
        drawn = [[one.values(_resolve(one.axes, numbers)) for one in network.inputs] for numbers in axes]
        network.module.float()  # torch has no fast fp16 on processors, and this is the better yardstick
        with reading(f"{name} cannot be run by torch"):
            found = [_as_tuple(network.module(*map(_wide, inputs))) for inputs in drawn]
    stage(STAGES[3])
    names, inputs, outputs = [one.name for one in network.inputs], network.inputs, network.outputs
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pairs = Path(scratch) / "pairs.npz"
        _save(pairs, names, drawn, list(outputs), found)
        _release(network.module)
        del network, drawn, found
        _collect()
        parity = measure_parity(name, path, pairs, PARITY_BOUND[precision], batches)
    graph = onnx.load(path, load_external_data=False).graph
    data = path.with_suffix(".data")
    return Network(
        file=File.of(path),
        data=File.of(data) if data.is_file() else None,
        inputs=tuple(_spec(value, one.axes) for value, one in zip(graph.input, inputs, strict=True)),
        outputs=tuple(_spec(value, outputs[value.name]) for value in graph.output),
        parity=parity,
    )


def compared(name: str, weights: int, sides: Sides) -> tuple[int, ...]:
    """The batches on which a network of so many bytes is measured against torch."""
    return FEW if weights >= LARGE or (name.startswith("vae_") and sides.least >= WIDE) else BATCHES


def memory(name: str, weights: int, precision: str, sides: Sides, factor: int) -> int:
    """Bytes that exporting a network and comparing it take at their peak, as was measured for bench/results."""
    sizes = (_axes(sides, factor, batch) for batch in compared(name, weights, sides))
    pixels = max(one["batch"] * one["height"] * one["width"] for one in sizes) * factor**2
    flowing = pixels * PER_PIXEL[precision] if name.startswith("vae_") else min(weights, FLOWING)
    return int(weights * PER_WEIGHT[precision] + flowing + ALWAYS)


def _release(module: torch.nn.Module) -> None:
    """Lets go of weights, also where torch's exporter still knows their tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0)


def _collect() -> None:
    """Gives the memory of what is gone back to the system: the C library keeps what is freed in small pieces."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _precision(module: torch.nn.Module) -> str:
    """The type that most of a module computes in."""
    types = [parameter.dtype for parameter in module.parameters() if parameter.dtype in _DTYPES]
    return _DTYPES[max(set(types), key=types.count)] if types else "fp32"


def _axes(sides: Sides, factor: int, batch: int) -> Axes:
    """A size for comparing, another for every batch, none of them square: small ones, because they take less time."""
    steps = (sides.most - sides.least) // sides.multiple
    height, width = (sides.least + sides.multiple * min(steps, more) for more in (batch // 2, batch))
    return {"batch": batch, "height": height // factor, "width": width // factor}


def _resolve(axes: Sequence[Axis], numbers: Axes) -> tuple[int, ...]:
    return TensorSpec(name="", dtype="", shape=tuple(axes)).resolve(numbers)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value


def _as_tuple(output: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _write(network: Exported, path: Path, sides: Sides, factor: int, *, beside: bool) -> None:
    """Torch's exporter, told which axes may change and how much; the weights go beside the graph or into it."""
    unit, low, high = sides.multiple // factor, sides.least // sides.multiple, sides.most // sides.multiple
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    sides_free = ("height", "width") if low < high else ()
    free = {name: torch.export.Dim(f"{name}_{unit}", min=low, max=high) for name in sides_free}

    def dynamic(axis: str) -> object:
        times, _, name = axis.rpartition("*")
        multiple = int(times or 1) * unit
        if name == "batch":
            return batch
        if name not in free:
            return None
        return free[name] if multiple == 1 else multiple * free[name]

    shapes = tuple(
        {number: dynamic(axis) for number, axis in enumerate(one.axes) if isinstance(axis, str)}
        for one in network.inputs
    )
    numbers = _axes(sides, factor, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with reading(f"{path.stem} cannot be exported by torch"):
            program = torch.onnx.export(
                network.module,
                tuple(one.values(_resolve(one.axes, numbers)) for one in network.inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=[one.name for one in network.inputs],
                output_names=list(network.outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
    assert program is not None
    program.save(path, external_data=beside)
    if beside:
        _rename_data(path)


def _rename_data(path: Path) -> None:
    """Gives the file beside the graph the name that the manifest knows."""
    model = onnx.load(path, load_external_data=False)
    goal, written = path.with_suffix(".data"), set()
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                written.add(entry.value)
                entry.value = goal.name
    assert len(written) == 1, written
    (path.parent / written.pop()).rename(goal)
    onnx.save(model, path)


def _spec(value: onnx.ValueInfoProto, axes: Sequence[Axis]) -> TensorSpec:
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple(axes))


# --- parity ----------------------------------------------------------------------------------------------------------


def _save(
    path: Path, inputs: Sequence[str], drawn: Sequence[Sequence[torch.Tensor]], outputs: Sequence[str],
    found: Sequence[Sequence[torch.Tensor]],
) -> None:  # fmt: skip
    """Inputs and what torch made of them; bfloat16 as float32, which NumPy has."""
    arrays: dict[str, np.ndarray] = {}
    for number, (given, made) in enumerate(zip(drawn, found, strict=True)):
        for name, value in zip(inputs, given, strict=True):
            arrays[f"in/{number}/{name}"] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in zip(outputs, made, strict=True):
            arrays[f"out/{number}/{name}"] = value.float().numpy()
    np.savez(path, **arrays)  # type: ignore[arg-type]


def measure_parity(name: str, path: Path, pairs: Path, bound: float, batches: Sequence[int]) -> Parity:
    """ONNX Runtime against what torch made of the same inputs; ExportError beyond the bound."""
    run = [sys.executable, "-m", "export.parity", str(path), str(pairs)]
    done = subprocess.run(run, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise DeviceError(
            f"{name}: ONNX Runtime was ended by signal {-done.returncode} while it ran the export, as happens where "
            "memory ends: close other programs; the same command goes on from here"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise ExportError(f"{name}: ONNX Runtime cannot run the export: {last}")
    differences: Mapping[str, tuple[float, float]] = json.loads(done.stdout)
    shares = {output: error and error / (scale or error) for output, (error, scale) in differences.items()}
    worst = max(shares, key=lambda output: shares[output] if shares[output] == shares[output] else float("inf"))
    error, scale = differences[worst]
    if not shares[worst] <= bound:
        raise ExportError(
            f"{name}: ONNX Runtime differs from torch by {error:.3g} in {worst}, whose scale is {scale:.3g}; "
            f"allowed is {bound:g} of it"
        )
    largest = max(error for error, _ in differences.values())
    return Parity(relative_error=shares[worst], max_abs_error=largest, bound=bound, batches=tuple(batches))
