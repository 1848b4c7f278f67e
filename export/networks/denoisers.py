"""The denoisers of every family: latents, a timestep per row and conditioning to a prediction of the latents' shape."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from export.networks import Exported, Input, normal, timesteps, uniform
from export.networks.text_encoders import FLUX_TOKENS, SD3_TOKENS


class UNet(nn.Module):
    """Latents, a timestep per row, and states of a text → a prediction of the latents' shape."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.model = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """A batch may mix timesteps, which lets one call serve several drafts."""
        output: Tensor = self.model(sample, timestep, encoder_hidden_states).sample
        return output


class GuidanceEmbedding(nn.Module):
    """The sinusoidal embedding of 1000·(scale − 1), as latent consistency models are told it (Luo et al. 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.odd = width % 2
        self.frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))

    def forward(self, guidance: Tensor) -> Tensor:
        """(batch) → (batch, width)."""
        angles = 1000 * (guidance.float() - 1)[:, None] * self.frequencies[None]
        return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, self.odd))


class GuidedUNet(UNet):
    """A UNet that is told the guidance scale as an embedding: latent consistency models."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.embedding = GuidanceEmbedding(unet.config.time_cond_proj_dim)

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance: Tensor
    ) -> Tensor:
        """As UNet."""
        told = self.embedding(guidance).to(sample.dtype)
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, timestep_cond=told).sample
        return output


class PooledUNet(UNet):
    """A UNet with a pooled embedding and time ids (original size, crop, target size): Stable Diffusion XL.

    With `time_cond_proj_dim` it is told the guidance scale, too: LCM-SDXL.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        width = unet.config.time_cond_proj_dim
        self.embedding = None if width is None else GuidanceEmbedding(width)

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As UNet. The time ids become float32 inside, and the exporter does not widen what is joined with them."""
        more = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        told = None
        if self.embedding is not None and guidance is not None:
            told = self.embedding(guidance).to(sample.dtype)
        output: Tensor = self.model(
            sample, timestep, encoder_hidden_states, timestep_cond=told, added_cond_kwargs=more
        ).sample
        return output


class JointTransformer(nn.Module):
    """Stable Diffusion 3's transformer: latents in, velocity out."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.model: Any = transformer
        transformer.pos_embed.cropped_pos_embed = partial(_cropped, transformer.pos_embed)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        """As UNet."""
        output: Tensor = self.model(
            hidden_states=sample, timestep=timestep, encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
        ).sample  # fmt: skip
        return output


def _cropped(table: Any, height: int, width: int) -> Tensor:
    """The middle of a table of positions, as diffusers cuts it out.

    Written without a division of a negative number: the exporter rounds those in the other direction.
    """
    most, rows, columns = table.pos_embed_max_size, height // table.patch_size, width // table.patch_size
    top, left = (most // 2 - (side + 1 - most % 2) // 2 for side in (rows, columns))
    square = table.pos_embed.reshape(1, most, most, -1)[:, top : top + rows, left : left + columns]
    middle: Tensor = square.reshape(1, rows * columns, square.shape[-1])
    return middle


class PackedTransformer(nn.Module):
    """Flux: squares of 2 by 2 latents are one token, and each token is told its row and column."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.model = transformer
        self.embed, transformer.time_text_embed = transformer.time_text_embed, _Ready()

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As UNet.

        The transformer would round times and scales to its own type before it embeds them, in fp16 by up to a quarter
        of a step of a thousand; here they are embedded as they came, and the transformer gets the embedding.
        """
        batch, channels, height, width = sample.shape
        rows, columns = height // 2, width // 2
        squares = sample.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        row = torch.arange(rows)[:, None].expand(rows, columns)
        column = torch.arange(columns)[None].expand(rows, columns)
        places = torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).to(sample.dtype)
        told = () if guidance is None else (1000 * guidance.float(),)
        output = self.model(
            hidden_states=squares.reshape(batch, rows * columns, channels * 4), timestep=timestep,
            pooled_projections=self.embed(timestep, *told, pooled_projections),
            encoder_hidden_states=encoder_hidden_states,
            txt_ids=sample.new_zeros((encoder_hidden_states.shape[1], 3)), img_ids=places,
        ).sample  # fmt: skip
        squares = output.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        result: Tensor = squares.reshape(batch, channels, height, width)
        return result


class _Ready(nn.Module):
    """Stands where a transformer embeds times and pooled texts, and hands on what comes as the pooled text."""

    def forward(self, timestep: Tensor, pooled_projections: Tensor) -> Tensor:
        return pooled_projections


def denoiser(module: nn.Module, channels: int, dtype: torch.dtype, **conditioning: tuple[int, ...]) -> Exported:
    """Latents and timesteps, then the conditioning by name with the axes of one row."""
    sample = Input("sample", ("batch", channels, "height", "width"), normal(dtype))
    draws = {"guidance": uniform(dtype, 1, 8), "time_ids": uniform(dtype, 0, 1024)}
    more = [Input(name, ("batch", *axes), draws.get(name, normal(dtype))) for name, axes in conditioning.items()]
    inputs = (sample, Input("timestep", ("batch",), timesteps), *more)
    return Exported(module, inputs, {"out_sample": sample.axes})


def unet(pipeline: Any) -> Exported:
    """Stable Diffusion 1 and 2; with an embedding of the scale, latent consistency."""
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    words = {"encoder_hidden_states": (tokens, unet.config.cross_attention_dim)}
    if unet.config.time_cond_proj_dim is not None:
        return denoiser(GuidedUNet(unet), unet.config.in_channels, unet.dtype, **words, guidance=())
    return denoiser(UNet(unet), unet.config.in_channels, unet.dtype, **words)


def pooled_unet(pipeline: Any) -> Exported:
    """Stable Diffusion XL."""
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    told: dict[str, tuple[int, ...]] = {} if unet.config.time_cond_proj_dim is None else {"guidance": ()}
    return denoiser(
        PooledUNet(unet), unet.config.in_channels, unet.dtype,
        encoder_hidden_states=(tokens, unet.config.cross_attention_dim), text_embeds=(pooled,), time_ids=(6,), **told,
    )  # fmt: skip


def joint_transformer(pipeline: Any) -> Exported:
    """Stable Diffusion 3."""
    transformer, config = pipeline.transformer, pipeline.transformer.config
    tokens = pipeline.tokenizer.model_max_length + SD3_TOKENS
    return denoiser(
        JointTransformer(transformer), config.in_channels, transformer.dtype,
        encoder_hidden_states=(tokens, config.joint_attention_dim), pooled_projections=(config.pooled_projection_dim,),
    )  # fmt: skip


def packed_transformer(pipeline: Any) -> Exported:
    """Flux."""
    transformer, config = pipeline.transformer, pipeline.transformer.config
    told: dict[str, tuple[int, ...]] = {"guidance": ()} if config.guidance_embeds else {}
    return denoiser(
        PackedTransformer(transformer), config.in_channels // 4, transformer.dtype,
        encoder_hidden_states=(FLUX_TOKENS, config.joint_attention_dim),
        pooled_projections=(config.pooled_projection_dim,), **told,
    )  # fmt: skip
