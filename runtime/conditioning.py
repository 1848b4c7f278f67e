"""What the denoiser is told beside latents and timesteps: texts, sizes, the guidance scale, one row per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.base import Array
from engines.errors import ParameterError
from engines.load import Runner
from engines.manifest import DENOISER, Manifest
from runtime.tokenizer import PromptTokenizer

Conditioning = list[Mapping[str, Array]]


@dataclass(frozen=True)
class Texts:
    """The texts of a call, as diffusers names them: words, or embeddings in their place."""

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | None = None
    prompt_embeds: Array | None = None
    negative_prompt_embeds: Array | None = None
    pooled_prompt_embeds: Array | None = None
    negative_pooled_prompt_embeds: Array | None = None
    clip_skip: int | None = None

    def prompts(self) -> list[str]:
        """The words; ParameterError where there are none and no embeddings either."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ParameterError("prompt", "give either prompt or prompt_embeds")
        listed = self.prompt if isinstance(self.prompt, list | tuple) else [self.prompt]
        prompts = [one for one in listed if isinstance(one, str)]
        if self.prompt_embeds is None and (not prompts or len(prompts) < len(listed)):
            raise ParameterError("prompt", "prompt must be a string or a list of strings")
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ParameterError("negative_prompt", "negative_prompt must be a string")
        return prompts

    @property
    def count(self) -> int:
        """How many prompts there are."""
        if self.prompt_embeds is not None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt or ())


class Conditioner:
    """Runs the text encoder of a model."""

    def __init__(self, manifest: Manifest, tokenizer: PromptTokenizer, text_encoder: Runner) -> None:
        self._manifest, self._tokenizer, self._encoder = manifest, tokenizer, text_encoder
        self._inputs = {one.name for one in manifest.networks[DENOISER].inputs}
        # diffusers' arguments by the text encoder's outputs
        self._arguments = dict(zip(manifest.conditioning, ("prompt_embeds", "pooled_prompt_embeds"), strict=False))

    def __call__(
        self, texts: Texts, guidance_scale: float, size: tuple[int, int], images_per_prompt: int
    ) -> tuple[Conditioning, list[str]]:
        """The denoiser's inputs for both branches, (images, …) each, and warnings; `size` is (width, height)."""
        manifest, prompts = self._manifest, texts.prompts()
        if manifest.guidance != "classifier_free" and texts.negative_prompt:
            raise ParameterError("negative_prompt", f"{manifest.model} makes no second pass that it could be used in")
        encoded, warnings = self._encode([texts.negative_prompt or "", *prompts], texts.clip_skip)
        negative = {name: value[:1] for name, value in encoded.items()}
        if manifest.zero_negative and texts.negative_prompt is None:
            negative = {name: np.zeros_like(value) for name, value in negative.items()}
        positive = self._given(texts, "", encoded) or {name: value[1:] for name, value in encoded.items()}
        negative = self._given(texts, "negative_", encoded) or negative
        rows = texts.count
        for name, value in negative.items():
            if len(value) not in (1, rows):
                argument = f"negative_{self._arguments[name]}"
                raise ParameterError(argument, "give one negative embedding, or one per prompt")
        told = self._told(guidance_scale, size)
        branches: Conditioning = [
            {
                name: np.broadcast_to(value, (rows, *value.shape[1:])).repeat(images_per_prompt, 0)
                for name, value in (branch | told).items()
            }
            for branch in (negative, positive)
        ]
        return branches, warnings

    def _encode(self, prompts: Sequence[str], clip_skip: int | None) -> tuple[dict[str, Array], list[str]]:
        """The first prompt is the negative one, which diffusers never skips layers for."""
        ids, warnings = self._tokenizer(prompts)
        most = self._manifest.clip_skip
        if clip_skip is not None and (isinstance(clip_skip, bool) or clip_skip not in range(most + 1)):
            can = f"a whole number from 0 to {most}" if most else "left out: this model's text encoder cannot skip"
            raise ParameterError("clip_skip", f"clip_skip must be {can}, not {clip_skip!r}")
        if any(one.name == "clip_skip" for one in self._manifest.networks["text_encoder"].inputs):
            ids["clip_skip"] = np.array([0, *[clip_skip or 0] * (len(prompts) - 1)], np.int64)
        return self._encoder.run(**ids), warnings

    def _given(self, texts: Texts, prefix: str, encoded: Mapping[str, Array]) -> dict[str, Array] | None:
        """Embeddings that were given in place of a text: all of them, or none."""
        values = {name: getattr(texts, prefix + argument) for name, argument in self._arguments.items()}
        for argument in ("prompt_embeds", "pooled_prompt_embeds"):
            if argument not in self._arguments.values() and getattr(texts, prefix + argument) is not None:
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

    def _told(self, guidance_scale: float, size: tuple[int, int]) -> dict[str, Array]:
        """What some denoisers take beside texts: one row that is the same for all images.

        time_ids: size of the original, where it was cropped, size of the image (Podell et al. 2023, section 2.2).
        """
        width, height = size
        known = {"time_ids": [height, width, 0, 0, height, width], "guidance": guidance_scale}
        return {name: np.array([value], np.float32) for name, value in known.items() if name in self._inputs}
