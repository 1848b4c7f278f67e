"""Model families: which networks a diffusers pipeline is made of, and what the runtime must know of it.

A family is one entry in `FAMILIES`, and the runtime never asks for its name: what is special to it went into the graphs
of its networks (`export/networks.py`) or is a field of the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engines.errors import ExportError
from export.networks import Exported, denoisers, text_encoders, vae
from export.networks.text_encoders import FLUX_TOKENS, SD3_TOKENS
from export.networks.vae import vae_factor

Guidance = Literal["classifier_free", "embedded", "none"]
_CLIP, _PROJECTED, _T5 = (
    ("CLIPTextModel", "CLIPTextModelWithProjection"),
    ("CLIPTextModelWithProjection",),
    ("T5EncoderModel",),
)
_CLIP_TOKENIZERS, _T5_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")
_VAES = ("AutoencoderKL", "AutoencoderTiny")


@dataclass(frozen=True)
class Text:
    """A tokenizer of a pipeline, the network input that its ids go into, and how many ids that takes."""

    tokenizer: str
    input: str
    tokens: Callable[[Any], int] = lambda tokenizer: int(tokenizer.model_max_length)


@dataclass(frozen=True)
class Sides:
    """Images in pixels: each side a multiple of `multiple` between `least` and `most`; `default` is square."""

    default: int
    least: int
    most: int
    multiple: int


@dataclass(frozen=True)
class Family:
    """An entry. Its functions take a `loading.Components`, where what is not loaded still has its config.

    sides: the sides of images; with `full=True` all that the networks can do, else what is exported by default.
    networks: by name, the pipeline's components that it is made of, and what makes it of them.
    guidance: whether two passes are combined, the denoiser is told the scale, or there is none.
    patch: latents per side of a token, where the schedule depends on the number of tokens.
    even_sigmas: the pipeline itself, not its scheduler, spaces the noise levels evenly from 1 down to 1/N.
    strength_up: the number of steps that a strength stands for is rounded up, as diffusers does in this family.
    wide_vae: a VAE whose config says `force_upcast` is not run in fp16, as diffusers does in this family.
    optional: components that a folder may lack, beside those that no family uses.
    encoders, denoiser: the classes that the networks are made for, by component; see `classes`.
    """

    networks: Mapping[str, tuple[tuple[str, ...], Callable[[Any], Exported]]]
    texts: tuple[Text, ...]
    sides: Callable[..., Sides]
    guidance: Callable[[Any], Guidance]
    defaults: Mapping[str, float]
    encoders: Mapping[str, tuple[str, ...]]
    denoiser: str
    refused: Callable[[Any], str | None] = lambda pipeline: None
    patch: int | None = None
    even_sigmas: bool = False
    strength_up: bool = False
    wide_vae: bool = False
    optional: tuple[str, ...] = ()

    def classes(self, component: str) -> tuple[str, ...]:
        """The classes that a component can be of; empty where that is asked elsewhere (schedulers)."""
        if component in ("unet", "transformer"):
            return (self.denoiser,)
        if component.startswith("tokenizer"):
            encoder = self.encoders[component.replace("tokenizer", "text_encoder")]
            return _T5_TOKENIZERS if encoder == _T5 else _CLIP_TOKENIZERS
        return _VAES if component == "vae" else self.encoders.get(component, ())


# --- sizes, guidance, what cannot be done ----------------------------------------------------------------------------


def _sides(default: int, multiple: int, full: bool, most: int | None = None) -> Sides:
    """Half to double the default side; with `full`, everything that the networks can do."""
    least, largest = (multiple, most or 16 * default) if full else (default // 2, min(2 * default, most or 2 * default))

    def whole(side: int) -> int:
        return max(multiple, side // multiple * multiple)

    return Sides(whole(default), whole(least), whole(largest), multiple)


def _unet_sides(pipeline: Any, full: bool = False) -> Sides:
    """A UNet halves its sides between levels."""
    config, factor = pipeline.unet.config, vae_factor(pipeline)
    side = config.sample_size if isinstance(config.sample_size, int) else max(config.sample_size)
    return _sides(side * factor, factor * 2 ** (len(config.down_block_types) - 1), full)


def _joint_sides(pipeline: Any, full: bool = False) -> Sides:
    """Positions are cut out of a table, which ends."""
    config, factor = pipeline.transformer.config, vae_factor(pipeline)
    token = config.patch_size * factor
    return _sides(config.sample_size * factor, token, full, config.pos_embed_max_size * token)


def _packed_sides(pipeline: Any, full: bool = False) -> Sides:
    factor = vae_factor(pipeline)
    return _sides(FLUX_SIDE * factor, 2 * factor, full)


def _guidance_of_unet(pipeline: Any) -> Guidance:
    return "classifier_free" if pipeline.unet.config.time_cond_proj_dim is None else "embedded"


def _unet_refused(pipeline: Any) -> str | None:
    config, latents = pipeline.unet.config, pipeline.vae.config.latent_channels
    if config.in_channels != latents:
        return f"its UNet takes {config.in_channels} channels, not the {latents} of the latents: inpainting or similar"
    if config.encoder_hid_dim_type or config.class_embed_type:
        return "its UNet wants more than a text (an image or a class)"
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    width, wanted = sum(one.config.hidden_size for one in encoders if one), config.cross_attention_dim
    return _widths("its UNet's cross_attention_dim", wanted, "its text encoders' states", width)


def _widths(name: str, wanted: object, other: str, width: object) -> str | None:
    """What the text encoders make has the width that the denoiser takes; else they are of different models."""
    return None if wanted == width else f"{name} is {wanted}, and {other} are {width} wide: they do not belong together"


def _plain_unet_refused(pipeline: Any) -> str | None:
    kind = pipeline.unet.config.addition_embed_type
    if kind is not None:
        return f"its UNet's addition_embed_type is {kind!r}, which a pipeline with one text encoder has not"
    return _unet_refused(pipeline)


def _pooled_unet_refused(pipeline: Any) -> str | None:
    if pipeline.config.get("requires_aesthetics_score"):
        return "it is a refiner, which starts from another model's latents"
    if pipeline.unet.config.addition_embed_type != "text_time":
        return f"its UNet's addition_embed_type is {pipeline.unet.config.addition_embed_type!r}, not 'text_time'"
    return _unet_refused(pipeline)


def _packed_refused(pipeline: Any) -> str | None:
    config = pipeline.transformer.config
    if config.in_channels != 4 * pipeline.vae.config.latent_channels:
        return f"its transformer takes {config.in_channels} channels: it wants an image beside the text"
    wide, pooled = pipeline.text_encoder_2.config.d_model, pipeline.text_encoder.config.hidden_size
    return _widths("its transformer's joint_attention_dim", config.joint_attention_dim, "T5's states", wide) or _widths(
        "its transformer's pooled_projection_dim", config.pooled_projection_dim, "CLIP's pooled states", pooled
    )


def _joint_refused(pipeline: Any) -> str | None:
    config, t5 = pipeline.transformer.config, pipeline.text_encoder_3
    if config.in_channels != pipeline.vae.config.latent_channels:
        return f"its transformer takes {config.in_channels} channels: it wants an image beside the text"
    pooled = sum(one.config.projection_dim for one in (pipeline.text_encoder, pipeline.text_encoder_2))
    wide = config.joint_attention_dim if t5 is None else t5.config.d_model
    return _widths("its transformer's joint_attention_dim", config.joint_attention_dim, "T5's states", wide) or _widths(
        "its transformer's pooled_projection_dim", config.pooled_projection_dim, "CLIP's pooled states", pooled
    )


# --- the table -----------------------------------------------------------------------------------------------------

FLUX_SIDE = 128  # latents; a Flux folder does not say
_VAE = {"vae_decoder": (("vae",), vae.decoder), "vae_encoder": (("vae",), vae.encoder)}
_TEXT = Text("tokenizer", "input_ids")
_TEXT_2 = Text("tokenizer_2", "input_ids_2")

STABLE_DIFFUSION = Family(
    networks={
        "text_encoder": (("text_encoder",), text_encoders.clip_text),
        "denoiser": (("unet",), denoisers.unet),
        **_VAE,
    },
    texts=(_TEXT,),
    sides=_unet_sides,
    guidance=_guidance_of_unet,
    refused=_plain_unet_refused,
    encoders={"text_encoder": _CLIP},
    denoiser="UNet2DConditionModel",
    defaults={"num_inference_steps": 50, "guidance_scale": 7.5, "strength": 0.8},
)
STABLE_DIFFUSION_XL = Family(
    networks={
        "text_encoder": (("text_encoder", "text_encoder_2"), text_encoders.clip_pair_text),
        "denoiser": (("unet",), denoisers.pooled_unet),
        **_VAE,
    },
    texts=(_TEXT, _TEXT_2),
    sides=_unet_sides,
    guidance=_guidance_of_unet,
    refused=_pooled_unet_refused,
    wide_vae=True,
    encoders={"text_encoder": _CLIP, "text_encoder_2": _PROJECTED},
    denoiser="UNet2DConditionModel",
    defaults={"num_inference_steps": 50, "guidance_scale": 5.0, "strength": 0.3},
)
STABLE_DIFFUSION_3 = Family(
    networks={
        "text_encoder": (("text_encoder", "text_encoder_2", "text_encoder_3"), text_encoders.clip_pair_t5_text),
        "denoiser": (("transformer",), denoisers.joint_transformer),
        **_VAE,
    },
    texts=(_TEXT, _TEXT_2, Text("tokenizer_3", "input_ids_3", lambda tokenizer: SD3_TOKENS)),
    sides=_joint_sides,
    guidance=lambda pipeline: "classifier_free",
    refused=_joint_refused,
    patch=2,
    strength_up=True,
    optional=("text_encoder_3", "tokenizer_3"),
    encoders={"text_encoder": _PROJECTED, "text_encoder_2": _PROJECTED, "text_encoder_3": _T5},
    denoiser="SD3Transformer2DModel",
    defaults={"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
)
FLUX = Family(
    networks={
        "text_encoder": (("text_encoder", "text_encoder_2"), text_encoders.pooled_t5_text),
        "denoiser": (("transformer",), denoisers.packed_transformer),
        "vae_decoder": _VAE["vae_decoder"],
    },
    texts=(_TEXT, Text("tokenizer_2", "input_ids_2", lambda tokenizer: FLUX_TOKENS)),
    sides=_packed_sides,
    guidance=lambda pipeline: "embedded" if pipeline.transformer.config.guidance_embeds else "none",
    refused=_packed_refused,
    patch=2,
    even_sigmas=True,
    encoders={"text_encoder": _CLIP, "text_encoder_2": _T5},
    denoiser="FluxTransformer2DModel",
    defaults={"num_inference_steps": 28, "guidance_scale": 3.5, "strength": 0.6},
)
LATENT_CONSISTENCY = Family(
    networks={
        "text_encoder": (("text_encoder",), text_encoders.clip_text),
        "denoiser": (("unet",), denoisers.unet),
        "vae_decoder": _VAE["vae_decoder"],
    },
    texts=(_TEXT,),
    sides=_unet_sides,
    guidance=_guidance_of_unet,
    refused=_plain_unet_refused,
    encoders={"text_encoder": _CLIP},
    denoiser="UNet2DConditionModel",
    defaults={"num_inference_steps": 4, "guidance_scale": 8.5, "strength": 0.8},
)

FAMILIES: Mapping[str, Family] = {
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionImg2ImgPipeline": STABLE_DIFFUSION,
    "StableDiffusionXLPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusionXLImg2ImgPipeline": STABLE_DIFFUSION_XL,
    "StableDiffusion3Pipeline": STABLE_DIFFUSION_3,
    "StableDiffusion3Img2ImgPipeline": STABLE_DIFFUSION_3,
    "FluxPipeline": FLUX,
    "LatentConsistencyModelPipeline": LATENT_CONSISTENCY,
}


def family_of(name: object, folder: object) -> Family:
    """The entry of a pipeline's class; ExportError with those that there are."""
    found = FAMILIES.get(str(name))
    if found is None:
        raise ExportError(f"{folder} holds a {name}; this version exports {', '.join(FAMILIES)}")
    return found
