"""Diffusers' own loop and ours with the same model and noise."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engines.base import Array
from engines.host import FunctionLane, HostBackend
from runtime.sampling.execute import execute
from runtime.sampling.operations import STATE, Combine, Options, Predict, fresh
from runtime.sampling.program import program
from runtime.sampling.schedule import Schedule
from runtime.sampling.sequential import sequential

SHAPE = (1, 4, 6, 5)
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

INSIDE_DIFFUSERS = [
    pytest.mark.filterwarnings(f"ignore:{what}:DeprecationWarning")
    for what in ("__array__ implementation", "__array_wrap__ must accept")
]


def model(x: torch.Tensor, t: float) -> torch.Tensor:
    """A fixed smooth non-linear function that mixes neighbours and depends on the timestep."""
    mixed = x + 0.3 * torch.roll(x, 1, -1)
    return torch.tanh(mixed * (0.6 + 0.0004 * t)) + 0.1 * torch.sin(3 * x)


def play(
    schedule: Schedule, noise: Array, z: dict[int, Array], mode: str = "sequential", image: Array | None = None,
    **options: Any,
) -> Array:  # fmt: skip
    """The finished state from noise, or from an image's latents with it."""

    def function(sample: Array, timestep: Array, _: Any) -> Array:
        rows = zip(torch.from_numpy(sample), timestep, strict=True)
        return torch.stack([model(row, float(t)) for row, t in rows]).numpy()

    backend = HostBackend([FunctionLane(function)])
    try:
        backend.bind(noise.shape, schedule.timesteps, [{}, {}])
        row = schedule.rows[0]
        backend.write(
            STATE,
            noise * np.float32(schedule.init_noise_sigma)
            if image is None
            else np.float32(row.alpha) * image + np.float32(row.sigma) * noise,
        )
        for i in schedule.stochastic_steps:
            backend.write(fresh(i), z[i])
        execute(program(mode, schedule, Options(**options), 1.0), backend, lambda finished: None)
        return backend.read(STATE)
    finally:
        backend.close()


def play_in_float64(schedule: Schedule, noise: Array, z: dict[int, Array]) -> NDArray[Any]:
    """The same one step after another, for schedules whose coefficients are too large for states of float32."""
    slots: dict[str, NDArray[Any]] = {STATE: noise.astype(np.float64) * schedule.init_noise_sigma}
    slots |= {fresh(i): z[i].astype(np.float64) for i in schedule.stochastic_steps}
    for operation in sequential(schedule, Options()):
        if isinstance(operation, Predict):
            (one,) = operation.evaluations
            seen = torch.from_numpy(slots[one.latent])
            slots[one.output] = model(seen, schedule.timesteps[one.step]).numpy()
        elif isinstance(operation, Combine):
            made = np.tensordot(operation.rows, [slots[slot] for slot in operation.sources], 1)
            slots.update(zip(operation.targets, made, strict=True))
    return slots[STATE]


def diffusers_loop(
    scheduler: Any, noise: Array, z: dict[int, Array], monkeypatch: pytest.MonkeyPatch, image: Array | None = None,
    first: int = 0, wide: bool = False, **step: Any,
) -> NDArray[Any]:  # fmt: skip
    """Diffusers' own loop with our noise, its result divided by the scale of the last state (1 for σ = 0).

    With `image`, latents, it begins at step `first`, as diffusers' image to image pipelines do. With `wide` it
    calculates in float64, as `play_in_float64` does.
    """
    with monkeypatch.context() as patched:  # tables that are made later are rounded as ever
        return _loop(scheduler, noise, z, patched, image, first, wide, step)


def _loop(
    scheduler: Any, noise: Array, z: dict[int, Array], monkeypatch: pytest.MonkeyPatch, image: Array | None,
    first: int, wide: bool, step: dict[str, Any],
) -> NDArray[Any]:  # fmt: skip
    noises = iter(z.values())

    def draw(*_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(next(noises))

    for module in (
        "ddim",
        "ddpm",
        "euler_ancestral_discrete",
        "lcm",
        "flow_match_euler_discrete",
        "dpmsolver_multistep",
        "k_dpm_2_ancestral_discrete",
    ):
        monkeypatch.setattr(f"diffusers.schedulers.scheduling_{module}.randn_tensor", draw)
    timesteps = scheduler.timesteps[first * scheduler.order :]
    x = torch.from_numpy(noise) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    if hasattr(scheduler, "set_begin_index"):
        begin = first * scheduler.order  # else two steps at one timestep make it begin with the second
        scheduler.set_begin_index(begin)
    if image is not None and hasattr(scheduler, "scale_noise"):
        x = scheduler.scale_noise(torch.from_numpy(image), timesteps[:1], torch.from_numpy(noise))
    elif image is not None:
        x = scheduler.add_noise(torch.from_numpy(image), torch.from_numpy(noise), timesteps[:1])
    # σ = 4096, or ε of a state at a small σ in steps over large ones: its rounding to float32 is too coarse to compare
    if scheduler.config.get("rescale_betas_zero_snr") or wide:
        monkeypatch.setattr(
            torch.Tensor,
            "to",
            lambda self, *rest, to=torch.Tensor.to, **more: (
                self
                if self.dtype is torch.float64 and torch.float32 in (*rest, *more.values())
                else to(self, *rest, **more)
            ),
        )
        x = x.double()
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = scheduler.sigmas.double()
    if isinstance(scheduler, diffusers.DEISMultistepScheduler | diffusers.LMSDiscreteScheduler):
        scheduler.sigmas = scheduler.sigmas.double()  # their coefficients are differences of near numbers
        if isinstance(scheduler, diffusers.LMSDiscreteScheduler) or scheduler.config.use_flow_sigmas:
            x = x.double()  # their states are divided by small σ, or by small α
    if scheduler.config.get("solver_order") == 3:
        scheduler.sigmas = scheduler.sigmas.double()
    for t in timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(seen, float(t)), t, x, return_dict=False, **step)[0]
    if scheduler.config.get("solver_type") == "bh1" and not scheduler.sigmas[-1]:
        x = scheduler.model_outputs[-1]  # what first order steps to at σ = 0; its own result is 0 · ∞
    sigma = float(scheduler.sigmas[-1]) if isinstance(scheduler, diffusers.EulerDiscreteScheduler) else 0.0
    return x.numpy() / math.sqrt(1 + sigma**2)
