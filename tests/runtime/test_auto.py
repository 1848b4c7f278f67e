"""Mode `auto`: the cost model, the choice, what is stored, and what it says when nothing was measured."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from scipy import stats
from skimage.metrics import peak_signal_noise_ratio

from engines.errors import ParameterError
from engines.manifest import Manifest
from engines.null import CallCosts, NullBackend
from engines.store import Bundle
from runtime import Pipeline
from runtime.auto import (
    EXACT,
    Calibration,
    Candidate,
    Drift,
    Setting,
    call_seconds,
    choose,
    predicted_seconds,
    rehearse,
    seconds_by_lanes,
)
from runtime.calibrate import BATCHES, calibrate, psnr
from runtime.calibrate import main as command
from runtime.sampling.operations import Options
from runtime.sampling.samplers import SAMPLERS, measures
from runtime.sampling.schedulers import make_schedule

SETTING = Setting(scheduler="ddim", eta=0.0, steps=50, guidance_scale=4.0)
LINEAR = {1: 1.0, 2: 2.0, 4: 4.0}


def drift(mode: str, k: int, bound: float, psnr_bound: float = 40.0) -> Drift:
    candidate = Candidate(mode=mode, k=k, drafts="corrected")
    return Drift(setting=SETTING, candidate=candidate, images=8, median=bound / 2, bound=bound, psnr_bound=psnr_bound)


def test_call_times_are_interpolated_and_grow_beyond_what_was_measured() -> None:
    seconds = call_seconds({1: 1.0, 2: 1.5, 4: 2.0})
    assert [seconds(branches) for branches in (1, 2, 3, 4, 8)] == [1.0, 1.5, 1.75, 2.0, 4.0]


@pytest.mark.parametrize(
    ("mode", "k", "lanes", "guidance", "expected"),
    [
        ("sequential", 1, 1, 4.0, 100), ("sequential", 1, 2, 4.0, 50), ("sequential", 1, 2, 1.0, 50),
        ("aggressive", 4, 4, 1.0, 14), ("aggressive", 4, 4, 4.0, 26), ("aggressive", 2, 4, 4.0, 26),
        ("conservative", 4, 4, 1.0, 20),
    ],
)  # fmt: skip
def test_the_cost_model_adds_up_the_critical_path(
    mode: str, k: int, lanes: int, guidance: float, expected: float, manifest: Manifest
) -> None:
    """A branch costs one second on every lane; on 4 lanes guidance is split and drafts run at once."""
    schedule = make_schedule(manifest, "ddim", 50)
    candidate = Candidate(mode=mode, k=k, drafts="corrected")
    assert predicted_seconds(candidate, schedule, lanes, guidance, LINEAR, 1) == expected


@pytest.mark.parametrize("mode", SAMPLERS)
@pytest.mark.parametrize(("k", "guidance", "images"), [(1, 4.0, 1), (3, 1.0, 2), (5, 4.0, 3)])
def test_the_table_of_lanes_is_what_the_virtual_clock_says(
    mode: str, k: int, guidance: float, images: int, manifest: Manifest, rng: np.random.Generator
) -> None:
    """A table from the sizes of rounds is the same as playing the whole sampler on each number of lanes."""
    schedule, options = make_schedule(manifest, "ddim", 17), Options(k=k)
    seconds = call_seconds(dict(zip((1, 2, 4, 9), np.cumsum(rng.uniform(0.1, 1, 4)).tolist(), strict=True)))
    alone = measures(mode, options)

    def played(lanes: int) -> float:
        backend = NullBackend(lanes, CallCosts(lambda branches: seconds(branches * (1 if alone else images))))
        rehearse(mode, options, schedule, guidance, backend)
        return backend.seconds * (images if alone else 1)

    table = seconds_by_lanes(mode, options, schedule, guidance, 6, seconds, images)
    assert table == pytest.approx([played(lanes) for lanes in range(1, 7)])
    assert table is seconds_by_lanes(mode, options, schedule, guidance, 6, seconds, images), "made once"


def test_the_fastest_within_the_tolerance_is_chosen(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "ddim", 50)
    drifts = (drift("conservative", 4, 0.004), drift("aggressive", 2, 0.006), drift("aggressive", 4, 0.02))
    known = Calibration(calls={"four": LINEAR}, drifts=drifts)

    def chosen(tolerance: float) -> tuple[str, int]:
        choice, warnings = choose(known, "four", 4, schedule, SETTING, tolerance)
        assert not warnings and choice.drift_bound <= tolerance
        return choice.candidate.mode, choice.candidate.k

    assert chosen(0.0) == chosen(0.003) == ("sequential", 1)
    assert chosen(0.005) == ("conservative", 4)
    assert chosen(0.01) == chosen(1.0) == ("aggressive", 2), "as fast as k = 4 here, and closer"


def test_without_a_tolerance_no_image_may_look_different(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "ddim", 50)
    drifts = (drift("conservative", 4, 0.004, 55.0), drift("aggressive", 2, 0.001, 49.9))
    known = Calibration(calls={"four": LINEAR}, drifts=drifts)
    choice, warnings = choose(known, "four", 4, schedule, SETTING, None)
    assert (choice.candidate.mode, choice.candidate.k, choice.psnr_bound) == ("conservative", 4, 55.0) and not warnings
    assert "99% of images within a PSNR of 50 dB" in choice.reason
    choice, warnings = choose(Calibration(), "four", 4, schedule, SETTING, None)
    assert choice.candidate == EXACT and not warnings and "never measured" in choice.reason


@pytest.mark.parametrize("count", [3, 8, 16, 40])
def test_the_bound_of_a_drift_is_a_tolerance_limit(count: int, rng: np.random.Generator) -> None:
    """Against the exact factor, by the noncentral t distribution."""
    exact = stats.nct.ppf(0.95, count - 1, math.sqrt(count) * stats.norm.ppf(0.99)) / math.sqrt(count)
    logs = rng.normal(-6, 0.7, count)
    logs[logs.argmax()] = np.sort(logs)[-2]
    found = Drift.of(SETTING, EXACT, np.exp(logs), 60 - logs)
    factor = (math.log(found.bound) - logs.mean()) / logs.std(ddof=1)
    assert exact * 0.98 < factor < exact * (1.01 if count >= 8 else 1.3)
    assert found.psnr_bound == pytest.approx(60 - math.log(found.bound))
    assert found.within(found.bound) and not found.within(found.bound * 0.999)


def test_the_bound_of_a_drift_holds_for_other_images(rng: np.random.Generator) -> None:
    samples = rng.normal(-6, 0.7, (2000, 16))
    limit = -6 + 0.7 * NormalDist().inv_cdf(0.99)
    covering = [Drift.of(SETTING, EXACT, np.exp(sample), sample).bound >= math.exp(limit) for sample in samples]
    assert 0.93 < np.mean(covering) < 0.97


def test_the_bound_of_a_drift_is_not_better_than_what_was_seen() -> None:
    distances = np.asarray([1e-4] * 39 + [0.2])
    found = Drift.of(SETTING, EXACT, distances, np.asarray([60.0] * 39 + [20.0]))
    assert found.bound >= 0.2 and found.psnr_bound <= 20
    equal = Drift.of(SETTING, EXACT, np.zeros(16), np.full(16, 99.0))
    assert equal.within(1e-6) and equal.within(None) and equal.median == 0


def test_psnr_is_that_of_skimage(rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 256, (2, 5, 9, 7, 3)).astype(np.float32)
    b[4] = a[4]
    theirs: Any = peak_signal_noise_ratio  # it has no types
    expected = [theirs(x, y, data_range=255) for x, y in zip(a[:4], b[:4], strict=True)]
    np.testing.assert_allclose(psnr(a.reshape(5, -1), b.reshape(5, -1)), [*expected, 99.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("known", "what"),
    [
        (Calibration(), "call times on these devices"),
        (Calibration(calls={"two": LINEAR}), "drift of"),
        (Calibration(drifts=(drift("aggressive", 2, 0.1),)), "call times"),
    ],
)
def test_what_was_never_measured_is_sequential_and_says_so(known: Calibration, what: str, manifest: Manifest) -> None:
    choice, (warning,) = choose(known, "two", 2, make_schedule(manifest, "ddim", 50), SETTING, 0.1)
    assert choice.candidate == EXACT and what in warning and "runtime.calibrate" in warning


def test_calibration_is_measured_once_and_used(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shapes.folder, tmp_path / "shapes", ignore=shutil.ignore_patterns("calibration.json"))
    bundle = Bundle.open(str(tmp_path / "shapes"))
    arguments = ["calibrate", str(bundle.folder), "--devices", "cpu*2", "--steps", "6", "--images", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    assert command() == 0 and "calibrated" in capsys.readouterr().out
    pipeline = Pipeline(bundle, "cpu*2")
    try:
        stored = Calibration.read(pipeline.calibration_path)
        assert set(stored.calls[pipeline.calibration_key]) == set(BATCHES)
        assert all(seconds > 0 for seconds in stored.calls[pipeline.calibration_key].values())
        assert all(found.setting.steps == 6 and found.median <= found.bound for found in stored.drifts)
        exact = pipeline.generate("a red star", num_inference_steps=6).report
        assert exact.auto is not None and exact.auto["reason"].startswith(
            "the fastest that keeps 99% of images within a PSNR of 50 dB"
        )
        assert all(found.psnr_bound < 50 for found in stored.drifts), "six steps are few"
        zero = pipeline.generate("a red star", num_inference_steps=6, tolerance=0).report
        assert zero.auto is not None and (zero.mode, zero.auto["reason"]) == ("sequential", "tolerance 0")
        loose = pipeline.generate("a red star", num_inference_steps=6, tolerance=1e9).report
        assert (exact.mode, exact.warnings) == ("sequential", ())
        assert loose.auto is not None and loose.auto["seconds"] > 0 and loose.mode == loose.auto["candidate"]["mode"]
        (warning,) = pipeline.generate("a red star", num_inference_steps=5, tolerance=0.1).report.warnings
        assert "'steps': 5" in warning
    finally:
        pipeline.close()
    before = json.loads(pipeline.calibration_path.read_text())
    assert command() == 0 and "up to date" in capsys.readouterr().out
    assert json.loads(pipeline.calibration_path.read_text()) == before


def test_a_calibration_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    assert Calibration.read(path) == Calibration()
    path.write_text('{"calls": 3}')
    assert Calibration.read(path) == Calibration()


def test_bad_arguments_are_named(
    shapes: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(shapes, "cpu*2")
    with pytest.raises(ParameterError, match="auto chooses k itself"):
        pipeline.generate("a red star", mode="auto", k=2)
    with pytest.raises(ParameterError, match="auto chooses drafts itself"):
        pipeline.generate("a red star", mode="auto", drafts="frozen")
    pipeline.close()
    with pytest.raises(ParameterError, match="images must be at least 3"):
        calibrate(str(shapes.folder), shapes.folder.parent, "cpu*2", [4], 4.0, None, 0, 60.0, again=False)
    monkeypatch.setattr("sys.argv", ["calibrate", "missing"])
    assert command() == 1 and "no exported model 'missing'" in capsys.readouterr().err
