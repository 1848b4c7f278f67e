"""Seconds of calls, copies, sums and launches: from a table of a device and its links, or measured on lanes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench import moves
from bench.moves import Link
from engines.base import Backend, Branch, LaneCall
from engines.host import HostBackend
from runtime.auto import call_seconds
from runtime.sampling.operations import STATE

BATCHES = (1, 2, 3, 4, 6, 8)
LAUNCH = 10e-6  # seconds to start a round as a graph; assumed
REPEATS = 3


@dataclass(frozen=True)
class LinkCosts:
    """Devices that each run a call in `call(branches)` seconds; the first holds the latents of `size` bytes."""

    call: Callable[[int], float]
    size: int
    link: Link
    combine_seconds: float = moves.COMBINE
    launch: float = LAUNCH

    def round(self, calls: Sequence[LaneCall]) -> float:
        """See engines.null.Costs."""
        branches = [len(call) for call in calls]
        seconds = [self.call(count) if count else 0.0 for count in branches]
        return self.launch + moves.gathered(seconds, branches, self.size, self.link)

    def combine(self, sources: int, targets: int) -> float:
        """See engines.null.Costs."""
        return self.combine_seconds

    def distances(self, pairs: int) -> float:
        """See engines.null.Costs: a small kernel, and the host hears of it."""
        return self.combine_seconds + self.launch


@dataclass
class MeasuredCosts:
    """Seconds as measured on lanes here: calls by lanes at work and batch, starting a round, sums by their shape.

    All of it is measured after a model call, which leaves the caches as a real round does.
    """

    calls: dict[int, dict[int, float]] = field(default_factory=dict)
    launch: dict[int, float] = field(default_factory=dict)
    sums: dict[tuple[int, int], float] = field(default_factory=dict)
    distance: float = 0.0

    def round(self, calls: Sequence[LaneCall]) -> float:
        """See engines.null.Costs."""
        branches = [len(call) for call in calls if call]
        seconds = call_seconds(self.calls[len(branches)])
        return self.launch[len(branches)] + max(map(seconds, branches))

    def combine(self, sources: int, targets: int) -> float:
        """See engines.null.Costs."""
        return self.sums.get((sources, targets), 0.0)

    def distances(self, pairs: int) -> float:
        """See engines.null.Costs."""
        return pairs * self.distance

    def mean(self, other: MeasuredCosts) -> MeasuredCosts:
        """Between two tables of the same lanes."""

        def each(one: dict[Any, float], two: dict[Any, float]) -> dict[Any, float]:
            return {key: (value + two[key]) / 2 for key, value in one.items()}

        calls = {busy: each(batches, other.calls[busy]) for busy, batches in self.calls.items()}
        launch, sums = each(self.launch, other.launch), each(self.sums, other.sums)
        return MeasuredCosts(calls, launch, sums, (self.distance + other.distance) / 2)


def measured_costs(backend: Backend, shapes: Iterable[tuple[int, int]]) -> MeasuredCosts:
    """Measures a bound backend; `shapes` are the (sources, targets) of the sums that will be asked for.

    On lanes that order themselves a call's seconds include what a round costs beside it, and sums are not told apart.
    """
    found, waits = MeasuredCosts(), isinstance(backend, HostBackend)
    for busy in range(1, backend.lanes + 1):
        beside = []
        found.calls[busy] = {}
        for batch in BATCHES:
            calls = _calls(backend.lanes, busy, batch)
            taken = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                taken.append(backend.measurements.timed(calls))
                beside.append(time.perf_counter() - start - taken[-1])
            found.calls[busy][batch] = float(np.median(taken))
        found.launch[busy] = float(np.median(beside)) if waits else 0.0
    if waits:
        once = _calls(backend.lanes, backend.lanes, 1)
        for sources, targets in shapes:
            found.sums[sources, targets] = _after_a_call(backend, once, partial_sum(backend, sources, targets))
        found.distance = _after_a_call(backend, once, lambda: backend.distances([("timed 0/0", STATE)]))
    return found


def _calls(lanes: int, busy: int, batch: int) -> list[list[Branch]]:
    return [[Branch(STATE, 0, f"timed {n}/{b}", 1) for b in range(batch)] if n < busy else [] for n in range(lanes)]


def partial_sum(backend: Backend, sources: int, targets: int) -> Callable[[], None]:
    """A sum of this shape over slots of a bound backend."""
    latent, shape = backend.read(STATE), (targets, sources)
    names = [f"summed {n}" for n in range(max(sources, targets))]
    for name in names:
        backend.write(name, latent)
    rows = np.full(shape, 1 / sources, np.float32)
    return lambda: backend.combine(names[:sources], rows, names[:targets])


def _after_a_call(backend: Backend, calls: Sequence[LaneCall], work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        backend.predict(calls)
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))
