"""A family at tiny size: diffusers' pipeline and ours on two lanes, of the same folder, compared on one noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import load
from engines.base import Array
from engines.devices import parse_devices
from engines.store import Bundle
from export.bundle import export
from export.spec import ExportSpec
from runtime.pipeline import Pipeline

PROMPT, NEGATIVE = "a large red star<|endoftext|> on the left", "a small blue ring"
PROMPTS = ["", PROMPT, " two  spaces\n für 红星 {0} ", "red star " * 200]  # of which the last one is cut
STEPS = 6


def plain(latents: Any, shape: tuple[int, ...]) -> Any:
    """Latents that diffusers has as they are."""
    return latents


def squares(latents: Any, shape: tuple[int, ...]) -> Any:
    """Tokens of 2 by 2 latents, (batch, tokens, 4 · channels), as latents."""
    batch, channels, height, width = shape
    return (
        latents.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(shape)
    )  # fmt: skip


def tokens(latents: Any, shape: tuple[int, ...]) -> Any:
    """Tokens of one latent, (batch, tokens, channels), as latents."""
    return latents.transpose(1, 2).reshape(shape)


def pack_squares(noise: Any) -> Any:
    """The other way round: what diffusers is given."""
    batch, channels, height, width = noise.shape
    packed = noise.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return packed.reshape(batch, height * width // 4, 4 * channels)


@dataclass(frozen=True)
class Case:
    """How a family's pipeline is called. `guided` makes arguments of a scale and a negative prompt.

    unguided: the scale that means no guidance. given, encode: arguments of every call and of `encode_prompt`.
    negative: the prompt that ours gets where diffusers' gets NEGATIVE; None where its pipeline takes none.
    """

    name: str
    unpack: Callable[[Any, tuple[int, ...]], Any] = plain
    pack: Callable[[Any], Any] = lambda noise: noise
    guided: Callable[[float, str], Mapping[str, Any]] = lambda scale, negative: {
        "guidance_scale": scale, "negative_prompt": negative,
    }  # fmt: skip
    unguided: float = 1.0
    given: Mapping[str, Any] = field(default_factory=dict)
    encode: Mapping[str, Any] = field(default_factory=dict)
    negative: str | None = NEGATIVE


@dataclass
class Compared:
    """A family: how it is called, the diffusers pipeline, its folder, and our pipeline on two lanes."""

    case: Case
    theirs: Any
    folder: Path
    ours: Pipeline

    def generate(self, **options: Any) -> Any:
        """Ours, sequential if not told otherwise."""
        return self.ours.generate(**{"prompt": PROMPT, "mode": "sequential", "num_inference_steps": STEPS, **options})

    def noise(self, rng: np.random.Generator, images: int, width: int, height: int) -> Array:
        """Latents of unit variance."""
        factor, channels = self.ours.manifest.vae_scale_factor, self.ours.manifest.latent_channels
        return rng.standard_normal((images, channels, height // factor, width // factor), np.float32)

    def expected(self, noise: Array, width: int, height: int, **options: Any) -> tuple[Array, NDArray[np.int64]]:
        """Diffusers' latents after the last step, laid out as ours, and its pixels."""
        import torch

        last: list[Any] = []

        def keep(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            last[:] = [values["latents"]]
            return values

        images = self.theirs(
            prompt=PROMPT, latents=self.case.pack(torch.from_numpy(noise.copy())), num_inference_steps=STEPS,
            width=width, height=height, callback_on_step_end=keep, **{**self.case.given, **options},
        ).images  # fmt: skip
        latents = self.case.unpack(last[0], noise.shape).numpy()
        return latents, np.stack([np.asarray(image, int) for image in images])


def build(folder: Path, build_folder: Path, sides: tuple[int, int] = (64, 128)) -> Bundle:
    """Exports and compiles for processor cores."""
    target = build_folder / folder.name
    wanted = ExportSpec(folder.name, folder, sides=sides)
    export(wanted, target, wanted.identity(), "fp32")
    bundle = Bundle.open(str(target))
    load.build_missing(bundle, parse_devices("cpu*2"))
    return bundle


def equal(result: Any, expected: tuple[Array, NDArray[np.int64]]) -> None:
    """Latents to a thousandth, pixels to two steps of 255."""
    latents, pixels = expected
    assert np.isfinite(latents).all() and result.latents.shape == latents.shape
    assert np.linalg.norm(result.latents - latents) <= 1e-3 * np.linalg.norm(latents)
    ours = np.stack([np.asarray(image, int) for image in result.images])
    assert np.abs(ours - pixels).max() <= 2 and pixels.std() > 1
