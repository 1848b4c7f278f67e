"""The benchmark's own arithmetic, and that its floor replays exactly the calls of the engine."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench.floor import placement, replay
from bench.quality import scenes
from bench.run import percentiles, ratio
from engines.base import Array
from engines.manifest import Manifest
from engines.store import Bundle
from export.shapes.data import Scene, random_scene
from runtime import Pipeline
from runtime.schedule import make_schedule


def test_held_out_captions_never_occur_in_training(rng: np.random.Generator) -> None:
    def triples(asked: list[Scene]) -> set[tuple[str, str, str]]:
        return {(s.colour, s.kind, s.place) for scene in asked for s in scene.shapes}

    seen = triples([random_scene(rng, 1 + n % 2) for n in range(4000)])
    asked = triples(scenes(1, 300, 0) + scenes(2, 300, 0))
    assert len(asked) > 20 and not seen & asked


class Counting:
    """A lane that notes the batches it ran and the rounds in which other lanes had already gone ahead."""

    def __init__(self, log: list[tuple[int, int]], number: int, lock: threading.Lock) -> None:
        self.log, self.number, self.lock = log, number, lock

    def inputs(self, batch: int) -> dict[str, Array]:
        return {}

    def run(self, batch: int) -> Array:
        with self.lock:
            self.log.append((self.number, batch))
        return np.zeros(1, np.float32)


@pytest.mark.parametrize("lanes", [1, 2, 3, 5])
def test_the_replay_makes_every_call_and_keeps_rounds_apart(lanes: int, manifest: Manifest) -> None:
    rounds = placement(make_schedule(manifest, None, 13), "conservative", 3, lanes, 4.0)
    log: list[tuple[int, int]] = []
    lock = threading.Lock()
    assert replay([Counting(log, number, lock) for number in range(lanes)], rounds) > 0
    start = 0
    for batches in rounds:
        expected = {(number, batch) for number, batch in enumerate(batches) if batch}
        assert set(log[start : start + len(expected)]) == expected
        start += len(expected)
    assert start == len(log)


@pytest.mark.parametrize("mode", ["sequential", "conservative", "aggressive"])
def test_the_recorded_placement_is_the_engines(mode: str, shapes: Bundle) -> None:
    pipeline = Pipeline(shapes, "cpu*2")
    report = pipeline.generate("a red star", mode=mode, k=3, num_inference_steps=8).report
    pipeline.close()
    rounds = placement(make_schedule(shapes.manifest, None, 8), mode, 3, 2, 4.0)
    assert len(rounds) == report.rounds
    assert sum(map(sum, rounds)) == 2 * report.evaluations
    assert sum(1 for batches in rounds for batch in batches if batch) == report.calls


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
