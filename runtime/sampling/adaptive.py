"""Drafts accepted up to the first that is too far from its refined state (after ParaDiGMS, Shih et al. 2023)."""

from __future__ import annotations

from runtime.sampling.drafts import DRAFTS, Anchor, Window, refine
from runtime.sampling.operations import STATE, Distance, Evaluation, Operations, Options, Predict, combination
from runtime.sampling.schedule import Linear, Past, Schedule, unit


def adaptive(schedule: Schedule, options: Options) -> Operations:
    """Accepts the drafts of a round up to the first that is further than `tolerance` from the refined state.

    A round evaluates the state itself and k − 1 drafts, so that it always makes at least one exact step: never more
    rounds than `sequential`, and with tolerance 0 the same steps. This is ParaDiGMS's sliding window (Shih et al. 2023)
    with DRiffusion's drafts; the rejected evaluation that follows the last accepted one makes the next drafts.
    """
    i, known, accepted = 0, 0, []  # `known` drafts are ready at i + 1 … i + known
    drafts = DRAFTS[options.drafts]
    while i < schedule.steps:
        width = min(known + 1, schedule.steps - i)
        window = Window("", width - 1)
        yield Predict((Evaluation(STATE, i, window.output(0)), *window.predict(i).evaluations))
        seen = [(unit(STATE), window.output(0)), *window.seen()]
        refined: dict[str, Linear] = {}
        ends: list[tuple[Past, Linear]] = [(schedule.past(i), {})]  # what follows 0, 1, … of the evaluations
        x = unit(STATE)
        for n in range(width):
            x, past, data = refine(schedule, drafts, i + n, x, ends[-1][0], seen[n : n + 1])
            ends.append((past, data))
            refined[f"refined {n + 1}"] = x
        taken = 1
        if width > 1:
            yield combination(refined, i)
            distances = yield Distance(tuple((f"refined {n}", window.draft(n)) for n in range(1, width)))
            while taken < width and distances[taken - 1] <= options.tolerance:
                taken += 1
            accepted += list(distances[: taken - 1])
            x = unit(f"refined {taken}")
        i += taken
        past, data = ends[taken]
        made: dict[str, Linear] = {STATE: x} | schedule.history(i, past)
        known = min(options.k, schedule.steps - i) - 1
        if known > 0:
            ahead = Window("", known)
            if taken < width:
                at, output = seen[taken]
                estimate = schedule.estimate(i, unit(output), at, x, drafts.variance)
            else:
                estimate = schedule.assumed(i, data, x)
            made |= ahead.drafts(schedule, options, Anchor(i, x, estimate, estimate.data), past)
        yield combination(made, i)
    return tuple(accepted)
