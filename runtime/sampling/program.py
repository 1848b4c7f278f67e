"""From a sampler's operations to a program: a round's branches, and guidance multiplied into coefficients."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from engines.base import Array, Branch
from runtime.sampling.operations import (
    Combine,
    Distance,
    InnerProducts,
    Operation,
    Options,
    Predict,
    Uniforms,
)  # fmt: skip
from runtime.sampling.samplers import SAMPLERS
from runtime.sampling.schedule import Schedule

KEPT = 2048  # operations of a sampler that asks, which may come again


@dataclass(frozen=True)
class Round:
    """Branches that run at the same time, on the lanes that there are then; `evaluations` of them after guidance."""

    branches: tuple[Branch, ...]
    evaluations: int


@dataclass(frozen=True)
class GuidedCombine:
    """A combination over guidance branches; `finished` steps are done after it."""

    sources: tuple[str, ...]
    rows: Array
    targets: tuple[str, ...]
    finished: int


@dataclass(frozen=True)
class GuidedProducts:
    """Inner products over guidance branches: for each its sources and the rows of a and b."""

    products: tuple[tuple[tuple[str, ...], Array], ...]


GuidedOperation = Round | GuidedCombine | GuidedProducts | Distance
Program = Generator[GuidedOperation, Sequence[float], tuple[float, ...]]


@dataclass
class GuidedProgram:
    """Makes branches of evaluations and multiplies guidance into the coefficients that read them.

    Guidance, ε = (1 − g)·ε_unconditional + g·ε_conditional, is never computed by itself. A scale of at most 1 means one
    branch per evaluation, as in diffusers. Branches of one kind are neighbours: a lane reads its drafts in a row.
    """

    guidance_scale: float
    _outputs: set[str] = field(default_factory=set)
    _known: dict[int, tuple[Operation, GuidedOperation]] = field(default_factory=dict)  # by the operation's identity

    def again(self, operation: Operation) -> GuidedOperation:
        """As a call, but an operation that a sampler made once and uses in every image is the same object each time."""
        known = self._known.get(id(operation))
        if known is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            known = self._known[id(operation)] = operation, self(operation)
        return known[1]

    def __call__(self, operation: Operation) -> GuidedOperation:
        """One operation as the backend runs it."""
        if isinstance(operation, Predict):
            self._outputs.update(evaluation.output for evaluation in operation.evaluations)
            branches = tuple(
                Branch(
                    evaluation.latent,
                    evaluation.step,
                    f"{evaluation.output}/{conditioning}",
                    conditioning,
                    evaluation.keep and f"{evaluation.keep}/{conditioning}",
                    tuple((f"{slot}/{conditioning}", weight) for slot, weight in evaluation.features),
                )
                for conditioning in self._weights
                for evaluation in operation.evaluations
            )
            return Round(branches, len(operation.evaluations))
        if isinstance(operation, InnerProducts):
            return GuidedProducts(tuple(self._columns(one.sources, (one.a, one.b)) for one in operation.products))
        assert not isinstance(operation, Uniforms), "answered here, not by a backend"
        return self._guided(operation) if isinstance(operation, Combine) else operation

    @property
    def _weights(self) -> dict[int, float]:
        return {0: 1 - self.guidance_scale, 1: self.guidance_scale} if self.guidance_scale > 1 else {1: 1.0}

    def _guided(self, operation: Combine) -> GuidedCombine:
        sources, rows = self._columns(operation.sources, operation.rows)
        return GuidedCombine(sources, rows, operation.targets, operation.finished)

    def _columns(self, slots: Sequence[str], coefficients: Sequence[Sequence[float]]) -> tuple[tuple[str, ...], Array]:
        """The sources of an operation and its rows, with a column for each branch of an output."""
        columns: list[tuple[str, int, float]] = []  # slot, column of the operation, factor
        for column, slot in enumerate(slots):
            if slot in self._outputs:
                columns += [
                    (f"{slot}/{conditioning}", column, weight) for conditioning, weight in self._weights.items()
                ]
            else:
                columns.append((slot, column, 1.0))
        rows = np.array([[row[column] * factor for _, column, factor in columns] for row in coefficients], np.float32)
        rows.setflags(write=False)  # a backend may know it again by its identity
        return tuple(slot for slot, _, _ in columns), rows


@lru_cache(maxsize=16)
def _whole_program(
    mode: str, schedule: Schedule, options: Options, guidance_scale: float
) -> tuple[GuidedOperation, ...] | None:
    """A program that asks nothing, made before the first round: lanes wait for what the host does between rounds.

    None for a sampler whose next operation depends on an answer.
    """
    guided, planned = GuidedProgram(guidance_scale), []
    for operation in SAMPLERS[mode](schedule, options):
        if isinstance(operation, Distance | InnerProducts):
            return None
        planned.append(guided(operation))
    return tuple(planned)


@lru_cache(maxsize=16)
def _asking(mode: str, schedule: Schedule, options: Options, guidance_scale: float) -> GuidedProgram:
    """What a sampler that asks has made up to now: the rounds of one image come again in the next one."""
    return GuidedProgram(guidance_scale)


def program(
    mode: str, schedule: Schedule, options: Options, guidance_scale: float, uniforms: Sequence[float] = ()
) -> Program:
    """The operations of a sampler as a backend runs them; the answers to those that measure are to be sent in.

    `uniforms` has one number per step, for samplers that ask for them.
    """
    whole = _whole_program(mode, schedule, options, guidance_scale)
    if whole is not None:
        for n in range(len(whole)):  # no `yield from`: a tuple takes no answers
            yield whole[n]
        return ()
    guided, operations = _asking(mode, schedule, options, guidance_scale), SAMPLERS[mode](schedule, options)
    try:
        operation = next(operations)
        while True:
            if isinstance(operation, Uniforms):
                operation = operations.send([uniforms[step] for step in operation.steps])
            else:
                operation = operations.send((yield guided.again(operation)))
    except StopIteration as end:
        accepted: tuple[float, ...] = end.value
        return accepted
