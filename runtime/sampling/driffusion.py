"""DRiffusion (CVPR 2026), conservative and aggressive: draft, predict concurrently, refine."""

from __future__ import annotations

from runtime.sampling.cache import Cache
from runtime.sampling.drafts import ANCHOR, DRAFTS, Anchor, Window, refine
from runtime.sampling.operations import STATE, Evaluation, Operations, Options, Predict, combination, fresh
from runtime.sampling.schedule import Schedule, unit


def conservative(schedule: Schedule, options: Options) -> Operations:
    """DRiffusion, conservative (supplement, Algorithm 2): a lone evaluation, then k drafts made with it.

    2⌈N/(k+1)⌉ − [N mod (k+1) = 1] rounds.
    """
    i, block, x, drafts, before = 0, 0, unit(STATE), DRAFTS[options.drafts], None
    cache = Cache(options.cache_interval)
    while i < schedule.steps:
        ahead, block = min(options.ahead(block), schedule.steps - 1 - i), block + 1
        window = Window("", ahead)
        yield cache.predict(Predict((Evaluation(STATE, i, window.output(0)),)), i)
        estimate = schedule.estimate(i, unit(window.output(0)), x, x)
        if ahead:
            anchor = Anchor(i, x, estimate, estimate.data, before)
            yield combination(window.drafts(schedule, options, anchor, schedule.past(i)), i)
            yield cache.predict(window.predict(i), i)
        seen = [(x, window.output(0)), *window.seen()]
        end, past, _ = refine(schedule, drafts, i, x, schedule.past(i), seen)
        before, i = i, i + ahead + 1
        kept = schedule.history(i, past) | ({ANCHOR: estimate.data} if drafts.extrapolates else {})
        yield combination({STATE: end} | kept, i)
    return ()


def aggressive(schedule: Schedule, options: Options) -> Operations:
    """DRiffusion, aggressive (Algorithm 1): each round's last draft also serves as the next round's evaluation.

    1 + ⌈(N−1)/k⌉ rounds. The refine of a round and the drafts of the next are one combination. Of drafts that reuse
    features, the last one is whole.
    """
    i, block, last, drafts, before = 0, 0, schedule.steps - 1, DRAFTS[options.drafts], None
    window, cache = Window("b", 0), Cache(options.cache_interval)
    yield cache.predict(Predict((Evaluation(STATE, 0, window.output(0)),)), 0)
    at, output = unit(STATE), window.output(0)  # the state at which the anchor was evaluated, and what came of it
    x, past = unit(STATE), schedule.past(0)
    while i < last:
        ahead, block = min(options.ahead(block), last - i), block + 1
        window = Window("a" if window.name == "b" else "b", ahead)  # the anchor's slots are still read
        estimate = schedule.estimate(i, unit(output), at, x, drafts.variance)
        anchor = Anchor(i, x, estimate, schedule.estimate(i, unit(output), at, at).data, before)
        made = window.drafts(schedule, options, anchor, past)
        kept = ({STATE: x} if i else {}) | schedule.history(i, past)
        kept |= {ANCHOR: anchor.seen} if drafts.extrapolates else {}
        yield combination(kept | made, i)
        yield cache.predict(window.predict(i), i, {i + ahead})
        seen = [(at if i else unit(STATE), output), *window.seen()]
        x, past, _ = refine(schedule, drafts, i, unit(STATE), schedule.past(i), seen[:-1])
        at, output = seen[-1]
        before, i = i, i + ahead
    estimate = schedule.estimate(last, unit(output), at, x, drafts.variance)
    yield combination({STATE: schedule.step(last, estimate, past, fresh(last))}, schedule.steps)
    return ()
