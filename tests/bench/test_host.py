"""What the CUDA engine costs the host, and the limits of what it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import host
from runtime.sampling.operations import Options
from tests import ROOT
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus
CALLS, MICROSECONDS = 6, 12.0


@pytest.fixture(autouse=True)
def machine() -> Machine:
    """GPUs that do nothing but say that they have done it."""
    machine = Machine(1, eager=0)
    machine.set("computes", 0)
    return machine


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize(("mode", "options"), host.TIMED, ids=lambda value: str(value))
def test_six_driver_calls(lanes: int, mode: str, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "REPEATS", 3)
    row = host.timed(lanes, mode, options)
    assert row["driver_calls"] <= CALLS
    assert row["us"] < 5 * MICROSECONDS, "far beyond the goal, which a busy machine does not explain"


@pytest.mark.parametrize("sizes", [1, 3])
def test_what_is_kept_is_bounded(sizes: int) -> None:
    row = host.kept(sizes)
    assert row["graphs"] <= 96 and row["rounds"] <= 512 and row["contexts"] <= 8 * 8


def test_images_are_not_made_of_graphs_that_never_come_again() -> None:
    assert host.captured()["graphs"] <= 16


def test_the_committed_figures_keep_the_goal() -> None:
    rows = json.loads(Path(ROOT, "bench", "results", "host.json").read_text())["rows"]
    timed = [row for row in rows if row["what"] == "host time per round" and row["when"] == "now"]
    assert {(row["mode"], row["lanes"]) for row in timed} == {
        (mode, n) for mode in ("sequential", "aggressive") for n in (1, 2, 4, 8)
    }
    assert all(row["us"] <= MICROSECONDS and row["driver_calls"] <= CALLS for row in timed)
    for what in ("kept after images", "graphs of two images"):
        figures = {row["when"]: row["graphs"] for row in rows if row["what"] == what and row.get("batch_sizes", 1) == 1}
        assert figures["now"] < figures["before"] / 2, what
