"""Drafts: guesses of the states ahead, and how the outputs of the model at them refine those states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.sampling.operations import Evaluation, Options, Predict, fresh, own_noise_slot
from runtime.sampling.schedule import Estimate, Linear, Past, Schedule, unit, weighted_sum

ANCHOR = "anchor"  # x̂_0 at the anchor of the block before, for drafts that extrapolate


@dataclass(frozen=True)
class Drafts:
    """How states ahead are guessed, and how what the model says there is handed to the refined states.

    The guess of x̂_0 stays at the anchor's; with `extrapolates` it moves on along log σ by what it changed since the
    anchor of the block before, less so for blocks that are long beside the schedule. `variance` splits the difference
    between draft and refined state as `Schedule.estimate` says. `own_noise` draws noise for the drafts of stochastic
    schedulers anew.
    """

    extrapolates: bool = False
    variance: float | None = None
    own_noise: bool = False


# How far images of one kind lie around their common mean, in units of the latents' variance. Of 0, 0.015, 0.04, 0.1,
# 0.25, 0.5 and 1 this was the best on `shapes`; on mixtures of Gaussians the best is the variance of one of them.
LOCAL_VARIANCE = 0.015
DRAFTS = {
    "frozen": Drafts(),  # the paper's
    "fresh": Drafts(own_noise=True),  # the paper's listing for stochastic schedulers, to the letter
    "extrapolated": Drafts(extrapolates=True),
    "corrected": Drafts(variance=LOCAL_VARIANCE),
    "extrapolated+corrected": Drafts(extrapolates=True, variance=LOCAL_VARIANCE),
}


def resolve(drafts: str) -> str:
    """The kind of drafts that `auto` stands for; any other name itself."""
    return drafts if drafts != "auto" else "corrected"


@dataclass(frozen=True)
class Anchor:
    """What drafts start from: step i, its state and estimate, x̂_0 at the state the model saw, and the anchor before."""

    i: int
    x: Linear
    estimate: Estimate
    seen: Linear
    before: int | None = None

    def guess(self, schedule: Schedule, drafts: Drafts, n: int, k: int) -> Linear:
        """x̂_0 at step n > i."""
        if not drafts.extrapolates or self.before is None:
            return self.estimate.data
        weight = min(1.0, max(0.0, 1.25 * (1 - k / (0.1 * schedule.steps))))
        before, here, there = (_log_sigma(schedule, i) for i in (self.before, self.i, n))
        if before == here:  # evaluated twice at one noise level, as PNDM begins: no direction to go on in
            return self.estimate.data
        ahead = weight * (there - here) / (here - before)
        return weighted_sum((1.0, self.estimate.data), (ahead, self.seen), (-ahead, unit(ANCHOR)))


def _log_sigma(schedule: Schedule, i: int) -> float:
    """ln(σ/α), infinite where the state is pure noise."""
    row = schedule.rows[i]
    return math.log(row.sigma / row.alpha) if row.alpha else math.inf


@dataclass(frozen=True)
class Window:
    """The slots of one round's drafts and their outputs; two names take turns where a round reads the last one's."""

    name: str
    ahead: int

    def draft(self, n: int) -> str:
        """The slot of the n-th draft, from 1."""
        return f"draft {self.name}{n}"

    def output(self, n: int) -> str:
        """The slot of what the model makes of it; 0 is the anchor."""
        return f"output {self.name}{n}"

    def drafts(self, schedule: Schedule, options: Options, anchor: Anchor, past: Past) -> dict[str, Linear]:
        """The states at steps i+1 … i+ahead: the sampler run on with a guess in place of the model.

        With x̂_0 frozen and no noise this composes to the paper's skip transition (eq. 14) for every scheduler.
        """
        drafts = DRAFTS[options.drafts]
        made: dict[str, Linear] = {}
        estimate, x = anchor.estimate, anchor.x
        for n in range(anchor.i, anchor.i + self.ahead):
            if n > anchor.i:
                estimate = schedule.assumed(n, anchor.guess(schedule, drafts, n, options.k), x)
            following = schedule.step(n, estimate, past, own_noise_slot(n) if drafts.own_noise else fresh(n))
            x, past = following, schedule.keep(n, estimate, past)
            made[self.draft(n - anchor.i + 1)] = x
        return made

    def predict(self, i: int) -> Predict:
        """The round that evaluates the drafts of a block that starts at i."""
        return Predict(tuple(Evaluation(self.draft(n), i + n, self.output(n)) for n in range(1, self.ahead + 1)))

    def seen(self) -> list[tuple[Linear, str]]:
        """The state and the output of every draft."""
        return [(unit(self.draft(n)), self.output(n)) for n in range(1, self.ahead + 1)]


def refine(
    schedule: Schedule, drafts: Drafts, start: int, x: Linear, past: Past, seen: Sequence[tuple[Linear, str]]
) -> tuple[Linear, Past, Linear]:
    """The state after the steps from `start` on, by the scheduler's own rule, its past, and x̂_0 of the last of them.

    `seen` holds, per step, the state that the model was evaluated at and the slot of its output.
    """
    data: Linear = {}
    for n, (at, output) in enumerate(seen, start):
        estimate = schedule.estimate(n, unit(output), at, x, drafts.variance)
        x = schedule.step(n, estimate, past, fresh(n))
        past, data = schedule.keep(n, estimate, past), estimate.data
    return x, past, data
