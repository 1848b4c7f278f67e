"""From a sampler's operations to what a backend runs: first the plan, then the loop that plays it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from engines.base import Array, Backend, Call, Half
from runtime.place import place
from runtime.samplers import SAMPLERS, Combine, Job, Operation, Predict
from runtime.schedule import Schedule


@dataclass
class Counts:
    """What an image cost."""

    rounds: int = 0
    evaluations: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Round:
    """One call per lane, all at the same time; `evaluations` of them after guidance."""

    calls: tuple[Call, ...]
    evaluations: int


@dataclass(frozen=True)
class Combination:
    """A combination over guidance halves; `finished` steps are done after it."""

    sources: tuple[str, ...]
    rows: Array
    targets: tuple[str, ...]
    finished: int


def plan(operations: Iterable[Operation], lanes: int, guidance_scale: float) -> Iterator[Round | Combination]:
    """Deals evaluations over the lanes and multiplies guidance into the coefficients that read them.

    Guidance, ε = (1 − g)·ε_unconditional + g·ε_conditional, is never computed by itself. A scale of at most 1 means one
    half per evaluation, as in diffusers.
    """
    weights = {0: 1 - guidance_scale, 1: guidance_scale} if guidance_scale > 1 else {1: 1.0}
    predicted: set[str] = set()
    for operation in operations:
        if isinstance(operation, Predict):
            halves = [_half(job, conditioning) for job in operation.jobs for conditioning in weights]
            predicted.update(job.output for job in operation.jobs)
            yield Round(tuple(place(halves, lanes)), len(operation.jobs))
        else:
            yield _guided(operation, predicted, weights)


@lru_cache(maxsize=64)
def planned(
    mode: str, schedule: Schedule, k: int, lanes: int, guidance_scale: float
) -> tuple[Round | Combination, ...]:
    """The whole plan of a sampler, made before the first round: between rounds, the lanes wait for every line run."""
    return tuple(plan(SAMPLERS[mode](schedule, k), lanes, guidance_scale))


def execute(operations: Iterable[Round | Combination], backend: Backend, finished: Callable[[int], None]) -> Counts:
    """Plays a plan; `finished(steps)` is called when more steps are done."""
    counts, done = Counts(), 0
    for operation in operations:
        if isinstance(operation, Round):
            backend.predict(operation.calls)
            counts.rounds += 1
            counts.evaluations += operation.evaluations
            counts.calls += sum(1 for call in operation.calls if call)
        else:
            backend.combine(operation.sources, operation.rows, operation.targets)
            if operation.finished > done:
                done = operation.finished
                finished(done)
    return counts


def _half(job: Job, conditioning: int) -> Half:
    return Half(job.latent, job.step, f"{job.output}/{conditioning}", conditioning)


def _guided(operation: Combine, predicted: set[str], weights: dict[int, float]) -> Combination:
    columns: list[tuple[str, int, float]] = []  # slot, column of the operation, factor
    for column, slot in enumerate(operation.sources):
        if slot in predicted:
            columns += [(f"{slot}/{conditioning}", column, weight) for conditioning, weight in weights.items()]
        else:
            columns.append((slot, column, 1.0))
    rows = [[row[column] * factor for _, column, factor in columns] for row in operation.rows]
    sources = tuple(slot for slot, _, _ in columns)
    return Combination(sources, np.array(rows, np.float32), operation.targets, operation.finished)
