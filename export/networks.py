"""The torch modules behind the networks of every family, with their inputs: what is exported to ONNX.

Everything that is special to one family happens in these graphs: how several text encoders make one conditioning, how
latents are packed, positions, scaling before the VAE. So every text encoder here maps token ids to the denoiser's
inputs by name, and every denoiser maps latents to an output of their shape.

Axes of tensors are named: `batch`; `height` and `width` of the latents; `8*height` for what is so many times larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Axis = int | str
SD3_TOKENS = 256  # that T5 reads: diffusers' default `max_sequence_length` of each pipeline
FLUX_TOKENS = 512


@dataclass(frozen=True)
class Input:
    """One input of a network: its axes, and random values for it. `values` takes a shape, with numbers for names."""

    name: str
    axes: tuple[Axis, ...]
    values: Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Exported:
    """A network to export. Its module takes the inputs in order; with several outputs it returns a tuple."""

    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: Mapping[str, tuple[Axis, ...]]


# --- random inputs -------------------------------------------------------------------------------------------------


def _ids(words: int) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: torch.randint(words, shape)


def _normal(dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: torch.randn(shape).to(dtype)


def _uniform(dtype: torch.dtype, low: float, high: float) -> Callable[[tuple[int, ...]], Tensor]:
    return lambda shape: (low + (high - low) * torch.rand(shape)).to(dtype)


def _timesteps(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(1000, shape).float()


# --- text ----------------------------------------------------------------------------------------------------------


def _layer(states: Sequence[Tensor], clip_skip: Tensor, last: int) -> Tensor:
    """Of the hidden states of every layer, for each row the one that is `clip_skip` before the `last` from the end."""
    stacked = torch.stack(tuple(states), 1)
    index = (len(states) - last) - clip_skip
    return stacked.gather(1, index.view(-1, 1, 1, 1).expand(-1, 1, *stacked.shape[2:])).squeeze(1)


class ClipText(nn.Module):
    """Token ids (batch, tokens) → the normalized states of a layer, as Stable Diffusion 1 and 2 use them."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.model = pipeline.text_encoder

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        """`clip_skip` 0 is the last layer."""
        states = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        normalize = getattr(self.model, "text_model", self.model).final_layer_norm
        result: Tensor = normalize(_layer(states, clip_skip, 1))
        return result


class ClipPairText(nn.Module):
    """Two CLIP encoders side by side, with the second one's pooled embedding: Stable Diffusion XL."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.first, self.second = pipeline.text_encoder, pipeline.text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor, clip_skip: Tensor) -> tuple[Tensor, Tensor]:
        """States of the layer before the last, unnormalized; `clip_skip` counts from there."""
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        states = [_layer(one.hidden_states, clip_skip, 2) for one in (first, second)]
        return torch.cat(states, -1), second.text_embeds


class ClipPairT5Text(nn.Module):
    """Two CLIP encoders side by side, padded to T5's width, then T5's states, or zeros without T5: SD 3."""

    def __init__(self, pipeline: Any, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
        self.width = width

    def forward(
        self, input_ids: Tensor, input_ids_2: Tensor, clip_skip: Tensor, input_ids_3: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """T5's ids come last, where there is a T5."""
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        states = torch.cat([_layer(one.hidden_states, clip_skip, 2) for one in (first, second)], -1)
        states = nn.functional.pad(states, (0, self.width - states.shape[-1]))
        if self.third is None:
            long = states.new_zeros((states.shape[0], SD3_TOKENS, self.width))
        else:
            long = self.third(input_ids_3)[0].to(states.dtype)
        return torch.cat([states, long], 1), torch.cat([first.text_embeds, second.text_embeds], -1)


class PooledT5Text(nn.Module):
    """CLIP's pooled state and T5's states: Flux."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.first, self.second = pipeline.text_encoder, pipeline.text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Unmasked, as in diffusers."""
        return self.second(input_ids_2)[0], self.first(input_ids).pooler_output


def _clip_inputs(tokens: int, *models: Any, skip: bool = True) -> tuple[Input, ...]:
    """Ids per encoder, then `clip_skip`."""
    names = ("input_ids", "input_ids_2")
    found = [
        Input(name, ("batch", tokens), _ids(model.config.vocab_size))
        for name, model in zip(names, models, strict=False)
    ]
    if skip:
        found.append(Input("clip_skip", ("batch",), _ids(min(model.config.num_hidden_layers for model in models))))
    return tuple(found)


