"""From a sampler's operations to a program: one call per lane and round, guidance multiplied into coefficients."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from engines.base import Array, Call, Half
from runtime.sampling.operations import Combine, Distance, Operation, Options, Predict
from runtime.sampling.place import place
from runtime.sampling.samplers import SAMPLERS
from runtime.sampling.schedule import Schedule


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


Planned = Round | Combination | Distance
Plan = Generator[Planned, Sequence[float], tuple[float, ...]]


@dataclass
class Planner:
    """Deals evaluations over the lanes and multiplies guidance into the coefficients that read them.

    Guidance, ε = (1 − g)·ε_unconditional + g·ε_conditional, is never computed by itself. A scale of at most 1 means one
    half per evaluation, as in diffusers. Halves of one kind are neighbours, so that a lane reads its drafts in a row.
    """

    lanes: int
    guidance_scale: float
    _outputs: set[str] = field(default_factory=set)

    def __call__(self, operation: Operation) -> Planned:
        """One operation as the backend runs it."""
        if isinstance(operation, Predict):
            self._outputs.update(job.output for job in operation.jobs)
            halves = [
                Half(job.latent, job.step, f"{job.output}/{conditioning}", conditioning)
                for conditioning in self._weights
                for job in operation.jobs
            ]
            return Round(tuple(map(tuple, place(halves, self.lanes))), len(operation.jobs))
        return self._guided(operation) if isinstance(operation, Combine) else operation

    @property
    def _weights(self) -> dict[int, float]:
        return {0: 1 - self.guidance_scale, 1: self.guidance_scale} if self.guidance_scale > 1 else {1: 1.0}

    def _guided(self, operation: Combine) -> Combination:
        columns: list[tuple[str, int, float]] = []  # slot, column of the operation, factor
        for column, slot in enumerate(operation.sources):
            if slot in self._outputs:
                columns += [
                    (f"{slot}/{conditioning}", column, weight) for conditioning, weight in self._weights.items()
                ]
            else:
                columns.append((slot, column, 1.0))
        rows = [[row[column] * factor for _, column, factor in columns] for row in operation.rows]
        sources = tuple(slot for slot, _, _ in columns)
        return Combination(sources, np.array(rows, np.float32), operation.targets, operation.finished)


@lru_cache(maxsize=16)
def _whole_plan(
    mode: str, schedule: Schedule, options: Options, lanes: int, guidance_scale: float
) -> tuple[Planned, ...] | None:
    """A plan that asks nothing, made before the first round: between rounds, the lanes wait for every line that runs.

    None for a sampler whose next operation depends on an answer.
    """
    planner, planned = Planner(lanes, guidance_scale), []
    for operation in SAMPLERS[mode](schedule, options):
        if isinstance(operation, Distance):
            return None
        planned.append(planner(operation))
    return tuple(planned)


def plan(mode: str, schedule: Schedule, options: Options, lanes: int, guidance_scale: float) -> Plan:
    """The operations of a sampler as a backend runs them; the answer to each `Distance` is to be sent in."""
    whole = _whole_plan(mode, schedule, options, lanes, guidance_scale)
    if whole is not None:
        for n in range(len(whole)):  # no `yield from`: a tuple takes no answers
            yield whole[n]
        return ()
    planner, operations = Planner(lanes, guidance_scale), SAMPLERS[mode](schedule, options)
    try:
        operation = next(operations)
        while True:
            operation = operations.send((yield planner(operation)))
    except StopIteration as end:
        accepted: tuple[float, ...] = end.value
        return accepted
