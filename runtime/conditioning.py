"""The denoiser's inputs beside latents and timesteps: text embeddings, sizes, the guidance scale; a row per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engines.base import Array
from engines.errors import ParameterError
from engines.load import Runner
from engines.manifest import DENOISER, NEGATIVE, Manifest
from runtime.call import CheckedCall
from runtime.tokenizer import PromptTokenizer

Conditioning = list[Mapping[str, Array]]


class Conditioner:
    """Runs the text encoder of a model."""

    def __init__(self, manifest: Manifest, tokenizer: PromptTokenizer, text_encoder: Runner) -> None:
        self._manifest, self._tokenizer, self._encoder = manifest, tokenizer, text_encoder
        self._inputs = {one.name for one in manifest.networks[DENOISER].inputs}
        # diffusers' arguments by the text encoder's outputs
        self._arguments = dict(zip(manifest.conditioning, ("prompt_embeds", "pooled_prompt_embeds"), strict=False))

    def __call__(self, call: CheckedCall, size: tuple[int, int]) -> tuple[Conditioning, list[str]]:
        """The denoiser's inputs for both branches, (images, …) each, and warnings; `size` is (width, height)."""
        encoded, warnings = self._encode([call.negative_prompt or "", *call.prompts()], call.clip_skip)
        negative = {name: value[:1] for name, value in encoded.items()}
        if self._manifest.zero_negative and call.negative_prompt is None:
            negative = {name: np.zeros_like(value) for name, value in negative.items()}
        positive = self._given(call, "", encoded) or {name: value[1:] for name, value in encoded.items()}
        negative = self._given(call, "negative_", encoded) or negative
        rows = call.prompt_count
        for name, value in negative.items():
            if len(value) not in (1, rows):
                argument = f"negative_{self._arguments[name]}"
                raise ParameterError(argument, "give one negative embedding, or one per prompt")
        scale = call.guidance_scale
        if self._manifest.guidance == "in_graph":
            if call.negative_prompt is None and call.negative_prompt_embeds is None:
                scale = 1.0  # as in diffusers: nothing to lead away from
            positive |= {
                f"{NEGATIVE}{name}": np.broadcast_to(value, (rows, *value.shape[1:]))
                for name, value in negative.items()
            }
            negative = positive
        constant = self._constant_inputs(scale, size)
        branches: Conditioning = [
            {
                name: np.broadcast_to(value, (rows, *value.shape[1:])).repeat(call.num_images_per_prompt, 0)
                for name, value in (branch | constant).items()
            }
            for branch in (negative, positive)
        ]
        return branches, warnings

    def _encode(self, prompts: Sequence[str], clip_skip: int | None) -> tuple[dict[str, Array], list[str]]:
        """The first prompt is the negative one, which diffusers never skips layers for."""
        ids, warnings = self._tokenizer(prompts)
        if any(one.name == "clip_skip" for one in self._manifest.networks["text_encoder"].inputs):
            ids["clip_skip"] = np.array([0, *[clip_skip or 0] * (len(prompts) - 1)], np.int64)
        return self._encoder.run(**ids), warnings

    def _given(self, call: CheckedCall, prefix: str, encoded: Mapping[str, Array]) -> dict[str, Array] | None:
        """Embeddings that were given in place of a text: all of them, or none."""
        values = {name: getattr(call, prefix + argument) for name, argument in self._arguments.items()}
        for argument in ("prompt_embeds", "pooled_prompt_embeds"):
            if argument not in self._arguments.values() and getattr(call, prefix + argument) is not None:
                raise ParameterError(prefix + argument, f"{self._manifest.model} takes no {argument}")
        if all(value is None for value in values.values()):
            return None
        found = {}
        for name, argument in self._arguments.items():
            axes, value = encoded[name].shape[1:], values[name]
            wanted = f"{prefix}{argument} must have shape (prompts, {', '.join(map(str, axes))})"
            if value is None:
                raise ParameterError(prefix + argument, f"{wanted}: give all embeddings or none")
            array = np.asarray(value, np.float32)
            if array.shape[1:] != axes or array.ndim != len(axes) + 1 or not len(array):
                raise ParameterError(prefix + argument, f"{wanted}, not {array.shape}")
            if not np.isfinite(array).all():
                raise ParameterError(prefix + argument, f"{prefix}{argument} holds NaN or infinity")
            found[name] = array
        if len({len(value) for value in found.values()}) > 1:
            raise ParameterError(f"{prefix}pooled_prompt_embeds", "embeddings must be for the same number of prompts")
        return found

    def _constant_inputs(self, guidance_scale: float, size: tuple[int, int]) -> dict[str, Array]:
        """Inputs that are the same for every image, one row each, where the denoiser has them.

        time_ids: size of the original, where it was cropped, size of the image (Podell et al. 2023, section 2.2).
        """
        width, height = size
        known = {"time_ids": [height, width, 0, 0, height, width], "guidance": guidance_scale}
        return {name: np.array([value], np.float32) for name, value in known.items() if name in self._inputs}
