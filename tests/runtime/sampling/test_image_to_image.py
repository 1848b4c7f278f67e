"""Steps that begin in the middle of a schedule, as an image to image run does, against diffusers' own."""
# covers: runtime/sampling/multistep_rules.py, runtime/sampling/step_rules.py, runtime/sampling/schedulers.py

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest

from runtime.sampling.rules import RULES
from runtime.sampling.schedulers import schedule_from_config
from tests.runtime.sampling.reference import INSIDE_DIFFUSERS, SHAPE, STABLE, diffusers_loop, play

pytestmark = INSIDE_DIFFUSERS
THIRD = {"solver_order": 3}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    *((f"{name}MultistepScheduler", own) for name in ("DPMSolver", "DEIS", "UniPC") for own in ({}, THIRD, FLOW)),
    ("DPMSolverMultistepScheduler", THIRD | {"algorithm_type": "sde-dpmsolver++"}),
    ("LMSDiscreteScheduler", {}),
    *((f"{name}DiscreteScheduler", {}) for name in ("Heun", "KDPM2", "KDPM2Ancestral", "FlowMatchHeun")),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    *(("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
@pytest.mark.parametrize(("steps", "first"), [(2, 1), (7, 1), (7, 2), (20, 9), (28, 27), (50, 3)])
def test_an_image_to_image_run_equals_diffusers(
    name: str, fields: dict[str, Any], steps: int, first: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = getattr(diffusers, name)(**({} if name.startswith("Flow") else STABLE), **fields)
    alphas = scheduler.alphas_cumprod.tolist() if hasattr(scheduler, "alphas_cumprod") else ()
    config = {**scheduler.config, "_class_name": name}
    scheduler.set_timesteps(steps)
    schedule = schedule_from_config(config, alphas, steps, first=first)
    theirs = scheduler.timesteps[first * scheduler.order :]
    np.testing.assert_allclose(schedule.timesteps, theirs.numpy(), rtol=1e-6, atol=1e-4)
    noise, image = (rng.standard_normal(SHAPE, np.float32) for _ in range(2))
    stages = RULES[schedule.name].stages  # the last row of a step adds noise
    z = {i: rng.standard_normal(SHAPE, np.float32) for i in range(stages - 1, schedule.steps, stages)}
    expected = diffusers_loop(scheduler, noise, z, monkeypatch, image, first)
    for mode, options in (("sequential", {}), ("aggressive", {"k": 1}), ("adaptive", {"k": 3, "tolerance": 0.0})):
        actual = play(schedule, noise, z, mode, image, **options)
        assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max(), mode
