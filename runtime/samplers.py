"""Samplers: generators of operations on named slots. They know no arrays, no devices and no guidance.

A sampler yields `Predict` and `Combine` operations and leaves the finished latent in slot `STATE`. The initial noise
is in `STATE` when it starts. Noise predictions of step n live in slot `noise(n)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from runtime.schedule import Linear, Schedule, unit

STATE = "x"


@dataclass(frozen=True)
class Job:
    """One evaluation: ε of the latent in a slot at a step, written to another slot."""

    latent: str
    step: int
    output: str


@dataclass(frozen=True)
class Predict:
    """A round: jobs that run at the same time."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Combine:
    """targets[m] = Σ_j rows[m][j] · sources[j]. `finished` steps are done after it, with their state in STATE."""

    sources: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    targets: tuple[str, ...]
    finished: int


Operation = Predict | Combine
Sampler = Callable[[Schedule, int], Iterator[Operation]]


def combination(expressions: Mapping[str, Linear], finished: int) -> Combine:
    """One operation that writes each expression into its slot."""
    sources = tuple(dict.fromkeys(slot for expression in expressions.values() for slot in expression))
    rows = tuple(tuple(e.get(slot, 0.0) for slot in sources) for e in expressions.values())
    return Combine(sources, rows, tuple(expressions), finished)


def sequential(schedule: Schedule, k: int) -> Iterator[Operation]:
    """One evaluation per round: what every other sampler is compared with."""
    for i in range(schedule.steps):
        yield Predict((Job(STATE, i, "noise"),))
        yield combination({STATE: schedule.step(i, unit(STATE), unit("noise"))}, i + 1)


def conservative(schedule: Schedule, k: int) -> Iterator[Operation]:
    """DRiffusion, conservative (supplement, Algorithm 2): a lone evaluation, then k drafts made with it.

    2⌈N/(k+1)⌉ − [N mod (k+1) = 1] rounds.
    """
    i = 0
    while i < schedule.steps:
        yield Predict((Job(STATE, i, _noise(i, k)),))
        ahead = min(k, schedule.steps - 1 - i)
        if ahead:
            yield combination(_drafts(schedule, k, i, ahead, unit(STATE)), i)
            yield _predict_drafts(k, i, ahead)
        x = _refine(schedule, k, i, i + ahead + 1, unit(STATE))
        i += ahead + 1
        yield combination({STATE: x}, i)


def aggressive(schedule: Schedule, k: int) -> Iterator[Operation]:
    """DRiffusion, aggressive (Algorithm 1): each round's last draft also serves as the next round's evaluation.

    1 + ⌈(N−1)/k⌉ rounds. The refine of a round and the drafts of the next are one combination.
    """
    last = schedule.steps - 1
    yield Predict((Job(STATE, 0, _noise(0, k)),))
    i, x = 0, unit(STATE)
    while i < last:
        ahead = min(k, last - i)
        refined = {STATE: x} if i else {}
        yield combination(refined | _drafts(schedule, k, i, ahead, x), i)
        yield _predict_drafts(k, i, ahead)
        x = _refine(schedule, k, i, i + ahead, unit(STATE))
        i += ahead
    yield combination({STATE: schedule.step(last, x, unit(_noise(last, k)))}, schedule.steps)


SAMPLERS: dict[str, Sampler] = {"sequential": sequential, "conservative": conservative, "aggressive": aggressive}


def _noise(step: int, k: int) -> str:
    """The slot of ε at a step; a block of at most k + 1 steps is alive at a time."""
    return f"noise {step % (k + 1)}"


def _draft(ahead: int) -> str:
    return f"draft {ahead}"


def _drafts(schedule: Schedule, k: int, i: int, ahead: int, x: Linear) -> dict[str, Linear]:
    """The states at steps i+1 … i+ahead, made by running the sampler from x_i with its noise prediction frozen.

    For σ = 0 this composes to the paper's skip transition (eq. 14) for every scheduler and spacing.
    """
    drafts = {}
    for n in range(ahead):
        x = schedule.step(i + n, x, unit(_noise(i, k)))
        drafts[_draft(n + 1)] = x
    return drafts


def _predict_drafts(k: int, i: int, ahead: int) -> Predict:
    return Predict(tuple(Job(_draft(n), i + n, _noise(i + n, k)) for n in range(1, ahead + 1)))


def _refine(schedule: Schedule, k: int, start: int, end: int, x: Linear) -> Linear:
    """x_end from x_start by the scheduler's own steps, with the predictions that the drafts were given."""
    for n in range(start, end):
        x = schedule.step(n, x, unit(_noise(n, k)))
    return x
