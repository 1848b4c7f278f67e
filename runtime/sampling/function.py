"""The algorithms alone: any Python function as the model, no engines, no files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engines.base import Array
from engines.errors import NonFiniteError, ParameterError
from engines.host import FunctionLane, HostBackend
from runtime.sampling.drafts import resolve
from runtime.sampling.execute import Counts, denoise
from runtime.sampling.operations import Options
from runtime.sampling.samplers import SAMPLERS, check
from runtime.sampling.schedule import Schedule

Model = Callable[[Array, Array], Array]


def sample(
    model: Model, noise: Array, schedule: Schedule, *, mode: str, seed: int = 0, **options: Any
) -> tuple[Array, Counts]:
    """Denoises with a function `model(states, timesteps) → outputs`, all of them float32 and (batch, …), (batch,).

    A round's evaluations are one call with a batch of drafts: guidance and devices are the function's own affair.
    `noise` is (images, …) of unit variance; `options` are those of `samplers.Options`, k = 4 for instance. Returns the
    finished states and what they cost. ParameterError for what cannot be played, NonFiniteError for NaN or infinity.
    """
    if mode not in SAMPLERS:
        raise ParameterError("mode", f"unknown mode {mode!r}: use one of {', '.join(SAMPLERS)}")
    chosen = Options(**{**options, "drafts": resolve(options.get("drafts", "auto"))})
    check(mode, schedule, chosen)
    if chosen.cache_interval > 1:
        raise ParameterError("cache_interval", "a function has no features to reuse: leave out cache_interval")
    noise = np.asarray(noise, np.float32)
    if noise.ndim < 2 or not len(noise) or not np.isfinite(noise).all():
        raise ParameterError("noise", f"noise must be finite and of shape (images, …), not {noise.shape}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ParameterError("seed", f"seed must be a whole number from 0 to 2⁶⁴ − 1, not {seed!r}")
    state = noise * np.float32(schedule.init_noise_sigma)
    backend = HostBackend([FunctionLane(lambda states, timesteps, _: model(states, timesteps))])
    try:
        result, counts = denoise(backend, state, [{}, {}], schedule, mode, chosen, 1.0, seed, lambda finished: None)
    finally:
        backend.close()
    if not np.isfinite(result).all():
        raise NonFiniteError("the finished states hold NaN or infinity: look at the model's outputs")
    return result, counts
