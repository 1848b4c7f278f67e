"""The benchmark's own arithmetic, and that its floor replays exactly the calls of the engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench.floor import replay
from bench.quality import scenes
from bench.run import percentiles, ratio
from engines.base import Array
from engines.host import FunctionLane, HostBackend
from engines.manifest import Manifest
from engines.store import Bundle
from export.shapes.data import Scene, random_scene
from runtime.execute import execute, plan
from runtime.samplers import STATE, Options
from runtime.schedulers import make_schedule


def test_held_out_captions_never_occur_in_training(rng: np.random.Generator) -> None:
    def triples(asked: list[Scene]) -> set[tuple[str, str, str]]:
        return {(s.colour, s.kind, s.place) for scene in asked for s in scene.shapes}

    seen = triples([random_scene(rng, 1 + n % 2) for n in range(4000)])
    asked = triples(scenes(1, 300, 0) + scenes(2, 300, 0))
    assert len(asked) > 20 and not seen & asked


@pytest.mark.parametrize("mode", ["sequential", "conservative", "adaptive"])
@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_the_replay_makes_every_call_and_keeps_rounds_apart(mode: str, lanes: int, manifest: Manifest) -> None:
    log: list[tuple[int, int]] = []
    lock = threading.Lock()

    def counting(number: int) -> FunctionLane:
        def model(sample: Array, timestep: Array, conditioning: object) -> Array:
            with lock:
                log.append((number, len(sample)))
            return np.tanh(sample)

        return FunctionLane(model)

    schedule = make_schedule(manifest, "ddim", 13)
    backend = HostBackend([counting(number) for number in range(lanes)])
    backend.bind((1, 4, 2, 2), schedule.timesteps, [{}, {}])
    backend.write(STATE, np.ones((1, 4, 2, 2), np.float32))
    counts = execute(plan(mode, schedule, Options(3, tolerance=0.01), lanes, 4.0), backend, lambda finished: None)
    played, rounds = log.copy(), backend.played
    log.clear()
    assert replay(backend) > 0
    assert len(rounds) == counts.rounds and len(log) == len(played) == counts.calls
    start = 0
    for calls in rounds:
        expected = {(number, len(call)) for number, call in enumerate(calls) if call}
        assert set(log[start : start + len(expected)]) == expected == set(played[start : start + len(expected)])
        start += len(expected)
    backend.close()


def test_ratios_and_percentiles() -> None:
    assert percentiles([1, 2, 3, 4, 5]) == {"p20": 1.8, "p50": 3.0, "p80": 4.2}
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    spread = ratio(list(np.linspace(1, 2, 50)), [1.0] * 50)
    assert 1 < spread["low"] < spread["median"] < spread["high"] < 2


def test_a_short_run_writes_a_result_file(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run.json"
    monkeypatch.setattr(
        "sys.argv", ["bench", "run", "--steps", "3", "--images", "2", "--warmup", "1", "--json", str(target)]
    )
    assert command.main() == 0
    rows = json.loads(target.read_text())["rows"]
    assert [row["mode"] for row in rows] == ["sequential", "sequential", "sequential", "conservative", "aggressive"]
    assert rows[2]["drift"]["median"] < 1e-4 and rows[0]["speedup"]["median"] == 1
    assert all(row["images"] == 2 and row["share_of_floor"]["median"] > 0 for row in rows)
    assert "aggressive, 2 lanes" in capsys.readouterr().out


def test_quality_is_refused_for_a_model_the_checker_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "quality", "--model", "other"])
    assert command.main() == 1
    assert "'shapes' only" in capsys.readouterr().err
