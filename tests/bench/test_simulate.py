"""The simulator against closed forms, and its validation end to end."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench import moves, simulate
from bench.gpu.engine import schedule
from bench.moves import Link, gathered
from bench.page.tables import load
from bench.simulation import costs as simulated_costs
from bench.simulation import predict as prediction
from bench.simulation import tables
from bench.simulation.costs import BATCHES, LinkCosts, MeasuredCosts, measured_costs
from bench.simulation.predict import MODES, PAPER, Table, of_the_paper, options, predict, predictions
from bench.simulation.validate import Recorder
from engines.host import FunctionLane, HostBackend
from engines.manifest import Manifest
from engines.null import NullBackend
from engines.store import Bundle
from runtime.auto import rehearse
from runtime.sampling.execute import denoise
from runtime.sampling.operations import Options
from runtime.sampling.schedulers import make_schedule

TABLE = Table("a device", "invented", 0.1, 1 << 15)


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 50])
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("mode", ["sequential", "conservative", "aggressive"])
def test_without_overhead_and_copies_the_speed_up_is_n_over_rounds(mode: str, devices: int, steps: int) -> None:
    one, _ = predict("sequential", schedule(steps), 1, TABLE, moves.NVLINK, split=False, free=True)
    assert one == pytest.approx(steps * TABLE.evaluation)
    seconds, counts = predict(mode, schedule(steps), devices, TABLE, moves.NVLINK, split=False, free=True)
    assert one / seconds == pytest.approx(steps / counts.rounds)
    rounds = {
        "sequential": steps,
        "conservative": 2 * -(-steps // (devices + 1)) - (steps % (devices + 1) == 1),
        "aggressive": 1 + -(-(steps - 1) // devices),
    }
    assert counts.rounds == rounds[mode]


def test_split_guidance_has_the_known_shares() -> None:
    """50 steps, a branch costing one half: on 2 devices exactly 2; 4 with k = 2 3.85; 8 with k = 4 7.14."""
    table = Table("", "", 0.1, 1 << 15, branch_share=0.5)
    one, _ = predict("sequential", schedule(50), 1, table, moves.NVLINK, split=False, free=True)

    def speedup(mode: str, devices: int) -> float:
        return one / predict(mode, schedule(50), devices, table, moves.NVLINK, split=True, free=True)[0]

    assert [speedup("sequential", n) for n in (1, 2, 4)] == pytest.approx([1.0, 2.0, 2.0])
    assert [speedup("aggressive", n) for n in (2, 4, 8)] == pytest.approx([2.0, 3.846, 7.143], abs=1e-3)
    real = Table("", "", 0.1, 1 << 15)
    whole = real.call(split=True)
    assert [whole(n) for n in (1, 2, 3, 4)] == pytest.approx([0.056, 0.1, 0.156, 0.2])


def test_a_round_adds_up_calls_copies_and_launches() -> None:
    link = Link("slow", latency=1.0, bandwidth=10.0, event=0.25)
    assert gathered([5.0], [1], 100, link) == 5.0, "at home nothing is copied"
    one_away = 10 + 0.25 + 1 + 5 + 10 + 1 + 0.25  # send, event, latency, call, send back, latency, event
    assert gathered([5.0, 5.0], [1, 1], 100, link) == pytest.approx(one_away)
    assert gathered([5.0, 5.0, 0.0], [1, 1, 0], 100, link) == pytest.approx(one_away), "an idle device costs nothing"
    assert gathered([500.0, 5.0], [1, 1], 100, link) == 500.0, "the longest call hides the others' copies"
    assert gathered([5.0] * 3, [1] * 3, 100, link) == pytest.approx(one_away + 10), "one link, one copy at a time"
    costs = LinkCosts(lambda branches: float(branches), 100, link, combine_seconds=0.5, launch=0.125)
    backend = NullBackend(2, costs)
    counts = rehearse("sequential", Options(), schedule(3), 2.0, backend)
    assert counts.rounds == 3
    assert backend.seconds == pytest.approx(3 * (0.125 + gathered([1, 1], [1, 1], 100, link) + 0.5))
    assert costs.distances(7) == pytest.approx(0.625)


@pytest.mark.parametrize("mode", MODES)
def test_slower_links_never_help_and_never_change_the_plan(mode: str) -> None:
    answers = [0.0] * 500 if mode == "adaptive" else None
    found = [
        predict(mode, schedule(20), 4, TABLE, link, split=True, distances=answers)
        for link in (moves.NVLINK, moves.PCIE, moves.ETHERNET)
    ]
    assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)
    assert len({counts.rounds for _, counts in found}) == 1


def test_what_adaptive_measured_is_played_again(manifest: Manifest, rng: np.random.Generator) -> None:
    """The plan of a sampler that measures depends on the answers: the null backend replays them on any lanes."""
    weights = rng.standard_normal((1, 4, 1, 1)).astype(np.float32)
    lanes = [FunctionLane(lambda sample, timestep, _: np.tanh(sample * weights)) for _ in range(2)]
    backend, plan = HostBackend(lanes), make_schedule(manifest, "ddim", 17)
    chosen = Options(4, tolerance=0.02)
    with Recorder(backend) as recorder:
        noise = rng.standard_normal((1, 4, 2, 2), np.float32)
        _, counts = denoise(backend, noise, [{}, {}], plan, "adaptive", chosen, 4.0, 0, lambda finished: None)
    assert recorder.answers and "distances" not in vars(backend)
    backend.close()
    for count in (1, 3, 8):
        null = NullBackend(count, answers=iter(recorder.answers))
        again = rehearse("adaptive", chosen, plan, 4.0, null)
        assert (again.rounds, again.evaluations, again.accepted) == (counts.rounds, counts.evaluations, counts.accepted)


def test_measured_costs_are_those_of_the_lanes(manifest: Manifest) -> None:
    lanes = [FunctionLane(lambda sample, timestep, _: sample) for _ in range(2)]
    backend, plan = HostBackend(lanes), make_schedule(manifest, "ddim", 5)
    noise = np.ones((1, 4, 8, 8), np.float32)
    denoise(backend, noise, [{}, {}], plan, "sequential", Options(), 4.0, 0, lambda finished: None)
    costs = measured_costs(backend, {(3, 2), (1, 4)})
    backend.close()
    assert set(costs.calls) == set(costs.launch) == {1, 2} and set(costs.calls[2]) == set(BATCHES)
    assert all(seconds > 0 for one in costs.calls.values() for seconds in one.values())
    assert costs.combine(3, 2) > 0 and costs.combine(1, 4) > 0 and costs.distances(2) == 2 * costs.distance > 0
    a = MeasuredCosts({1: {1: 1.0}}, {1: 2.0}, {(1, 1): 3.0}, 4.0)
    b = MeasuredCosts({1: {1: 3.0}}, {1: 4.0}, {(1, 1): 5.0}, 6.0)
    assert a.mean(b) == MeasuredCosts({1: {1: 2.0}}, {1: 3.0}, {(1, 1): 4.0}, 5.0)


def test_the_papers_points_are_predicted_from_their_sequential_row() -> None:
    rows = of_the_paper()
    assert len(rows) == sum(len(published.speedups) for published in PAPER) == 18
    above = {row["model"]: row["error"] for row in rows if row["published_speedup"] > row["speedup_in_rounds"]}
    assert sum(row["error"] < 0 for row in rows) == 5 and set(above) == {"SD 2.1", "SDXL", "SD 3"}, "as the page says"
    for row in rows:
        assert row["speedup"] == pytest.approx(row["speedup_in_rounds"], rel=1e-3), "calls hide all else, says the page"
        assert row["error"] == pytest.approx(row["speedup"] / row["published_speedup"] - 1, abs=2e-3)


def test_the_tables_agree_with_themselves() -> None:
    rows = load("simulate")["rows"]
    for line in tables.validation_table(rows).splitlines()[2:]:
        measured, predicted, error = (float(re.findall(r"[-+.\d]+", cell)[0]) for cell in line.split("|")[6:9])
        assert predicted == pytest.approx(measured * (1 + error / 100), abs=2e-3), "within what is rounded away"
    said = " ".join(tables.in_short(rows))
    for kind in ("validation", "paper"):
        errors = [row["error"] for row in rows if row["kind"] == kind]
        middles = [error["median"] if kind == "validation" else error for error in errors]
        worst = max(middles, key=abs)
        assert f"{100 * np.median(np.abs(middles)):.1f} % off" in said and f"at most {100 * worst:+.1f} % (" in said


def test_predictions_cover_everything_and_leave_out_what_was_not_recorded() -> None:
    rows = predictions([TABLE], {}, devices=(1, 3))
    assert len(rows) == 2 * 3 * 2 * 4 and {row["mode"] for row in rows} == set(MODES) - {"adaptive"}
    recorded = {(50, k): [0.0] * 200 for k in (1, 3)}
    assert "adaptive" in {row["mode"] for row in predictions([TABLE], recorded, devices=(1, 3))}
    assert options("conservative", 8, split=True).k == 4 and options("conservative", 8, split=False).k == 8


def test_the_command_predicts_without_a_model_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, plot = tmp_path / "simulate.json", tmp_path / "simulate.png"
    arguments = ["simulate", "--no-validation", "--json", str(target), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    monkeypatch.setattr(prediction, "DEVICES", (1, 2, 4))
    assert command.main() == 0 and "SD 2.1-base" in capsys.readouterr().out
    assert {row["kind"] for row in json.loads(target.read_text())["rows"]} == {"table", "link", "paper", "prediction"}
    assert plot.stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["bench", "simulate", "--branch-share", "0.2"])
    assert command.main() == 1 and "branch_share must be at least 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_the_validation_runs_the_plans_that_it_predicts(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulate, "DEVICES", (1, 2))
    monkeypatch.setattr(prediction, "DEVICES", (1, 2))
    monkeypatch.setattr(simulated_costs, "BATCHES", (1, 2))
    rows = simulate.measure(
        "shapes", shapes.folder.parent, "cpu*2", 1, 4, [1.0], 0.01, 0.56, 0.005, None, validation=True
    )  # fmt: skip
    checked = [row for row in rows if row["kind"] == "validation"]
    assert [(row["lanes"], row["mode"]) for row in checked] == [(n, mode) for n in (1, 2) for mode in MODES]
    assert all(row["predicted_seconds"] > 0 and row["error"]["low"] <= row["error"]["high"] for row in checked)
    assert [row["kind"] for row in rows].count("costs") == 2
    assert any(row["kind"] == "prediction" and row["mode"] == "adaptive" for row in rows)
