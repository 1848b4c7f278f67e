"""The scheduler's own loop, one evaluation per step: what every other sampler is compared with."""

from __future__ import annotations

from runtime.sampling.cache import Cache
from runtime.sampling.operations import STATE, Evaluation, Operations, Options, Predict, combination, fresh
from runtime.sampling.schedule import Schedule, unit


def sequential(schedule: Schedule, options: Options) -> Operations:
    """One evaluation per round: what every other sampler is compared with."""
    x, cache = unit(STATE), Cache(options.cache_interval)
    for i in range(schedule.steps):
        yield cache.predict(Predict((Evaluation(STATE, i, "output"),)), 0)
        estimate = schedule.estimate(i, unit("output"), x, x)
        past = schedule.past(i)
        following = {STATE: schedule.step(i, estimate, past, fresh(i))}
        yield combination(following | schedule.history(i + 1, schedule.keep(i, estimate, past)), i + 1)
    return ()
