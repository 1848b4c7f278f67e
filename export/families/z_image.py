"""Z-Image and Z-Image-Turbo: one stream of image and text tokens, whose scale of guidance counts from 0.

Diffusers' transformer takes lists of images and captions, one by one; here they are a batch. Both are filled up to a
multiple of 32 tokens with learned tokens, which every other one sees:
- captions have a fixed length here, so that what is beyond the filled length is masked;
- those of an image all stand at position 0 and so stay the same: one of them, weighted with their number, is enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.families.base import QWEN_TOKENIZERS, VAE_NETWORKS, Family, Sides, Text, channels, sides_around, widths
from export.families.templates import chat, user
from export.networks import Exported, language_models, rotary
from export.networks.denoisers import denoiser
from export.networks.language_models import real_rows
from export.networks.rotary import Angles
from export.networks.vae import vae_factor

SIDE = 1024  # pixels; a folder does not say
TOKENS = 512  # the default `max_sequence_length` of the pipeline
MULTIPLE = 32  # diffusers' SEQ_MULTI_OF
MASKED = -1e4  # added to what is not seen; fp16 has it


class _Attention:
    """Diffusers' `ZSingleStreamAttnProcessor` with real numbers."""

    def __call__(self, attn: Any, hidden_states: Tensor, attention_mask: Tensor, freqs_cis: Angles, **_: Any) -> Tensor:
        query, key, value = (
            rotary.split_heads(attn, make(hidden_states)) for make in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = rotary.rotate(query, freqs_cis), rotary.rotate(key, freqs_cis)
        result: Tensor = attn.to_out[0](rotary.attend(query, key, value, attention_mask.to(query.dtype)))
        return result


class ZImage(nn.Module):
    """Latents, a timestep per row, and states of a text, zeros behind its end → a velocity of the latents' shape."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.model: Any = transformer
        for block in (*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers):
            block.attention.set_processor(_Attention())
        config = transformer.config
        self.tables = [
            rotary.table(length, dim, config.rope_theta)
            for length, dim in zip(config.axes_lens, config.axes_dims, strict=True)
        ]

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The model's own time runs from 0 to 1, and its velocity the other way."""
        model, (batch, channels, height, width) = self.model, sample.shape
        rows, columns = height // 2, width // 2
        told = model.t_embedder((1000 - timestep) / 1000 * model.t_scale).to(sample.dtype)
        there = real_rows(encoder_hidden_states)
        filled = (there.sum(1) + MULTIPLE - 1) // MULTIPLE * MULTIPLE
        squares = sample.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 3, 5, 1)
        image = model.all_x_embedder["2-1"](squares.reshape(batch, rows * columns, 4 * channels))
        image = torch.cat([image, model.x_pad_token.expand(batch, 1, -1)], 1)
        sees_image, image_angles = self._fill(rows * columns), self._of_image(filled, rows, columns)
        for block in model.noise_refiner:
            image = block(image, sees_image, image_angles, told)
        text = torch.where(there[..., None], model.cap_embedder(encoder_hidden_states), model.cap_pad_token)
        words = torch.arange(text.shape[1])
        sees_text = torch.where(words < filled[:, None], 0.0, MASKED)[:, None, None]
        zeros = torch.zeros_like(words)
        text_angles = self._angles(*(one[None] for one in (words + 1, zeros, zeros)))
        for block in model.context_refiner:
            text = block(text, sees_text, text_angles)
        sees = torch.cat([sees_image.expand(batch, -1, -1, -1), sees_text], -1)
        angles = (
            torch.cat([image_angles[0], text_angles[0].expand(batch, -1, -1)], 1),
            torch.cat([image_angles[1], text_angles[1].expand(batch, -1, -1)], 1),
        )
        both = torch.cat([image, text], 1)
        for block in model.layers:
            both = block(both, sees, angles, told)
        output = model.all_final_layer["2-1"](both[:, : rows * columns], c=told)
        squares = output.view(batch, rows, columns, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
        result: Tensor = -squares.reshape(batch, channels, height, width)
        return result

    def _fill(self, tokens: int) -> Tensor:
        """(1, 1, 1, tokens + 1), added to scores: the token that fills an image up counts as often as there are."""
        number = (torch.arange(MULTIPLE) < (MULTIPLE - tokens % MULTIPLE) % MULTIPLE).sum().float()
        weight = torch.where(number > 0, number.clamp(min=1).log(), MASKED)
        return torch.cat([torch.zeros(tokens), weight[None]])[None, None, None]

    def _angles(self, *places: Tensor) -> Angles:
        """Of positions on three axes, (batch or 1, tokens) each."""
        found = [(cos[place], sin[place]) for (cos, sin), place in zip(self.tables, places, strict=True)]
        cosines, sines = zip(*found, strict=True)
        return torch.cat(cosines, -1), torch.cat(sines, -1)

    def _of_image(self, filled: Tensor, rows: int, columns: int) -> Angles:
        """Behind the filled caption, by row and column; then the token that fills up."""
        row = torch.arange(rows)[:, None].expand(rows, columns).reshape(1, -1)
        column = torch.arange(columns)[None].expand(rows, columns).reshape(1, -1)
        behind = (filled[:, None] + 1).expand(-1, rows * columns)
        places = (behind, row.expand(filled.shape[0], -1), column.expand(filled.shape[0], -1))
        return self._angles(*(nn.functional.pad(place, (0, 1)) for place in places))


def _denoiser(pipeline: Any) -> Exported:
    transformer, config = pipeline.transformer, pipeline.transformer.config
    states = (TOKENS, config.cap_feat_dim)
    return denoiser(ZImage(transformer), config.in_channels, transformer.dtype, encoder_hidden_states=states)


def _text(pipeline: Any) -> Exported:
    """The state before the last, without those of padding."""
    return language_models.encoder(pipeline.text_encoder, pipeline.tokenizer, TOKENS, (-2,), zero=True)


def _sides(pipeline: Any, full: bool = False) -> Sides:
    """Positions are cut out of tables, which end."""
    token, (_, rows, columns) = 2 * vae_factor(pipeline), pipeline.transformer.config.axes_lens
    return sides_around(SIDE, token, full, min(rows, columns) * token)


def _refused(pipeline: Any) -> str | None:
    config = pipeline.transformer.config
    if config.siglip_feat_dim is not None:
        return "its transformer reads images beside the text (siglip_feat_dim)"
    if (2, 1) not in zip(config.all_patch_size, config.all_f_patch_size, strict=True):
        return f"its transformer's patches are {config.all_patch_size}; squares of 2 by 2 are used"
    if config.axes_lens[0] < TOKENS + 2:
        return f"its transformer knows {config.axes_lens[0]} positions on its first axis; a text takes {TOKENS + 2}"
    wide = pipeline.text_encoder.config.hidden_size
    return channels(pipeline) or widths(
        "its transformer's cap_feat_dim", config.cap_feat_dim, "its text encoder's states", wide
    )


Z_IMAGE = Family(
    networks={
        "text_encoder": (("text_encoder",), _text),
        "denoiser": (("transformer",), _denoiser),
        "vae_decoder": VAE_NETWORKS["vae_decoder"],
    },
    texts=(
        Text(
            "tokenizer", "input_ids", lambda tokenizer: TOKENS, QWEN_TOKENIZERS,
            template=chat(user, add_generation_prompt=True, enable_thinking=True),
        ),
    ),
    sides=_sides,
    guidance=lambda pipeline: "classifier_free",
    guidance_offset=1.0,
    refused=_refused,
    patch=2,
    even_sigmas=True,
    encoders={"text_encoder": ("Qwen3Model", "Qwen3ForCausalLM")},
    denoiser="ZImageTransformer2DModel",
    vaes=("AutoencoderKL",),
    defaults={"num_inference_steps": 50, "guidance_scale": 5.0, "strength": 0.6},
)  # fmt: skip
