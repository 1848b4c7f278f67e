"""The rounds that are simulated from measured drafts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.speculative import Recorder, simulated_rounds, table
from engines.base import Array
from engines.host import FunctionLane, HostBackend
from engines.manifest import Manifest
from runtime.sampling.execute import denoise
from runtime.sampling.operations import Options
from runtime.sampling.schedulers import make_schedule


@pytest.mark.parametrize("k", [2, 4, 8])
def test_simulated_rounds_have_their_limits(manifest: Manifest, k: int) -> None:
    schedule = make_schedule(manifest, "ddpm", 40)
    shifts = {(step, place): [1.0] for step in range(40) for place in range(k - 1)}
    assert simulated_rounds(shifts, schedule, k, 0.0) == 40 / k
    assert simulated_rounds(shifts, schedule, k, 100.0) == 40
    kept = math.erfc(1 / math.sqrt(8))
    per_round = sum(kept**n for n in range(k))  # but for the last round
    assert simulated_rounds(shifts, schedule, k, 1.0) == pytest.approx(40 / per_round, rel=0.05)


def test_what_was_measured_gives_the_rounds_that_were_played(manifest: Manifest, rng: np.random.Generator) -> None:
    schedule, k, images = make_schedule(manifest, "ddpm", 30), 3, 40

    def model(sample: Array, timestep: Array, _: object) -> Array:
        return np.asarray(np.tanh(sample * 1.5), np.float32)

    backend = HostBackend([FunctionLane(model)])
    noise = rng.standard_normal((images, 4, 3, 3), np.float32)
    with Recorder(backend, schedule) as recorder:
        _, counts = denoise(backend, noise, [{}, {}], schedule, "speculative", Options(k=k), 1.0, 5, lambda done: None)
    assert "inner_products" not in vars(backend)
    backend.close()
    assert all(place < k - 1 for _, place in recorder.shifts)
    assert 30 / k < counts.rounds / images < 30
    assert simulated_rounds(recorder.shifts, schedule, k, 1.0) == pytest.approx(counts.rounds / images, rel=0.07)


def test_the_table_has_a_column_for_larger_latents() -> None:
    row = {"scheduler": "ddpm", "steps": 50, "guidance_scale": 4.0, "name": "speculative, k = 2", "rounds": 31.0,
           "evaluations": 60.0, "speedup_in_rounds": 1.61, "caption_accuracy": 1.0, "chance_by_place": [0.6],
           "simulated_rounds": {"here": 31.0, "SD 1.5, 512²": 40.2}}  # fmt: skip
    assert "| 31 | 60 | 1.61 | 100 % | 0.60 | 40 |  |" in table([row])
