"""Feature caching: which evaluations have a deep part, and what the others take in its place."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from engines.errors import ParameterError
from engines.manifest import Manifest
from engines.null import CallCosts, NullBackend
from runtime.sampling.cache import Cache
from runtime.sampling.execute import execute
from runtime.sampling.operations import STATE, Evaluation, Options, Predict
from runtime.sampling.program import program
from runtime.sampling.samplers import CACHING, SAMPLERS, check
from runtime.sampling.schedulers import make_schedule

SHAPE = (1, 4, 2, 2)


def rounds(mode: str, steps: int, options: Options, manifest: Manifest) -> list[Predict]:
    operations = SAMPLERS[mode](make_schedule(manifest, "ddim", steps), options)
    return [operation for operation in operations if isinstance(operation, Predict)]


@pytest.mark.parametrize("mode", CACHING)
@pytest.mark.parametrize("interval", [2, 3, 7, 64])
def test_features_that_change_along_a_line_are_met_exactly(mode: str, interval: int, manifest: Manifest) -> None:
    """From the second deep part on; before it, the first features are all there is."""
    steps = 31
    slots: dict[str, float] = {}
    whole = 0
    for predict in rounds(mode, steps, Options(k=4, cache_interval=interval), manifest):
        known = whole
        for one in predict.evaluations:
            assert bool(one.keep) != bool(one.features)
            if one.features:
                taken = sum(weight * slots[slot] for slot, weight in one.features)
                assert sum(weight for _, weight in one.features) == pytest.approx(1)
                assert taken == pytest.approx(one.step if known > 1 else 0)
        for one in predict.evaluations:
            if one.keep:
                slots[one.keep], whole = float(one.step), whole + 1
    assert 1 <= whole < steps


@pytest.mark.parametrize(("mode", "expected"), [
    ("sequential", [0, 3, 6, 9, 12]),
    ("conservative", [0, 3, 5, 8, 10, 13]),  # blocks of 5 steps, and every third step in each
    ("aggressive", [0, 3, 4, 7, 8, 11, 12, 13]),  # every third step of each round of 4, and its last
])  # fmt: skip
def test_the_steps_with_a_deep_part(mode: str, expected: list[int], manifest: Manifest) -> None:
    played = rounds(mode, 14, Options(k=4, cache_interval=3), manifest)
    assert [one.step for predict in played for one in predict.evaluations if one.keep] == expected


@pytest.mark.parametrize("mode", CACHING)
def test_an_interval_of_one_changes_nothing(mode: str, manifest: Manifest) -> None:
    played = rounds(mode, 9, Options(k=3), manifest)
    assert not any(one.keep or one.features for predict in played for one in predict.evaluations)


def test_features_that_a_round_reads_are_not_overwritten_in_it() -> None:
    cache, kept = Cache(2), defaultdict[str, int](int)
    for first in range(0, 40, 4):
        predict = cache.predict(Predict(tuple(Evaluation(STATE, n, f"{n}") for n in range(first, first + 4))), 0)
        read = {slot for one in predict.evaluations for slot, _ in one.features}
        made = [one.keep for one in predict.evaluations if one.keep]
        assert not read & set(made) and len(set(made)) == len(made)
        for slot in made:
            kept[slot] += 1
    assert len(kept) <= 4


@pytest.mark.parametrize("mode", CACHING)
def test_slots_are_written_before_they_are_read(mode: str, manifest: Manifest, rng: np.random.Generator) -> None:
    for _ in range(8):
        steps, k, interval = (int(rng.integers(*bounds)) for bounds in ((2, 40), (1, 9), (2, 12)))
        schedule, options = make_schedule(manifest, "ddim", steps), Options(k=k, cache_interval=interval)
        backend = NullBackend(2, CallCosts(float))
        backend.bind(SHAPE, schedule.timesteps, ())
        backend.write(STATE, np.zeros(SHAPE, np.float32))
        execute(program(mode, schedule, options, 4.0), backend, lambda finished: None)
        assert backend.branches == 2 * steps


def test_samplers_that_cannot_reuse_features_refuse(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "ddim", 8)
    for mode in ("srds", "adaptive"):
        with pytest.raises(ParameterError, match=f"{mode} cannot reuse features: use mode sequential or"):
            check(mode, schedule, Options(cache_interval=2))
    with pytest.raises(ParameterError, match="cache_interval"):
        check("sequential", schedule, Options(cache_interval=0))
