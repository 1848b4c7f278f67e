"""Which plans `bench cache` compares, and what a curve of call times means for drafts on one lane."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from bench.cache import ANCHORS, BATCHES, KS, Timed, _curve_row, call_curve, curve, plans, table
from bench.quality import STEPS
from engines.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.sampling.operations import Options, Predict
from runtime.sampling.samplers import SAMPLERS
from runtime.sampling.schedulers import make_schedule


def test_every_plan_evaluates_something_else(manifest: Manifest) -> None:
    cases, played = plans(1), set()
    for case in cases:
        schedule = make_schedule(manifest, "ddim", case.steps)
        operations = SAMPLERS[case.mode](schedule, Options(**case.options))
        rounds = tuple(
            tuple((one.step, bool(one.keep), bool(one.features)) for one in operation.evaluations)
            for operation in operations
            if isinstance(operation, Predict)
        )
        assert rounds not in played, case.name
        played.add(rounds)
    assert cases[0].options == {} and cases[0].steps == STEPS
    assert len({case.name for case in cases}) == len(cases) and max(KS) < ANCHORS


def test_drafts_on_one_lane_gain_what_larger_calls_gain(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "ddim", STEPS)
    proportional = _curve_row("x", {branches: 0.01 * branches for branches in BATCHES}, schedule)
    assert all(one["gain"] == pytest.approx(1) for one in proportional["gains"])
    assert set(proportional["of_proportional"].values()) == {1.0}
    level = _curve_row("x", dict.fromkeys(range(1, 33), 0.01), schedule)
    rounds = {"conservative": lambda k: 2 * -(-STEPS // (k + 1)) - (STEPS % (k + 1) == 1),
              "aggressive": lambda k: 1 - (1 - STEPS) // k}  # fmt: skip
    for one in level["gains"]:
        assert one["gain"] == pytest.approx(STEPS / rounds[one["mode"]](one["k"]), abs=1e-4)


def test_a_curve_is_read_or_refused() -> None:
    assert curve("H100=1:0.5,2:1e-2,16:3") == ("H100", {1: 0.5, 2: 0.01, 16: 3.0})
    for text in ("", "x", "x=", "=1:1", "x=1:1;2:2", "x=0:1", "x=1:0", "x=1:-1", "x=1:1,", "x=1:1e", "x=a:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=BRANCHES:SECONDS"):
            curve(text)


def test_plans_are_timed_in_turns_and_tabled(pipeline: Pipeline) -> None:
    cases = [case for case in plans(1) if case.name in ("sequential", "sequential, 10 steps", "aggressive, k = 4")]
    timed = Timed(pipeline, cases)
    timed.measure(2, 0)
    rows: list[dict[str, Any]] = [
        {"kind": "plan", "name": case.name, "rounds": 3, "drift": {"median": 0.25, "p90": 0.5}, "caption_accuracy": 0.5,
         "on": {timed.devices: timed.row(case)}}
        for case in cases
    ]  # fmt: skip
    assert rows[0]["on"][timed.devices]["speedup"]["median"] == 1
    assert all(len(seconds) == 2 for seconds in timed.seconds.values()) and len(timed.seconds) == len(cases)
    costs = call_curve(pipeline)
    assert tuple(costs) == BATCHES and all(seconds > 0 for seconds in costs.values())
    shown = table([*rows, _curve_row("here", costs, make_schedule(pipeline.manifest, "ddim", STEPS))])
    assert "| sequential | 3 | 0.2500 (0.5000) | 50.0 % |" in shown and "seconds, 2 lanes" in shown
    assert shown.count("| here |") == 2
