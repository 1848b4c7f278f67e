"""`python -m bench kernel`: one fused combination against separate operations and against a copy.

The engine refines a block, applies guidance and makes the next drafts in one pass over the latents. The equivalent in
a pipeline is guidance, k scheduler steps and k drafts, as separate operations, in NumPy and in PyTorch.

On processor cores this measures `HostBackend.combine` (NumPy), which is what lanes there use, with reading and storing
slots in place; not the CUDA kernel.
With `--device cuda:0` it is the CUDA kernel against PyTorch's and, where it is installed, CuPy's launches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.statistics import interval, median, ratio
from engines.base import Array
from engines.cuda.driver import Driver, available
from engines.cuda.kernels import CACHE
from engines.errors import DeviceError, ParameterError
from engines.host import FunctionLane, HostBackend

LATENTS = {"shapes": (4, 16, 16), "SD 1.5": (4, 64, 64), "SDXL": (4, 128, 128), "SD 3": (16, 128, 128)}
GUIDANCE = 4.0
SECONDS = 0.002  # of one measurement at least: calls are repeated until it takes as long


class Block:
    """A block of aggressive drafts: x and the branches of k predictions in, the refined x and k drafts out.

    The coefficients resemble a scheduler's; timing does not depend on them.
    """

    def __init__(self, k: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.k = k
        self.steps = [(float(a), float(b)) for a, b in zip(rng.uniform(0.98, 1.02, k), rng.uniform(-0.1, 0, k))]  # noqa: B905
        self.skips = [(float(a), float(b)) for a, b in zip(rng.uniform(0.9, 1.1, k), rng.uniform(-0.5, 0, k))]  # noqa: B905

    def separately(self, x: Any, unconditional: Any, conditional: Any) -> list[Any]:
        """Guidance, step by step, then the drafts; on arrays of any library."""
        for (a, b), u, c in zip(self.steps, unconditional, conditional, strict=True):
            epsilon = u + GUIDANCE * (c - u)
            x = a * x + b * epsilon
        return [x, *(a * x + b * epsilon for a, b in self.skips)]

    def rows(self) -> Array:
        """The same as one matrix over x, the unconditional and the conditional predictions."""
        k = self.k
        row, guided = np.zeros(1 + 2 * k), np.zeros(1 + 2 * k)
        row[0] = 1
        for n, (a, b) in enumerate(self.steps):
            guided = np.zeros(1 + 2 * k)
            guided[1 + n], guided[1 + k + n] = 1 - GUIDANCE, GUIDANCE
            row = a * row + b * guided
        return np.array([row, *(a * row + b * guided for a, b in self.skips)], np.float32)

    @property
    def operations(self) -> int:
        """How many array operations the equivalent is."""
        return 6 * self.k + 3 * self.k  # guidance and step: −, ·, +, ·, ·, +; draft: ·, ·, +


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--k", type=int, nargs="+", default=[2, 4, 8], dest="ks", help="drafts")
    parser.add_argument("--repeats", type=int, default=15)


def measure(device: str, ks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row per latent, k and type."""
    if min(ks) < 1 or repeats < 1:
        raise ParameterError("k", "k and repeats must be at least 1")
    if device == "cpu":
        return [_on_host(name, shape, k, repeats) for name, shape in LATENTS.items() for k in ks]
    if device != "cuda:0":
        raise DeviceError(f"unknown device {device!r}: use cpu or cuda:0")
    reason = available()
    if reason:
        raise DeviceError(f"there is no {device}: {reason}; use --device cpu")
    return _on_gpu(ks, repeats)


