"""The rules of solvers of second order that keep no history: two rows per step, the second where the first leads.

The last step, to σ = 0, has its first row alone, so that N steps are 2N − 1 rows. The second row reads the derivative
that the first one kept, and so goes back to the state from which the step begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtime.sampling.multistep_rules import EPSILON, Level
from runtime.sampling.schedule import Schedule, Step
from runtime.sampling.spacing import Floats, ScheduleSpec
from runtime.sampling.step_rules import curved_sigmas, euler_start, flow_sigmas, schedule_of

VELOCITY = (-1.0, 1.0)  # what a step of flow matching keeps: ε − x̂_0
Stage = tuple[float, float, float, float]  # σ and timestep of the second row, the σ where it ends, and of its noise


def heun(spec: ScheduleSpec) -> Schedule:
    """Karras et al. 2022, algorithm 1: Euler to the next σ, then again with the mean of the derivatives there."""
    sigmas, timesteps = curved_sigmas(spec)
    return schedule_of("heun", spec, _heun(sigmas, timesteps), euler_start(spec, sigmas))


def flow_heun(spec: ScheduleSpec) -> Schedule:
    """The same for flow matching."""
    sigmas = flow_sigmas(spec)
    return Schedule("flow_heun", "flow_prediction", tuple(_heun(sigmas, sigmas * spec.training, flow=True)))


def _heun(sigmas: Floats, timesteps: Floats, *, flow: bool = False) -> list[Step]:
    seconds = [(float(sigma), float(t), float(sigma), 0.0) for sigma, t in zip(sigmas[1:], timesteps[1:], strict=True)]
    return _rows(sigmas, timesteps, seconds, 0.5, flow=flow)


def kdpm2(spec: ScheduleSpec) -> Schedule:
    """DPM-Solver-2 in σ (Karras et al. 2022, algorithm 2 without churn): the derivative halfway in log σ is the step's.

    To the bit as in diffusers, whose timesteps halfway are read off σ in float32.
    """
    sigmas, timesteps = _rounded(spec)
    middle = np.exp((np.log(sigmas[1:]) + np.log(sigmas[:-1])) / 2)
    halfway = spec.timestep_of(middle)
    seconds = [(float(m), float(t), float(sigma), 0.0) for m, t, sigma in zip(middle, halfway, sigmas[1:], strict=True)]
    return schedule_of("kdpm2", spec, _rows(sigmas, timesteps, seconds, 1.0), euler_start(spec, sigmas))


def kdpm2_ancestral(spec: ScheduleSpec) -> Schedule:
    """The same to below the next σ, then fresh noise up to it.

    How far below is calculated in float32, as in diffusers: for long steps it is the difference of near numbers.
    """
    sigmas, timesteps = _rounded(spec)
    source, target = sigmas[:-1].astype(np.float32), sigmas[1:].astype(np.float32)
    up = np.sqrt(target**2 * (source**2 - target**2) / source**2)
    down = np.sqrt(target**2 - up**2)
    middle = np.exp((np.log(source.astype(np.float64)) + np.log(down.astype(np.float64))) / 2)
    halfway = spec.timestep_of(middle)
    seconds = list(zip(middle.tolist(), halfway.tolist(), down.tolist(), up.tolist(), strict=True))
    return schedule_of("kdpm2_a", spec, _rows(sigmas, timesteps, seconds, 1.0), euler_start(spec, sigmas))


def _rounded(spec: ScheduleSpec) -> tuple[Floats, Floats]:
    """σ, rounded to float32, and timesteps, which are whole with Karras' σ."""
    sigmas, timesteps = curved_sigmas(spec, rounded=True)
    return sigmas, timesteps.round() if spec.config["use_karras_sigmas"] else timesteps


def _rows(
    sigmas: Floats, timesteps: Floats, seconds: Sequence[Stage], share: float, *, flow: bool = False
) -> list[Step]:
    """The rows of N steps from their first σ and timestep, and N − 1 second stages.

    `share` is that of the second derivative in a step. States are x_0 + σ·ε, divided by √(1 + σ²), or those of flow
    matching.
    """
    kept = VELOCITY if flow else EPSILON

    def level(sigma: float) -> Level:
        return Level.of_flow(sigma) if flow else Level.of(sigma)

    def row(t: float, here: float, end: float, pull: float, back: float, up: float = 0.0) -> Step:
        """From x at σ = `here` to x + pull·(derivative here) + back·(the one kept) + up·z at σ = `end`."""
        scale = 1.0 if flow else 1 / math.sqrt(1 + end**2)
        data = (1 - here if flow else 1.0) + pull * kept[0]
        previous = (scale * back,) if back else ()
        at = level(here)
        return Step(float(t), at.alpha, at.sigma, scale * data, scale * (here + pull), previous, scale * up, kept)

    rows = []
    for i, (t, source) in enumerate(zip(timesteps.tolist(), sigmas.tolist(), strict=True)):
        if i == len(seconds):
            rows.append(row(t, source, 0.0, -source, 0.0))
            break
        middle, halfway, down, up = seconds[i]
        step = down - source
        rows.append(row(t, source, middle, middle - source, 0.0))
        back = (1 - share) * step - (middle - source)
        rows.append(row(halfway, middle, math.hypot(down, up), share * step, back, up))
    return rows
