"""Drafts accepted up to the first that is too far from its refined state (after ParaDiGMS, Shih et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from runtime.sampling.drafts import DRAFTS, Anchor, Window, refine
from runtime.sampling.operations import STATE, Combine, Distance, Evaluation, Operations, Options, Predict, combination
from runtime.sampling.schedule import Linear, Past, Schedule, unit

KEPT = 1024  # rounds of a setting, and as many of what may follow them


def adaptive(schedule: Schedule, options: Options) -> Operations:
    """Accepts the drafts of a round up to the first that is further than `tolerance` from the refined state.

    A round evaluates the state itself and k − 1 drafts, so that it always makes at least one exact step: never more
    rounds than `sequential`, and with tolerance 0 the same steps. This is ParaDiGMS's sliding window (Shih et al. 2023)
    with DRiffusion's drafts; the rejected evaluation that follows the last accepted one makes the next drafts.
    """
    rounds, i, width = _rounds(schedule, options), 0, 1
    accepted: list[float] = []
    while i < schedule.steps:
        round_ = rounds.at(i, width)
        yield round_.predict
        taken = 1
        if width > 1:
            yield round_.refined
            distances = yield round_.distance
            while taken < width and distances[taken - 1] <= options.tolerance:
                taken += 1
            accepted += list(distances[: taken - 1])
        yield rounds.after(i, width, taken)
        i += taken
        width = max(1, min(options.k, schedule.steps - i))
    return tuple(accepted)


@dataclass(frozen=True)
class _Round:
    """What a round of so many evaluations does before it is known how many are accepted, and what follows needs.

    alone: the state after the first step. seen: where each evaluation was made, and its output. ends: history and x̂_0
    after 0, 1, … of the steps.
    """

    predict: Predict
    refined: Combine
    distance: Distance
    alone: Linear
    seen: list[tuple[Linear, str]]
    ends: list[tuple[Past, Linear]]


class _Rounds:
    """The rounds of a setting: they depend on where they begin, how wide they are and what was accepted, not on images.

    Each is made when it comes for the first time, because lanes wait for what the host does between rounds.
    """

    def __init__(self, schedule: Schedule, options: Options) -> None:
        self._schedule, self._options, self._drafts = schedule, options, DRAFTS[options.drafts]
        self.at = lru_cache(maxsize=KEPT)(self._at)
        self.after = lru_cache(maxsize=KEPT)(self._after)

    def _at(self, i: int, width: int) -> _Round:
        """The round at step i: the state itself and `width` − 1 drafts."""
        window = Window("", width - 1)
        seen = [(unit(STATE), window.output(0)), *window.seen()]
        refined: dict[str, Linear] = {}
        ends: list[tuple[Past, Linear]] = [(self._schedule.past(i), {})]
        x = unit(STATE)
        for n in range(width):
            x, past, data = refine(self._schedule, self._drafts, i + n, x, ends[-1][0], seen[n : n + 1])
            ends.append((past, data))
            refined[f"refined {n + 1}"] = x
        return _Round(
            Predict((Evaluation(STATE, i, window.output(0)), *window.predict(i).evaluations)),
            combination(refined, i),
            Distance(tuple((f"refined {n}", window.draft(n)) for n in range(1, width))),
            refined["refined 1"],
            seen,
            ends,
        )

    def _after(self, i: int, width: int, taken: int) -> Combine:
        """The end of a round of which so many steps are accepted: the state there, and the drafts of the next one."""
        schedule, options, this = self._schedule, self._options, self.at(i, width)
        x = unit(f"refined {taken}") if width > 1 else this.alone
        past, data = this.ends[taken]
        i += taken
        made: dict[str, Linear] = {STATE: x} | schedule.history(i, past)
        known = min(options.k, schedule.steps - i) - 1
        if known > 0:
            if taken < width:
                at, output = this.seen[taken]
                estimate = schedule.estimate(i, unit(output), at, x, self._drafts.variance)
            else:
                estimate = schedule.assumed(i, data, x)
            made |= Window("", known).drafts(schedule, options, Anchor(i, x, estimate, estimate.data), past)
        return combination(made, i)


@lru_cache(maxsize=16)
def _rounds(schedule: Schedule, options: Options) -> _Rounds:
    return _Rounds(schedule, options)
