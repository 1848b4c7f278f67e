"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

from export.families.base import CACHED_UNET, CLIP, PROJECTED, VAE_NETWORKS, Family, Text
from export.families.stable_diffusion import unet_guidance, unet_refused, unet_sides, unet_uncacheable
from export.networks import denoisers, text_encoders


def _refused(pipeline: Any) -> str | None:
    if pipeline.config.get("requires_aesthetics_score"):
        return "it is a refiner, which starts from another model's latents"
    if pipeline.unet.config.addition_embed_type != "text_time":
        return f"its UNet's addition_embed_type is {pipeline.unet.config.addition_embed_type!r}, not 'text_time'"
    return unet_refused(pipeline)


STABLE_DIFFUSION_XL = Family(
    networks={
        "text_encoder": (("text_encoder", "text_encoder_2"), text_encoders.clip_pair_text),
        "denoiser": (("unet",), denoisers.pooled_unet),
        **VAE_NETWORKS,
    },
    cached=CACHED_UNET,
    uncacheable=unet_uncacheable,
    texts=(Text("tokenizer", "input_ids"), Text("tokenizer_2", "input_ids_2")),
    sides=unet_sides,
    guidance=unet_guidance,
    refused=_refused,
    wide_vae=True,
    encoders={"text_encoder": CLIP, "text_encoder_2": PROJECTED},
    denoiser="UNet2DConditionModel",
    defaults={"num_inference_steps": 50, "guidance_scale": 5.0, "strength": 0.3},
)