def _row(
    name: str, k: int, block: Block, elements: int, size: int, taken: dict[str, list[float]], error: float, **more: Any
) -> dict[str, Any]:  # fmt: skip
    """A row; `taken` has lists of seconds for combine, copy and each library.

    The copy moves as many bytes as the combination must: it reads 1 + 2k latents and writes 1 + k.
    """
    libraries = [library for library in taken if library not in ("combine", "copy")]
    moved = (2 + 3 * k) * elements * size
    return {
        "latent": name, "k": k, "elements": elements, "inputs": 1 + 2 * k, "outputs": 1 + k,
        "operations_replaced": block.operations, "bytes": moved, "error": float(f"{error:.3g}"),
        "us": {key: round(1e6 * (median(values) or 0.0), 3) for key, values in taken.items()},
        "speedup": {library: ratio(taken[library], taken["combine"]) for library in libraries},
        "of_copy": ratio(taken["copy"], taken["combine"]),
        "gb_per_s": round(moved / (median(taken["combine"]) or 1.0) / 1e9, 3), **more,
    }  # fmt: skip


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, from repeated calls."""
    count = 1
    while True:
        start = time.perf_counter()
        for _ in range(count):
            work()
        taken = time.perf_counter() - start
        if taken >= SECONDS:
            return taken / count
        count = max(2 * count, int(1.2 * count * SECONDS / max(taken, 1e-9)))


def _on_host(name: str, shape: tuple[int, ...], k: int, repeats: int) -> dict[str, Any]:
    import torch

    block, elements = Block(k), int(np.prod(shape))
    inputs = np.random.default_rng(1).standard_normal((1 + 2 * k, elements), np.float32)
    tensors, rows = torch.from_numpy(inputs), block.rows()

    def split(arrays: Any) -> tuple[Any, Any, Any]:
        return arrays[0], arrays[1 : 1 + k], arrays[1 + k :]

    lanes = HostBackend([FunctionLane(lambda sample, timestep, conditioning: sample)])
    lanes.bind((1, *shape), [0.0], [{}])
    sources, targets = [f"in {n}" for n in range(1 + 2 * k)], [f"out {n}" for n in range(1 + k)]
    for source, value in zip(sources, inputs, strict=True):
        lanes.write(source, value)
    moved = np.zeros((2 + 3 * k) * elements // 2, np.float32)  # read once, written once: as many bytes
    target = np.empty_like(moved)
    works: dict[str, Callable[[], object]] = {
        "combine": lambda: lanes.combine(sources, rows, targets), "numpy": lambda: block.separately(*split(inputs)),
        "torch": lambda: block.separately(*split(tensors)), "copy": lambda: np.copyto(target, moved),
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a lane's sums: in between the rounds, one thread works
    try:
        taken: dict[str, list[float]] = {key: [] for key in works}
        for number in range(repeats + 1):
            for key, work in works.items():
                seconds = _seconds(work)
                if number:
                    taken[key].append(seconds)
        separate = np.stack([one.numpy() for one in block.separately(*split(tensors))])
    finally:
        torch.set_num_threads(threads)
    combined = np.stack([lanes.read(target).reshape(-1) for target in targets])
    lanes.close()
    error = float(np.abs(combined - separate).max() / np.abs(separate).max())
    return _row(name, k, block, elements, 4, taken, error, device="cpu", dtype="float32", what="HostBackend.combine")


def _on_gpu(ks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """The CUDA kernel, device seconds from graphs of it; PyTorch and CuPy between events on their own streams."""
    from bench.gpu.device import DeviceBench

    bench, rows = DeviceBench(Driver(), CACHE / "kernels", "float16"), []
    try:
        for name, shape in LATENTS.items():
            for k in ks:
                rows.append(_gpu_row(bench, name, int(np.prod(shape)), k, repeats))
    finally:
        bench.close()
    return rows


def _gpu_row(bench: Any, name: str, elements: int, k: int, repeats: int) -> dict[str, Any]:
    block, size = Block(k), 2 * elements
    branches = np.random.default_rng(1).standard_normal((1 + 2 * k, elements)).astype(np.float16)
    inputs, outputs = ([bench.allocate(size) for _ in range(n)] for n in (1 + 2 * k, 1 + k))
    for pointer, value in zip(inputs, branches, strict=True):
        bench.to_device(pointer, value)
    bench.to_device(bench.table, np.ascontiguousarray(block.rows().T))
    prepared = bench.prepared(inputs, outputs, elements)
    moved = (2 + 3 * k) * size // 2
    source, target = bench.allocate(moved), bench.allocate(moved)
    libraries = {module: found for module in ("torch", "cupy") if (found := _library(module, branches, block))}
    taken: dict[str, list[float]] = {key: [] for key in ("combine", *libraries, "copy")}
    for _ in range(repeats):
        taken["combine"].append(bench.seconds(bench.launch, *prepared, repeats=3))
        taken["copy"].append(bench.seconds(bench.copy, target, source, moved, repeats=3))
        for module, (seconds, _) in libraries.items():
            taken[module].append(seconds())
    bench.launch(*prepared)
    bench.settle()
    got = np.stack([bench.to_host(pointer, size).view(np.float16) for pointer in outputs]).astype(np.float64)
    wanted = block.rows().astype(np.float64) @ branches.astype(np.float64)
    error = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    for pointer in (*inputs, *outputs, source, target):
        bench.driver("cuMemFree", pointer)
        bench.allocated.remove(pointer)
    return _row(name, k, block, elements, 2, taken, error, device="cuda:0", dtype="float16", what="kernels/combine.cu")


def _library(name: str, branches: Any, block: Block) -> tuple[Callable[[], float], Any] | None:
    """A timer for a library's operations on the GPU; None where it is not installed or has no GPU support."""
    k = block.k
    if name == "torch":
        import torch

        if not torch.cuda.is_available():
            return None
        tensors = torch.from_numpy(branches).cuda()

        def settle() -> None:
            torch.cuda.synchronize()
    else:
        try:
            import cupy
        except ImportError:
            return None
        tensors = cupy.asarray(branches)

        def settle() -> None:
            cupy.cuda.Device().synchronize()

    def many(count: int = 20) -> float:
        settle()
        start = time.perf_counter()
        for _ in range(count):
            block.separately(tensors[0], tensors[1 : 1 + k], tensors[1 + k :])
        settle()
        return (time.perf_counter() - start) / count

    many()
    return many, tensors


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Microseconds, and how many times longer the separate operations take."""
    libraries = [key for key in rows[0]["us"] if key not in ("combine", "copy")]
    heads = ["latent", "k", "operations replaced", "one combination", *(f"{name}, separately" for name in libraries)]
    heads += [*(f"{name} ÷ combination" for name in libraries), "copy of the same bytes", "copy ÷ combination"]
    where = f"{rows[0]['what']}, {rows[0]['device']}, {rows[0]['dtype']}"
    lines = [f"{where}{', one thread' if rows[0]['device'] == 'cpu' else ''}", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        us = row["us"]
        cells = [row["latent"], str(row["k"]), str(row["operations_replaced"]), f"{us['combine']:.1f} µs"]
        cells += [f"{us[name]:.1f} µs" for name in libraries] + [interval(row["speedup"][n]) for n in libraries]
        cells += [f"{us['copy']:.1f} µs", interval(row["of_copy"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
