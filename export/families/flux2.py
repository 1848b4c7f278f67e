"""FLUX.2 klein and dev: a transformer over squares of normalized latents, which reads a language model's middle layers.

The latents are diffusers' own `latents` argument: 2 by 2 values of the VAE as one with four times the channels, each
normalized by the VAE's batch norm, whose statistics are part of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn

from export.families.base import QWEN_TOKENIZERS, Family, Latents, Sides, Text, sides_around, widths
from export.families.templates import chat, user
from export.networks import Exported, Input, language_models, normal
from export.networks.denoisers import denoiser
from export.networks.vae import vae_factor

SIDE = 1024  # pixels; a folder does not say
TOKENS = 512  # the default `max_sequence_length` of both pipelines
KLEIN_LAYERS, DEV_LAYERS = (9, 18, 27), (10, 20, 30)  # their default `text_encoder_out_layers`


class Flux2(nn.Module):
    """Latents, a timestep per row, and states of a text → a velocity of the latents' shape."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.model: Any = transformer

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """`Flux2Transformer2DModel.forward`, but times and scales are embedded as they came, in float32.

        Positions have four axes: picture, row, column, word.
        """
        model, (batch, channels, height, width) = self.model, sample.shape
        told = self._told(timestep, guidance, sample.dtype)
        mod_image, mod_text = model.double_stream_modulation_img(told), model.double_stream_modulation_txt(told)
        row = torch.arange(height)[:, None].expand(height, width).reshape(-1)
        column = torch.arange(width)[None].expand(height, width).reshape(-1)
        word = torch.arange(encoder_hidden_states.shape[1])
        places = torch.stack([torch.zeros_like(row), row, column, torch.zeros_like(row)], -1)
        words = torch.nn.functional.pad(word[:, None], (3, 0))
        angles = model.pos_embed(torch.cat([words, places]))
        image = model.x_embedder(sample.flatten(2).transpose(1, 2))
        text = model.context_embedder(encoder_hidden_states)
        for block in model.transformer_blocks:
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb_mod_img=mod_image, temb_mod_txt=mod_text,
                image_rotary_emb=angles,
            )  # fmt: skip
        both, mod = torch.cat([text, image], 1), model.single_stream_modulation(told)
        for block in model.single_transformer_blocks:
            both = block(hidden_states=both, encoder_hidden_states=None, temb_mod=mod, image_rotary_emb=angles)
        output = model.proj_out(model.norm_out(both[:, text.shape[1] :], told))
        result: Tensor = output.transpose(1, 2).reshape(batch, channels, height, width)
        return result

    def _told(self, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype) -> Tensor:
        embed = self.model.time_guidance_embed
        told: Tensor = embed.timestep_embedder(embed.time_proj(timestep).to(dtype))
        if guidance is not None:
            told = told + embed.guidance_embedder(embed.time_proj(1000 * guidance.float()).to(dtype))
        return told


def _denoiser(pipeline: Any) -> Exported:
    transformer, config = pipeline.transformer, pipeline.transformer.config
    told: dict[str, tuple[int, ...]] = {"guidance": ()} if config.guidance_embeds else {}
    states = (TOKENS, config.joint_attention_dim)
    return denoiser(Flux2(transformer), config.in_channels, transformer.dtype, encoder_hidden_states=states, **told)


