"""What requests cost before they are made. Needs no ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime.auto import Calibration
from runtime.call import Call
from runtime.pipeline import Pipeline
from runtime.serve.ray.cost import device_seconds

Calibrate = Callable[[dict[int, float]], None]


@pytest.fixture
def calibrated(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibrate:
    """Says what calls of so many branches take on this pipeline, as if that had been measured."""
    path = tmp_path / "calibration.json"
    monkeypatch.setattr(Pipeline, "calibration_path", property(lambda _: path))
    return lambda seconds: Calibration(calls={pipeline.calibration_key: seconds}).write(path)


def test_steps_guidance_and_images_count(pipeline: Pipeline, calibrated: Calibrate, rng: np.random.Generator) -> None:
    measured = float(rng.uniform(0.01, 0.1))
    calibrated({1: measured, 2: 1.5 * measured, 4: 3 * measured})
    guided = Call("", num_inference_steps=7, mode="sequential", guidance_scale=4.0)
    assert device_seconds(pipeline, guided) == pytest.approx(7 * 1.5 * measured)
    plain = Call("", num_inference_steps=10, mode="sequential", guidance_scale=1.0)
    assert device_seconds(pipeline, plain) == pytest.approx(10 * measured)
    several = Call("", num_inference_steps=10, mode="sequential", guidance_scale=1.0, num_images_per_prompt=2)
    assert device_seconds(pipeline, several) == pytest.approx(10 * 1.5 * measured)


@pytest.mark.parametrize("mode", ["conservative", "srds"])
def test_drafts_cost_what_their_rounds_evaluate(pipeline: Pipeline, calibrated: Calibrate, mode: str) -> None:
    """Where calls take as long as their branches one by one, that is the number of evaluations of the image."""
    calibrated({1: 0.05, 2: 0.1})
    call = Call("", num_inference_steps=12, mode=mode, guidance_scale=1.0)
    assert device_seconds(pipeline, call) == pytest.approx(0.05 * pipeline.run(call).report.evaluations)


def test_what_nobody_measured(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "calibration_path", property(lambda _: tmp_path / "none.json"))
    assert device_seconds(pipeline, Call("")) is None
