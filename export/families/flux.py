"""FLUX.1 dev and schnell."""

from __future__ import annotations

from typing import Any

from export.families.base import (
    CLIP,
    T5,
    T5_TOKENIZERS,
    VAE_NETWORKS,
    Family,
    Sides,
    Text,
    channels,
    sides_around,
    widths,
)  # fmt: skip
from export.networks import denoisers, text_encoders
from export.networks.text_encoders import FLUX_TOKENS
from export.networks.vae import vae_factor

SIDE = 128  # latents; a folder does not say


def _sides(pipeline: Any, full: bool = False) -> Sides:
    factor = vae_factor(pipeline)
    return sides_around(SIDE * factor, 2 * factor, full)


def _refused(pipeline: Any) -> str | None:
    config = pipeline.transformer.config
    wide, pooled = pipeline.text_encoder_2.config.d_model, pipeline.text_encoder.config.hidden_size
    return (
        channels(pipeline, 4)
        or widths("its transformer's joint_attention_dim", config.joint_attention_dim, "T5's states", wide)
        or widths(
            "its transformer's pooled_projection_dim", config.pooled_projection_dim, "CLIP's pooled states", pooled
        )
    )


FLUX = Family(
    networks={
        "text_encoder": (("text_encoder", "text_encoder_2"), text_encoders.pooled_t5_text),
        "denoiser": (("transformer",), denoisers.packed_transformer),
        "vae_decoder": VAE_NETWORKS["vae_decoder"],
    },
    texts=(
        Text("tokenizer", "input_ids"), Text("tokenizer_2", "input_ids_2", lambda tokenizer: FLUX_TOKENS, T5_TOKENIZERS)
    ),
    sides=_sides,
    guidance=lambda pipeline: "embedded" if pipeline.transformer.config.guidance_embeds else "none",
    refused=_refused,
    patch=2,
    even_sigmas=True,
    encoders={"text_encoder": CLIP, "text_encoder_2": T5},
    denoiser="FluxTransformer2DModel",
    defaults={"num_inference_steps": 28, "guidance_scale": 3.5, "strength": 0.6},
)  # fmt: skip