class Decoder(nn.Module):
    """Latents as the denoiser leaves them → pixels in [−1, 1]: the batch norm undone, squares taken apart."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.mean = vae.bn.running_mean.view(1, -1, 1, 1)
        self.std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()

    def forward(self, latent_sample: Tensor) -> Tensor:
        """See the class."""
        latents = latent_sample * self.std.to(latent_sample) + self.mean.to(latent_sample)
        output: Tensor = self.vae.decode(nn.functional.pixel_shuffle(latents, 2)).sample
        return output


def _latents(pipeline: Any) -> Latents:
    return Latents(4 * pipeline.vae.config.latent_channels, 2 * vae_factor(pipeline))


def _decoder(pipeline: Any) -> Exported:
    vae, (channels, factor) = pipeline.vae, (_latents(pipeline).channels, _latents(pipeline).factor)
    latents = Input("latent_sample", ("batch", channels, "height", "width"), normal(vae.dtype))
    pixels = ("batch", vae.config.out_channels, f"{factor}*height", f"{factor}*width")
    return Exported(Decoder(vae), (latents,), {"sample": pixels})


def _text(layers: Callable[[], tuple[int, ...]], model: Callable[[Any], Any]) -> Callable[[Any], Exported]:
    def made(pipeline: Any) -> Exported:
        left = _pads_left(pipeline.tokenizer)
        return language_models.encoder(model(pipeline.text_encoder), pipeline.tokenizer, TOKENS, layers(), left=left)

    return made


def _pads_left(tokenizer: Any) -> bool:
    """The states of padding are used, so where it stands matters."""
    return bool(tokenizer.padding_side == "left")


def _sides(pipeline: Any, full: bool = False) -> Sides:
    return sides_around(SIDE, _latents(pipeline).factor, full)


def _refused(layers: Callable[[], tuple[int, ...]]) -> Callable[[Any], str | None]:
    def refused(pipeline: Any) -> str | None:
        config, language = pipeline.transformer.config, pipeline.text_encoder.config.get_text_config()
        latents, wide = _latents(pipeline).channels, len(layers()) * language.hidden_size
        if config.in_channels != latents:
            return f"its transformer takes {config.in_channels} channels, and its VAE makes {latents} per square"
        if language.num_hidden_layers < (last := max(layers())):
            return f"its text encoder has {language.num_hidden_layers} layers, and the state of layer {last} is used"
        return widths(
            "its transformer's joint_attention_dim", config.joint_attention_dim, "its text encoder's states", wide
        )

    return refused


def _dev_messages(prompt: str) -> list[dict[str, Any]]:
    told = {"system": SYSTEM_MESSAGE, "user": prompt}
    return [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in told.items()]


FLUX2_KLEIN = Family(
    networks={
        "text_encoder": (("text_encoder",), _text(lambda: KLEIN_LAYERS, lambda encoder: encoder.model)),
        "denoiser": (("transformer",), _denoiser),
        "vae_decoder": (("vae",), _decoder),
    },
    texts=(
        Text(
            "tokenizer", "input_ids", lambda tokenizer: TOKENS, QWEN_TOKENIZERS, pad_left=_pads_left,
            template=chat(user, add_generation_prompt=True, enable_thinking=False),
        ),
    ),
    sides=_sides,
    guidance=lambda pipeline: "none" if pipeline.config.get("is_distilled") else "classifier_free",
    refused=_refused(lambda: KLEIN_LAYERS),
    latents=_latents,
    patch=1,
    even_sigmas=True,
    scheduler={"shift_by_steps": True},
    encoders={"text_encoder": ("Qwen3ForCausalLM",)},
    denoiser="Flux2Transformer2DModel",
    vaes=("AutoencoderKLFlux2",),
    defaults={"num_inference_steps": 50, "guidance_scale": 4.0, "strength": 0.6},
)  # fmt: skip
FLUX2_DEV = replace(
    FLUX2_KLEIN,
    networks={
        **FLUX2_KLEIN.networks,
        "text_encoder": (("text_encoder",), _text(lambda: DEV_LAYERS, lambda encoder: encoder.model.language_model)),
    },
    texts=(
        Text(
            "tokenizer", "input_ids", lambda tokenizer: TOKENS, ("PixtralProcessor",), pad_left=_pads_left,
            template=chat(_dev_messages, add_generation_prompt=False),
        ),
    ),
    guidance=lambda pipeline: "embedded" if pipeline.transformer.config.guidance_embeds else "none",
    refused=_refused(lambda: DEV_LAYERS),
    encoders={"text_encoder": ("Mistral3ForConditionalGeneration",)},
)  # fmt: skip
