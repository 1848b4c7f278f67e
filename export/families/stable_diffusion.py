"""Stable Diffusion 1 and 2, and the latent consistency models made of it."""

from __future__ import annotations

from typing import Any

from export.families.base import CACHED_UNET, CLIP, VAE_NETWORKS, Family, Guidance, Sides, Text, sides_around, widths
from export.networks import denoisers, text_encoders
from export.networks.cached import uncacheable
from export.networks.vae import vae_factor


def unet_sides(pipeline: Any, full: bool = False) -> Sides:
    """A UNet halves its sides between levels."""
    config, factor = pipeline.unet.config, vae_factor(pipeline)
    side = config.sample_size if isinstance(config.sample_size, int) else max(config.sample_size)
    return sides_around(side * factor, factor * 2 ** (len(config.down_block_types) - 1), full)


def unet_guidance(pipeline: Any) -> Guidance:
    """A distilled UNet embeds the scale."""
    return "classifier_free" if pipeline.unet.config.time_cond_proj_dim is None else "embedded"


def unet_refused(pipeline: Any) -> str | None:
    """What any UNet must be like."""
    config, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
    if config.in_channels != latents:
        return f"its UNet takes {config.in_channels} channels, not the {latents} of the latents: inpainting or similar"
    if config.encoder_hid_dim_type or config.class_embed_type:
        return "its UNet wants more than a text (an image or a class)"
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    width, wanted = sum(one.config.hidden_size for one in encoders if one), config.cross_attention_dim
    return widths("its UNet's cross_attention_dim", wanted, "its text encoders' states", width)


def unet_uncacheable(pipeline: Any) -> str | None:
    """Why its UNet cannot be cut in two."""
    return uncacheable(pipeline.unet.config)


def _refused(pipeline: Any) -> str | None:
    kind = pipeline.unet.config.addition_embed_type
    if kind is not None:
        return f"its UNet's addition_embed_type is {kind!r}, which a pipeline with one text encoder has not"
    return unet_refused(pipeline)


STABLE_DIFFUSION = Family(
    networks={
        "text_encoder": (("text_encoder",), text_encoders.clip_text),
        "denoiser": (("unet",), denoisers.unet),
        **VAE_NETWORKS,
    },
    cached=CACHED_UNET,
    uncacheable=unet_uncacheable,
    texts=(Text("tokenizer", "input_ids"),),
    sides=unet_sides,
    guidance=unet_guidance,
    refused=_refused,
    encoders={"text_encoder": CLIP},
    denoiser="UNet2DConditionModel",
    defaults={"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 0.8},
)
LATENT_CONSISTENCY = Family(
    networks={
        "text_encoder": (("text_encoder",), text_encoders.clip_text),
        "denoiser": (("unet",), denoisers.unet),
        "vae_decoder": VAE_NETWORKS["vae_decoder"],
    },
    texts=(Text("tokenizer", "input_ids"),),
    sides=unet_sides,
    guidance=unet_guidance,
    refused=_refused,
    encoders={"text_encoder": CLIP},
    denoiser="UNet2DConditionModel",
    defaults={"num_inference_steps": 4, "guidance_scale": 8.5, "strength": 0.8},
)