def clip_text(pipeline: Any) -> Exported:
    """Stable Diffusion 1 and 2, latent consistency."""
    encoder, tokens = pipeline.text_encoder, pipeline.tokenizer.model_max_length
    states = ("batch", tokens, encoder.config.hidden_size)
    return Exported(ClipText(pipeline), _clip_inputs(tokens, encoder), {"encoder_hidden_states": states})


def clip_pair_text(pipeline: Any) -> Exported:
    """Stable Diffusion XL."""
    first, second, tokens = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer.model_max_length
    outputs = {
        "encoder_hidden_states": ("batch", tokens, first.config.hidden_size + second.config.hidden_size),
        "text_embeds": ("batch", second.config.projection_dim),
    }
    return Exported(ClipPairText(pipeline), _clip_inputs(tokens, first, second), outputs)


def clip_pair_t5_text(pipeline: Any) -> Exported:
    """Stable Diffusion 3."""
    first, second, third = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    config, tokens = pipeline.transformer.config, pipeline.tokenizer.model_max_length
    outputs = {
        "encoder_hidden_states": ("batch", tokens + SD3_TOKENS, config.joint_attention_dim),
        "pooled_projections": ("batch", config.pooled_projection_dim),
    }
    inputs = _clip_inputs(tokens, first, second)
    if third is not None:
        inputs = (*inputs, Input("input_ids_3", ("batch", SD3_TOKENS), _ids(third.config.vocab_size)))
    return Exported(ClipPairT5Text(pipeline, config.joint_attention_dim), inputs, outputs)


def pooled_t5_text(pipeline: Any) -> Exported:
    """Flux."""
    first, second, tokens = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer.model_max_length
    outputs = {
        "encoder_hidden_states": ("batch", FLUX_TOKENS, second.config.d_model),
        "pooled_projections": ("batch", first.config.hidden_size),
    }
    long = Input("input_ids_2", ("batch", FLUX_TOKENS), _ids(second.config.vocab_size))
    inputs = (*_clip_inputs(tokens, first, skip=False), long)
    return Exported(PooledT5Text(pipeline), inputs, outputs)


# --- denoisers -----------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Latents, a timestep per row, and states of a text → a prediction of the latents' shape."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.model = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """A batch may mix timesteps, which lets one call serve several drafts."""
        output: Tensor = self.model(sample, timestep, encoder_hidden_states).sample
        return output


