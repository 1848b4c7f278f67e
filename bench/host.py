"""`python -m bench host`: what the CUDA engine costs the host, on a driver that costs nothing.

Microseconds of Python and driver calls per round, once rounds are graphs; and how many rounds, graphs and contexts are
left after many images of mixed samplers and batches. It needs no GPU: every driver call returns at once. `--earlier`
adds the rows of an earlier result file, to stand beside those of now.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.engine import schedule
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver, bindings
from engines.cuda.kernels import CACHE
from engines.tensorrt.run import EngineNetwork
from runtime.sampling.operations import STATE, Options
from runtime.sampling.place import place
from runtime.sampling.program import GuidedCombine, GuidedProducts, Round, program

STEPS, GUIDANCE, REPEATS, IMAGES, LANES = 50, 7.5, 9, 140, 8
TIMED: tuple[tuple[str, Options], ...] = (("sequential", Options(k=1)), ("aggressive", Options(k=4)))
MIXED: tuple[tuple[str, Options], ...] = (
    ("sequential", Options(k=1)), ("conservative", Options(k=4)), ("aggressive", Options(k=4)),
    ("aggressive", Options(k=8, drafts="corrected")), ("srds", Options(k=4)),
    ("adaptive", Options(k=4, tolerance=0.02)),
)  # fmt: skip


class FreeDriver:
    """`cuda.bindings.driver` of a machine on which everything is done at once, and nothing is computed."""

    def __init__(self) -> None:
        self._real, self.calls, self._kept = bindings(), 0, list[Any]()
        self._values: dict[str, Callable[..., tuple[Any, ...]]] = {
            "cuDriverGetVersion": lambda: (13000,), "cuDeviceGetCount": lambda: (1,),
            "cuDeviceGetName": lambda *_: (b"a GPU that costs nothing",), "cuDeviceGetAttribute": self._nine,

            "cuMemGetInfo": lambda: (1 << 36, 1 << 36), "cuMemHostAlloc": self._pinned,
        }  # fmt: skip

    @staticmethod
    def _nine(which: Any, device: Any) -> tuple[int]:
        return (9 * ("MAJOR" in which.name),)

    def _pinned(self, size: int, flags: int) -> tuple[int]:
        self._kept.append(ctypes.create_string_buffer(size))
        return (ctypes.addressof(self._kept[-1]),)

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._real, name)
        if not name.startswith("cu"):
            return real
        results, found = (self._real.CUresult.CUDA_SUCCESS,), self._values.get(name)
        makes = ("Alloc", "Create", "Instantiate", "EndCapture", "LoadData", "GetFunction", "Retain", "DeviceGet")
        number = [1 << 30]

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls += 1
            if found is not None:
                return results + found(*arguments)
            if name.endswith(makes):
                number[0] += 1 << 20
                return (*results, number[0])
            return results

        self.__dict__[name] = call
        return call


class FreeEngine:
    """A TensorRT engine whose contexts do nothing."""

    name = "denoiser"

    class Context:
        """See tensorrt.contexts.Context."""

        size = 256

        def work_in(self, block: Any) -> None:
            """Nothing to keep."""

        def point(self, tensors: Any) -> None:
            """Nothing to set."""

        def run(self, stream: int) -> None:
            """Nothing runs."""

        def capturable(self, stream: int) -> bool:
            """Yes."""
            return True

    def __init__(self, driver: Driver) -> None:
        self.driver, self.device = driver, driver.device(0)

    def context(self, shapes: Any) -> Any:
        """See tensorrt.contexts.Engine."""
        return FreeEngine.Context()


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of lanes")
    parser.add_argument("--earlier", type=Path, help="an earlier result file, whose rows are kept")


def measure(lanes: Sequence[int], earlier: Path | None = None) -> list[dict[str, Any]]:
    """One row per number of lanes and sampler, and one of what is kept."""
    rows: list[dict[str, Any]] = []
    if earlier is not None:
        before = json.loads(earlier.read_text())
        rows += [{"when": "before", "at": before["commit"]} | row for row in before["rows"]]
    rows += [{"when": "now"} | timed(count, mode, options) for count, (mode, options) in product(lanes, TIMED)]
    return [*rows, *({"when": "now"} | kept(sizes) for sizes in (1, 3))]


def opened(lanes: int) -> tuple[FreeDriver, list[CudaBackend]]:
    """Backends on that many lanes, one per lane as home."""
    api = FreeDriver()
    driver = Driver(api)
    engine: Any = FreeEngine(driver)
    networks = [EngineNetwork(engine, "out") for _ in range(lanes)]
    first = CudaBackend(driver, networks, "float16", CACHE / "kernels")
    others = [
        CudaBackend(driver, networks, "float16", CACHE / "kernels", home=n, sibling_of=first) for n in range(1, lanes)
    ]
    return api, [first, *others]


def images(backend: CudaBackend, mode: str, options: Options, batch: int = 1) -> Iterator[float]:
    """Plays one image; the seconds of the host for every round, with the combinations before it."""
    plan = schedule(STEPS)
    words = [{"encoder_hidden_states": np.zeros((batch, 77, 8), np.float32)} for _ in range(2)]
    backend.bind((batch, 4, 64, 64), plan.timesteps, words)
    backend.write(STATE, np.zeros((batch, 4, 64, 64), np.float32))
    playing, held, seconds = program(mode, plan, options, GUIDANCE), range(backend.lanes), 0.0
    operation = next(playing, None)
    while operation is not None:
        answer: Sequence[float] = ()
        start = time.perf_counter()
        if isinstance(operation, Round):
            backend.predict(place(operation.branches, held, backend.lanes))
            yield seconds + time.perf_counter() - start
            seconds = 0.0
            done(backend)
        elif isinstance(operation, GuidedCombine):
            backend.combine(operation.sources, operation.rows, operation.targets)
            seconds += time.perf_counter() - start
        elif isinstance(operation, GuidedProducts):
            answer = [0.01] * 3 * len(operation.products)
        else:
            answer = [0.01] * len(operation.pairs)
        try:
            operation = playing.send(answer)
        except StopIteration:
            return


def done(backend: CudaBackend) -> None:
    """What the kernels would have counted: everything has run."""
    words = (ctypes.c_uint32 * (1 + backend.lanes)).from_address(backend._table.seen)
    words[0] = (backend._progress._base[0] + backend._progress.issued) & 0xFFFFFFFF


def timed(lanes: int, mode: str, options: Options) -> dict[str, Any]:
    """Microseconds and driver calls per round, in the median of images whose rounds are graphs."""
    api, backends = opened(lanes)
    for _ in range(3):
        list(images(backends[0], mode, options))
    microseconds, calls, most = [], [], 0
    for _ in range(REPEATS):
        playing, before = images(backends[0], mode, options), 0
        next(playing)
        per_round = []
        for seconds in islice(playing, STEPS):
            per_round.append(seconds * 1e6)
            calls.append(api.calls - before)
            before = api.calls
        microseconds += per_round[2:]
        calls.pop(-len(per_round))
        most = max(most, *calls[-len(per_round) + 1 :])
    return {
        "what": "host time per round", "mode": mode, "k": options.k, "lanes": lanes, "steps": STEPS,
        "us": round(float(np.median(microseconds)), 2), "us_p80": round(float(np.quantile(microseconds, 0.8)), 2),
        "driver_calls": round(float(np.mean(calls)), 2), "most_driver_calls": most,
    }  # fmt: skip


def kept(sizes: int) -> dict[str, Any]:
    """After many images of mixed samplers and so many batch sizes, in turn on every lane as home."""
    _, backends = opened(LANES)
    for n in range(IMAGES):
        mode, options = MIXED[n % len(MIXED)]
        for _ in images(backends[n % LANES], mode, options, 1 + n % sizes):
            pass
    total: dict[str, int] = {}
    for backend in backends:
        for kind, count in backend.measurements.counts.items():
            total[kind] = total.get(kind, 0) + count
    return {"what": "kept after images", "lanes": LANES, "images": IMAGES, "batch_sizes": sizes, **total}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    lines = []
    for row in rows:
        if row["what"] == "kept after images":
            figures = f"{row['rounds']} rounds, {row['graphs']} graphs, {row['contexts']} contexts"
            lines.append(f"{row['when']:<7} after {row['images']} images of {row['batch_sizes']} sizes: {figures}")
        else:
            figures = f"{row['us']:6.1f} µs, {row['driver_calls']:.2f} driver calls per round"
            lines.append(f"{row['when']:<7} {row['mode']:<12} k={row['k']} on {row['lanes']} lanes: {figures}")
    return "\n".join(lines)
