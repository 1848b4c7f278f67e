"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from export.families.base import (
    PROJECTED,
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
from export.networks.text_encoders import SD3_TOKENS
from export.networks.vae import vae_factor


def _sides(pipeline: Any, full: bool = False) -> Sides:
    """Positions are cut out of a table, which ends."""
    config, factor = pipeline.transformer.config, vae_factor(pipeline)
    token = config.patch_size * factor
    return sides_around(config.sample_size * factor, token, full, config.pos_embed_max_size * token)


def _refused(pipeline: Any) -> str | None:
    config, t5 = pipeline.transformer.config, pipeline.text_encoder_3
    pooled = sum(one.config.projection_dim for one in (pipeline.text_encoder, pipeline.text_encoder_2))
    wide = config.joint_attention_dim if t5 is None else t5.config.d_model
    return (
        channels(pipeline)
        or widths("its transformer's joint_attention_dim", config.joint_attention_dim, "T5's states", wide)
        or widths(
            "its transformer's pooled_projection_dim", config.pooled_projection_dim, "CLIP's pooled states", pooled
        )
    )


STABLE_DIFFUSION_3 = Family(
    networks={
        "text_encoder": (("text_encoder", "text_encoder_2", "text_encoder_3"), text_encoders.clip_pair_t5_text),
        "denoiser": (("transformer",), denoisers.joint_transformer),
        **VAE_NETWORKS,
    },
    texts=(
        Text("tokenizer", "input_ids"),
        Text("tokenizer_2", "input_ids_2"),
        Text("tokenizer_3", "input_ids_3", lambda tokenizer: SD3_TOKENS, T5_TOKENIZERS),
    ),
    sides=_sides,
    guidance=lambda pipeline: "classifier_free",
    refused=_refused,
    patch=2,
    strength_up=True,
    optional=("text_encoder_3", "tokenizer_3"),
    encoders={"text_encoder": PROJECTED, "text_encoder_2": PROJECTED, "text_encoder_3": T5},
    denoiser="SD3Transformer2DModel",
    defaults={"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
)