class GuidedUNet(UNet):
    """A UNet that is told the guidance scale as an embedding: latent consistency models (Luo et al. 2023)."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        half = unet.config.time_cond_proj_dim // 2
        self.frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance: Tensor
    ) -> Tensor:
        """The sinusoidal embedding of 1000·(guidance − 1)."""
        angles = 1000 * (guidance.float() - 1)[:, None] * self.frequencies[None]
        embedding = torch.cat([angles.sin(), angles.cos()], 1).to(sample.dtype)
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, timestep_cond=embedding).sample
        return output


class PooledUNet(UNet):
    """A UNet with a pooled embedding and time ids (original size, crop, target size): Stable Diffusion XL."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        """As UNet. The time ids become float32 inside, and the exporter does not widen what is joined with them."""
        more = {"text_embeds": text_embeds.float(), "time_ids": time_ids}
        output: Tensor = self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=more).sample
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


def _denoiser(module: nn.Module, channels: int, dtype: torch.dtype, **conditioning: tuple[int, ...]) -> Exported:
    """Latents and timesteps, then the conditioning by name with the axes of one row."""
    sample = Input("sample", ("batch", channels, "height", "width"), _normal(dtype))
    draws = {"guidance": _uniform(dtype, 1, 8), "time_ids": _uniform(dtype, 0, 1024)}
    more = [Input(name, ("batch", *axes), draws.get(name, _normal(dtype))) for name, axes in conditioning.items()]
    inputs = (sample, Input("timestep", ("batch",), _timesteps), *more)
    return Exported(module, inputs, {"out_sample": sample.axes})


def unet(pipeline: Any) -> Exported:
    """Stable Diffusion 1 and 2; with an embedding of the scale, latent consistency."""
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    words = {"encoder_hidden_states": (tokens, unet.config.cross_attention_dim)}
    if unet.config.time_cond_proj_dim is not None:
        return _denoiser(GuidedUNet(unet), unet.config.in_channels, unet.dtype, **words, guidance=())
    return _denoiser(UNet(unet), unet.config.in_channels, unet.dtype, **words)


def pooled_unet(pipeline: Any) -> Exported:
    """Stable Diffusion XL."""
    unet, tokens = pipeline.unet, pipeline.tokenizer.model_max_length
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return _denoiser(
        PooledUNet(unet), unet.config.in_channels, unet.dtype,
        encoder_hidden_states=(tokens, unet.config.cross_attention_dim), text_embeds=(pooled,), time_ids=(6,),
    )  # fmt: skip


def joint_transformer(pipeline: Any) -> Exported:
    """Stable Diffusion 3."""
    transformer, config = pipeline.transformer, pipeline.transformer.config
    tokens = pipeline.tokenizer.model_max_length + SD3_TOKENS
    return _denoiser(
        JointTransformer(transformer), config.in_channels, transformer.dtype,
        encoder_hidden_states=(tokens, config.joint_attention_dim), pooled_projections=(config.pooled_projection_dim,),
    )  # fmt: skip


def packed_transformer(pipeline: Any) -> Exported:
    """Flux."""
    transformer, config = pipeline.transformer, pipeline.transformer.config
    told: dict[str, tuple[int, ...]] = {"guidance": ()} if config.guidance_embeds else {}
    return _denoiser(
        PackedTransformer(transformer), config.in_channels // 4, transformer.dtype,
        encoder_hidden_states=(FLUX_TOKENS, config.joint_attention_dim),
        pooled_projections=(config.pooled_projection_dim,), **told,
    )  # fmt: skip


# --- the VAE -------------------------------------------------------------------------------------------------------


class LatentDecoder(nn.Module):
    """Latents as the denoiser leaves them → pixels in [−1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.shift = _scaling(vae)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The scaling is part of the graph."""
        latents = latent_sample * self.scale.to(latent_sample) + self.shift.to(latent_sample)
        output: Tensor = self.vae.decode(latents).sample
        return output


class LatentEncoder(nn.Module):
    """Pixels in [−1, 1] and normal noise → a sample of their latents, as the denoiser takes them."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.shift = _scaling(vae)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """mean + std · noise, then the inverse of the decoder's scaling."""
        found = self.vae.encode(image).latent_dist
        latents: Tensor = found.mean + found.std * noise
        return (latents - self.shift.to(latents)) / self.scale.to(latents)


def _scaling(vae: Any) -> tuple[Tensor, Tensor]:
    """What the denoiser's latents are multiplied with and what is added, per channel."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale, shift = torch.tensor(1 / config.scaling_factor), torch.tensor(getattr(config, "shift_factor", None) or 0.0)
    if mean is not None and std is not None:
        scale, shift = scale * torch.tensor(std).view(1, -1, 1, 1), torch.tensor(mean).view(1, -1, 1, 1)
    return scale, shift


def vae_factor(pipeline: Any) -> int:
    """How many pixels a latent is wide."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def decoder(pipeline: Any) -> Exported:
    """The decoder of any VAE."""
    vae, factor = pipeline.vae, vae_factor(pipeline)
    latents = Input("latent_sample", ("batch", vae.config.latent_channels, "height", "width"), _normal(vae.dtype))
    pixels = ("batch", vae.config.out_channels, f"{factor}*height", f"{factor}*width")
    return Exported(LatentDecoder(vae), (latents,), {"sample": pixels})


def encoder(pipeline: Any) -> Exported:
    """The encoder of any VAE."""
    vae, factor = pipeline.vae, vae_factor(pipeline)
    latents = ("batch", vae.config.latent_channels, "height", "width")
    pixels = ("batch", vae.config.in_channels, f"{factor}*height", f"{factor}*width")
    inputs = Input("image", pixels, _uniform(vae.dtype, -1, 1)), Input("noise", latents, _normal(vae.dtype))
    return Exported(LatentEncoder(vae), inputs, {"latent_sample": latents})
