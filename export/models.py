"""Model families by name: which networks a diffusers folder holds, what goes into them, and what the runtime must know.

Loading is diffusers' own `from_pretrained`; nothing here is special to the embedded model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from engines.errors import ExportError

MAX_BATCH = 64
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class NetworkExport:
    """One network to export: the module, its inputs' names and fresh random examples of them, its output's name.

    The first axis of every input and of the output is the batch.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    output: str
    example: Callable[[int], tuple[Tensor, ...]]


class TextEncoder(nn.Module):
    """Token ids (batch, tokens) int64 → embeddings (batch, tokens, width)."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.model = pipeline.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """The last hidden state, which is what Stable Diffusion conditions on."""
        output: Tensor = self.model(input_ids=input_ids).last_hidden_state
        return output


class NoisePredictor(nn.Module):
    """Latents, a timestep per row, and embeddings → ε of the latents' shape."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.model = pipeline.unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """A batch may mix timesteps, which lets one call serve several drafts."""
        output: Tensor = self.model(sample, timestep, encoder_hidden_states).sample
        return output


class LatentDecoder(nn.Module):
    """Unscaled latents → pixels in [−1, 1]."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.model = pipeline.vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The VAE's decoder."""
        output: Tensor = self.model.decode(latent_sample).sample
        return output


def load_pipeline(folder: Path, precision: str = "fp32") -> Any:
    """The diffusers pipeline in a folder; ExportError when it is none, or of a family we cannot export."""
    diffusers_logging.set_verbosity_error()  # both libraries chat about optional packages
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    index = folder / "model_index.json"
    if not index.is_file():
        raise ExportError(f"{folder} is not a diffusers model: it has no model_index.json")
    try:
        family = json.loads(index.read_text()).get("_class_name")
        if family not in FAMILIES:
            raise ExportError(f"{folder} holds a {family}; this version exports {', '.join(FAMILIES)}")
        return StableDiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=DTYPES[precision]
        )
    except (OSError, ValueError, SafetensorError) as error:  # missing or truncated files, an index that is no JSON
        raise ExportError(f"{folder} cannot be loaded by diffusers: {error}") from error


def stable_diffusion(pipeline: Any) -> dict[str, NetworkExport]:
    """The networks of Stable Diffusion 1.x: CLIP text encoder, conditional UNet, VAE decoder."""
    unet, tokenizer = pipeline.unet.config, pipeline.tokenizer
    tokens, side = tokenizer.model_max_length, unet.sample_size
    vocabulary, trained = pipeline.text_encoder.config.vocab_size, pipeline.scheduler.config.num_train_timesteps

    def ids(batch: int) -> tuple[Tensor, ...]:
        return (torch.randint(vocabulary, (batch, tokens)),)

    dtype = pipeline.unet.dtype

    def latents(batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, unet.in_channels, side, side).to(dtype),)

    def noisy(batch: int) -> tuple[Tensor, ...]:
        words = torch.randn(batch, tokens, unet.cross_attention_dim).to(dtype)
        return (*latents(batch), torch.randint(trained, (batch,)).float(), words)

    return {
        "text_encoder": NetworkExport(TextEncoder(pipeline), ("input_ids",), "last_hidden_state", ids),
        "unet": NetworkExport(
            NoisePredictor(pipeline), ("sample", "timestep", "encoder_hidden_states"), "out_sample", noisy
        ),
        "vae_decoder": NetworkExport(LatentDecoder(pipeline), ("latent_sample",), "sample", latents),
    }


FAMILIES: dict[str, Callable[[Any], dict[str, NetworkExport]]] = {"StableDiffusionPipeline": stable_diffusion}
