"""A noise schedule as a table: one row of two numbers per step, and the linear expressions that samplers build of them.

A deterministic step is affine in the state and the noise prediction, `x_{i+1} = a·x_i + b·ε_i`, so a whole block of
steps, and a draft, is one linear expression over slots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import ParameterError
from engines.manifest import Manifest

Linear = Mapping[str, float]
"""A linear expression over slots: slot name → coefficient."""

SCHEDULERS = ("ddim",)
# fields of a diffusers scheduler config that change the result, and the values that this version honours
_HONOURED: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("leading",),
    "prediction_type": ("epsilon",),
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
}


def unit(slot: str) -> Linear:
    """The expression that is one slot."""
    return {slot: 1.0}


def weighted_sum(*terms: tuple[float, Linear]) -> Linear:
    """Σ weight · expression."""
    total: dict[str, float] = {}
    for weight, expression in terms:
        for slot, coefficient in expression.items():
            total[slot] = total.get(slot, 0.0) + weight * coefficient
    return total


@dataclass(frozen=True)
class Schedule:
    """N steps: the model's timestep and the coefficients (a, b) of each; noise starts at `init_noise_sigma`."""

    name: str
    timesteps: tuple[float, ...]
    rows: tuple[tuple[float, float], ...]
    init_noise_sigma: float = 1.0

    @property
    def steps(self) -> int:
        """N."""
        return len(self.rows)

    def step(self, i: int, x: Linear, noise: Linear) -> Linear:
        """x_{i+1} from x_i and ε_i."""
        a, b = self.rows[i]
        return weighted_sum((a, x), (b, noise))


def ddim(manifest: Manifest, num_inference_steps: int) -> Schedule:
    """DDIM with η = 0 and leading spacing (Song et al. 2021, eq. 12), equal to diffusers' DDIMScheduler.

    Step i goes from timestep t_i to t_i − T//N, which is t_{i+1} here; below 0 it ends at `final_alpha_cumprod`.
    """
    config = manifest.scheduler
    for field, honoured in _HONOURED.items():
        if config.get(field, honoured[0]) not in honoured:
            raise ParameterError(
                "scheduler", f"the model's scheduler has {field}={config[field]!r}; this version can do {honoured}"
            )
    training = len(manifest.alphas_cumprod)
    offset = int(config.get("steps_offset", 0))
    if not 1 <= num_inference_steps <= training:
        raise ParameterError(
            "num_inference_steps", f"num_inference_steps must be 1 to {training}, not {num_inference_steps}"
        )
    stride = training // num_inference_steps
    timesteps = [stride * i + offset for i in reversed(range(num_inference_steps))]
    if timesteps[0] >= training:
        raise ParameterError(
            "num_inference_steps",
            f"{num_inference_steps} steps with steps_offset {offset} would start at timestep {timesteps[0]}, but the "
            f"model knows 0 to {training - 1}: use at most {training - offset} steps",
        )
    rows = []
    for t in timesteps:
        source = manifest.alphas_cumprod[t]
        target = manifest.alphas_cumprod[t - stride] if t >= stride else manifest.final_alpha_cumprod
        a = math.sqrt(target / source)
        rows.append((a, math.sqrt(1 - target) - a * math.sqrt(1 - source)))
    return Schedule("ddim", tuple(map(float, timesteps)), tuple(rows))


def make_schedule(manifest: Manifest, scheduler: str | None, num_inference_steps: int) -> Schedule:
    """The schedule of a scheduler's name, or of the model's own scheduler; ParameterError when it is not known."""
    own = {"DDIMScheduler": "ddim"}.get(str(manifest.scheduler.get("_class_name")))
    name = scheduler or own
    if name not in SCHEDULERS:
        asked = scheduler or manifest.scheduler.get("_class_name")
        raise ParameterError("scheduler", f"unknown scheduler {asked!r}: this version has {', '.join(SCHEDULERS)}")
    return ddim(manifest, num_inference_steps)
