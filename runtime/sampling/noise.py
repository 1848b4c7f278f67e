"""Noise that depends on (seed, image, number) alone, whatever else is drawn, in which order, on how many lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engines.base import Array
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.operations import Options, fresh, own_noise_slot
from runtime.sampling.schedule import Schedule


def noise_slots(step: int, steps: int, options: Options) -> list[tuple[str, int]]:
    """The slots of noise that a stochastic step may read, each with the number that the noise is drawn for."""
    own = [(own_noise_slot(step), steps + step + 1)] if DRAFTS[options.drafts].own_noise else []
    return [(fresh(step), step + 1), *own]


ENCODER = (1 << 32) - 1  # the number of the noise that the VAE encoder draws with: beyond those of any step

UNIFORMS = ENCODER - 1  # the number that the uniform numbers of an image are drawn for


def gaussian(seed: int, image: int, number: int, shape: tuple[int, ...]) -> Array:
    """Standard normal noise from a counter-based generator. Number 0 is where an image starts."""
    return _generator(seed, image, number).standard_normal(shape, np.float32)


def uniforms(seed: int, image: int, steps: int) -> list[float]:
    """One number in [0, 1) per step, from a stream of their own: what `speculative` decides by."""
    drawn: list[float] = _generator(seed, image, UNIFORMS).random(steps).tolist()
    return drawn


def _generator(seed: int, image: int, number: int) -> np.random.Generator:
    key = np.array([seed, image << 32 | number], np.uint64)  # a list of such numbers would become float64
    return np.random.Generator(np.random.Philox(key=key))


def step_noise(
    schedule: Schedule, options: Options, seed: int, images: Sequence[int], shape: tuple[int, ...]
) -> Iterator[tuple[str, Array]]:
    """The noise of every stochastic step with its slot, (images, *shape): drawn once, for drafts and refined states."""
    for step in schedule.stochastic_steps:
        for slot, number in noise_slots(step, schedule.steps, options):
            yield slot, np.stack([gaussian(seed, image, number, shape) for image in images])
