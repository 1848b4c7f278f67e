"""`python -m bench host`: what the CUDA engine costs the host, as the driver of this process counts it.

Microseconds of Python and of cuda-python per round, once rounds are graphs, without those that the driver itself takes;
and how many rounds, graphs and contexts are left after many images of mixed samplers and batches. It needs no GPU:
`python -m tests.libcuda --idle -m bench host` runs it on the imaginary driver, which counts its calls and their time.
`--earlier` adds the rows of an earlier result file, to stand beside those of now.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.engine import schedule
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.cuda.kernels import CACHE
from engines.errors import DeviceError
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


class Meter:
    """Driver calls so far, and the seconds that were spent in them: of the imaginary driver, which counts both."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
            self._library.imaginary_nanoseconds.restype = ctypes.c_uint64
            self._library.imaginary_calls.restype = ctypes.c_long
        except (OSError, AttributeError) as error:
            raise DeviceError(
                "bench host asks the driver what it takes itself: python -m tests.libcuda --idle -m bench host"
            ) from error

    def calls(self, name: str = "") -> int:
        """Of one function, or of all."""
        return int(self._library.imaginary_calls(name.encode()))

    def seconds(self) -> float:
        """In the driver."""
        return int(self._library.imaginary_nanoseconds()) / 1e9

    def finish(self) -> None:
        """Lets the device do all that it was asked for, as one does that is faster than the host."""
        self._library.imaginary_finish()


class FreeEngine:
    """A TensorRT engine whose contexts do nothing."""

    name = "denoiser"

    class Context:
        """See tensorrt.contexts.Context."""

        size, block = 256, None

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
    rows += [{"when": "now"} | kept(sizes) for sizes in (1, 3)]
    return [*rows, {"when": "now"} | captured()]


def opened(lanes: int) -> tuple[Meter, list[CudaBackend]]:
    """Backends on that many lanes, one per lane as home."""
    meter, driver = Meter(), Driver()
    engine: Any = FreeEngine(driver)
    networks = [EngineNetwork(engine, "out") for _ in range(lanes)]
    first = CudaBackend(driver, networks, "float16", CACHE / "kernels")
    others = [
        CudaBackend(driver, networks, "float16", CACHE / "kernels", home=n, sibling_of=first) for n in range(1, lanes)
    ]
    return meter, [first, *others]


def images(
    meter: Meter, backend: CudaBackend, mode: str, options: Options, batch: int = 1, steps: int = STEPS
) -> Iterator[float]:
    """Plays one image; seconds from a round's first combination to its end, those in the driver included."""
    plan = schedule(steps)
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
            meter.finish()
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


def timed(lanes: int, mode: str, options: Options) -> dict[str, Any]:
    """Microseconds and driver calls per round, in the median of images whose rounds are graphs."""
    meter, backends = opened(lanes)
    for _ in range(3):
        list(images(meter, backends[0], mode, options))
    host, driver, calls = [], [], []
    for _ in range(REPEATS):
        playing = images(meter, backends[0], mode, options)
        next(playing)  # with what an image begins with
        count, inside = meter.calls(), meter.seconds()
        for seconds in playing:
            spent, made = meter.seconds() - inside, meter.calls() - count
            host.append(1e6 * (seconds - spent))
            driver.append(1e6 * spent)
            calls.append(made)
            count, inside = meter.calls(), meter.seconds()
    close(backends)
    return {
        "what": "host time per round", "mode": mode, "k": options.k, "lanes": lanes, "steps": STEPS,
        "us": round(float(np.median(host)), 2), "us_p80": round(float(np.quantile(host, 0.8)), 2),
        "us_in_driver": round(float(np.median(driver)), 2),
        "driver_calls": round(float(np.mean(calls)), 2), "most_driver_calls": max(calls),
    }  # fmt: skip


def close(backends: Sequence[CudaBackend]) -> None:
    """Frees everything; the first backend has what the others share."""
    for backend in reversed(backends):
        backend.close()


def kept(sizes: int) -> dict[str, Any]:
    """After many images of mixed samplers and so many batch sizes, in turn on every lane as home."""
    meter, backends = opened(LANES)
    for n in range(IMAGES):
        mode, options = MIXED[n % len(MIXED)]
        for _ in images(meter, backends[n % LANES], mode, options, 1 + n % sizes):
            pass
    total: dict[str, int] = {}
    for backend in backends:
        for kind, count in backend.measurements.counts.items():
            total[kind] = total.get(kind, 0) + count
    close(backends)
    return {"what": "kept after images", "lanes": LANES, "images": IMAGES, "batch_sizes": sizes, **total}


def captured() -> dict[str, Any]:
    """Graphs that two images of srds make, whose rounds are of many kinds; those that come again are captured."""
    meter, backends = opened(LANES)
    before = meter.calls("cuGraphInstantiate")
    for _ in range(2):
        list(images(meter, backends[0], "srds", Options(k=4)))
    graphs = meter.calls("cuGraphInstantiate") - before
    close(backends)
    return {"what": "graphs of two images", "mode": "srds", "lanes": LANES, "steps": STEPS, "graphs": graphs}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per row."""
    lines = []
    for row in rows:
        if row["what"] == "kept after images":
            figures = f"{row['rounds']} rounds, {row['graphs']} graphs, {row['contexts']} contexts"
            lines.append(f"{row['when']:<7} after {row['images']} images of {row['batch_sizes']} sizes: {figures}")
        elif row["what"] == "graphs of two images":
            lines.append(f"{row['when']:<7} two images of {row['mode']} make {row['graphs']} graphs")
        else:
            figures = f"{row['us']:6.1f} µs, {row['driver_calls']:.2f} driver calls per round"
            lines.append(f"{row['when']:<7} {row['mode']:<12} k={row['k']} on {row['lanes']} lanes: {figures}")
    return "\n".join(lines)
