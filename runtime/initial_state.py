"""The state before the first step: noise, or an image with the noise of the step at which it is entered."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from engines.base import Array
from engines.errors import NonFiniteError, ParameterError
from engines.load import Runner
from engines.manifest import Manifest
from runtime.call import OPTIONS
from runtime.input_image import to_srgb
from runtime.sampling.noise import ENCODER, gaussian
from runtime.sampling.schedule import Schedule


def initial_noise(seed: int, images: int, shape: tuple[int, ...], latents: Array | None) -> Array:
    """(images, *shape) of unit variance: drawn, or given and checked."""
    if latents is None:
        return np.stack([gaussian(seed, image, 0, shape) for image in range(images)])
    array = np.asarray(latents, np.float32)
    if array.shape != (images, *shape):
        raise ParameterError("latents", f"latents must have shape {(images, *shape)}, not {array.shape}")
    if not np.isfinite(array).all():
        raise ParameterError("latents", "latents hold NaN or infinity")
    return array


@dataclass(frozen=True)
class InitialState:
    """The images to start from, none for noise, and the share of the steps that is made.

    `draws` is whether the VAE encoder takes noise, to draw latents from the distribution that it finds.
    """

    images: tuple[Image.Image, ...]
    strength: float
    round_up: bool = False
    draws: bool = True

    @classmethod
    def of(
        cls, manifest: Manifest, image: Image.Image | Sequence[Image.Image] | None, strength: float | None
    ) -> InitialState:
        """Checks what was given; ParameterError where the model was exported without the network for it."""
        if image is None:
            if strength is not None:
                raise ParameterError("strength", "strength belongs to image: give both, or leave it out")
            return cls((), 1.0)
        if not manifest.image_to_image:
            raise ParameterError("image", f"{manifest.model} ({manifest.family}) cannot start from an image")
        images = tuple(image) if isinstance(image, list | tuple) else (image,)
        if not images or not all(isinstance(one, Image.Image) for one in images):
            raise ParameterError("image", "image must be a PIL image, or a list of them")
        strength = manifest.defaults.strength if strength is None else OPTIONS["strength"].check(strength)
        draws = any(one.name == "noise" for one in manifest.networks["vae_encoder"].inputs)
        return cls(tuple(map(to_srgb, images)), float(strength), manifest.strength_up, draws)

    def size(self, manifest: Manifest, width: int | None, height: int | None) -> tuple[int, int]:
        """(width, height) of the images to make; ParameterError lists what the engine can do."""
        sizes = manifest.sizes
        own = (sizes.width, sizes.height)
        if self.images:
            wide, high = (side // sizes.multiple * sizes.multiple for side in self.images[0].size)
            own = wide, high  # rounded down, as diffusers does
            taken = [side for side, given in zip(own, (width, height), strict=True) if given is None]
            if not all(sizes.allows(side) for side in taken):
                high_by_wide = "×".join(map(str, self.images[0].size))
                message = f"image is {high_by_wide} pixels: each side may be {sizes}; resize it, or name another size"
                raise ParameterError("image", message)
        found = own[0] if width is None else width, own[1] if height is None else height
        for name, side in zip(("width", "height"), found, strict=True):
            if isinstance(side, bool) or not isinstance(side, int) or not sizes.allows(side):
                raise ParameterError(
                    name, f"{name}={side!r} is not among the sizes of this engine: each side may be {sizes}"
                )
        return found

    def first_step(self, steps: int) -> int:
        """How many steps the image skips; ParameterError where none is left."""
        if not self.images:
            return 0
        made = steps * self.strength
        first = steps - (math.ceil(made) if self.round_up else int(made))
        if first >= steps:
            raise ParameterError(
                "strength", f"with strength {self.strength:g} none of {steps} steps is left: raise one of them"
            )
        return first

    def draw(self, schedule: Schedule, noise: Array, seed: int, size: tuple[int, int], encoder: Runner | None) -> Array:
        """The state before the first step, as the schedule has it: α·x_0 + σ·noise for an image's latents x_0."""
        if not self.images:
            return noise * np.float32(schedule.init_noise_sigma)
        assert encoder is not None
        if len(noise) % len(self.images):
            raise ParameterError("image", f"{len(self.images)} input images cannot be dealt to {len(noise)} images")
        pixels = np.stack([_pixels(one, size) for one in self.images])
        drawn = [gaussian(seed, image, ENCODER, noise.shape[1:]) for image in range(len(pixels))] if self.draws else []
        latents = encoder.run(image=pixels, **({"noise": np.stack(drawn)} if drawn else {}))["latent_sample"]
        if not np.isfinite(latents).all():
            raise NonFiniteError("the VAE encoder gave NaN or infinity: no image can be made of it")
        row = schedule.rows[0]
        state: Array = (
            np.float32(row.alpha) * latents.repeat(len(noise) // len(latents), 0) + np.float32(row.sigma) * noise
        )
        return state


def _pixels(image: Image.Image, size: tuple[int, int]) -> Array:
    """(3, height, width) in [−1, 1], resized as diffusers does."""
    fitted = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
    pixels: Array = np.asarray(fitted, np.float32).transpose(2, 0, 1) / np.float32(255) * 2 - 1
    return pixels
