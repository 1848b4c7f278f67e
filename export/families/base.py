"""What a family is: the form of an entry, and the words that several entries share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from export.networks import Exported, cached, vae
from export.networks.vae import vae_factor

Guidance = Literal["classifier_free", "in_graph", "embedded", "none"]
CLIP, PROJECTED, T5 = (
    ("CLIPTextModel", "CLIPTextModelWithProjection"),
    ("CLIPTextModelWithProjection",),
    ("T5EncoderModel",),
)
CLIP_TOKENIZERS, T5_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")
QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
CACHED_UNET = {"denoiser_deep": (("unet",), cached.deep), "denoiser_shallow": (("unet",), cached.shallow)}
VAE_NETWORKS = {"vae_decoder": (("vae",), vae.decoder), "vae_encoder": (("vae",), vae.encoder)}


@dataclass(frozen=True)
class Text:
    """A tokenizer of a pipeline, the network input that its ids go into, and how many ids that takes.

    kinds: the tokenizer's classes.
    template: what stands before and after a prompt, see `templates`; such texts get no special tokens beside.
    pad_left: whether padding comes first; that matters where the states of padding are used.
    """

    tokenizer: str
    input: str
    tokens: Callable[[Any], int] = lambda tokenizer: int(tokenizer.model_max_length)
    kinds: tuple[str, ...] = CLIP_TOKENIZERS
    template: Callable[[Any], tuple[str, str]] | None = None
    pad_left: Callable[[Any], bool] = lambda tokenizer: False


@dataclass(frozen=True)
class Sides:
    """Images in pixels: each side a multiple of `multiple` between `least` and `most`; `default` is square."""

    default: int
    least: int
    most: int
    multiple: int


@dataclass(frozen=True)
class Latents:
    """What the denoiser works on: channels, and how many pixels one of them is wide."""

    channels: int
    factor: int


def vae_latents(pipeline: Any) -> Latents:
    """What the VAE makes, as it is."""
    return Latents(pipeline.vae.config.latent_channels, vae_factor(pipeline))


@dataclass(frozen=True)
class Family:
    """An entry. Its functions take a `loading.Components`, where what is not loaded still has its config.

    sides: the sides of images; with `full=True` all that the networks can do, else what is exported by default.
    networks: by name, the pipeline's components that it is made of, and what makes it of them.
    cached: the same for the parts of a denoiser that feature caching needs. uncacheable: why they cannot be made.
    guidance: whether two branches are combined by the runtime or, where that is not linear, by the denoiser itself; or
    the denoiser is told the scale; or there is none.
    guidance_offset: what is added to the scale: 1 where the pipeline calculates c + g·(c − u).
    patch: latents per side of a token, where the schedule depends on the number of tokens.
    even_sigmas: the pipeline itself, not its scheduler, spaces the noise levels evenly from 1 down to 1/N.
    scheduler: what the pipeline, not the scheduler's config, says of the schedule.
    strength_up: the number of steps that a strength stands for is rounded up, as diffusers does in this family.
    wide_vae: a VAE whose config says `force_upcast` is not run in fp16, as diffusers does in this family.
    optional: components that a folder may lack, beside those that no family uses.
    encoders, denoiser, vaes: the classes that the networks are made for, by component; see `classes`.
    """

    networks: Mapping[str, tuple[tuple[str, ...], Callable[[Any], Exported]]]
    texts: tuple[Text, ...]
    sides: Callable[..., Sides]
    guidance: Callable[[Any], Guidance]
    defaults: Mapping[str, float]
    encoders: Mapping[str, tuple[str, ...]]
    denoiser: str
    vaes: tuple[str, ...] = ("AutoencoderKL", "AutoencoderTiny")
    cached: Mapping[str, tuple[tuple[str, ...], Callable[[Any], Exported]]] = field(default_factory=dict)
    uncacheable: Callable[[Any], str | None] = lambda pipeline: "its denoiser is no UNet"
    refused: Callable[[Any], str | None] = lambda pipeline: None
    latents: Callable[[Any], Latents] = vae_latents
    guidance_offset: float = 0.0
    patch: int | None = None
    even_sigmas: bool = False
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    strength_up: bool = False
    wide_vae: bool = False
    optional: tuple[str, ...] = ()

    def classes(self, component: str) -> tuple[str, ...]:
        """The classes that a component can be of; empty where that is asked elsewhere (schedulers)."""
        if component in ("unet", "transformer"):
            return (self.denoiser,)
        for text in self.texts:
            if component == text.tokenizer:
                return text.kinds
        return self.vaes if component == "vae" else self.encoders.get(component, ())


def sides_around(default: int, multiple: int, full: bool, most: int | None = None) -> Sides:
    """Half to double the default side; with `full`, everything that the networks can do."""
    default = min(default, most or default)
    least, largest = (multiple, most or 16 * default) if full else (default // 2, min(2 * default, most or 2 * default))

    def whole(side: int) -> int:
        return max(multiple, side // multiple * multiple)

    return Sides(whole(default), whole(least), whole(largest), multiple)


def widths(name: str, wanted: object, other: str, width: object) -> str | None:
    """What the text encoders make has the width that the denoiser takes; else they are of different models."""
    return None if wanted == width else f"{name} is {wanted}, and {other} are {width} wide: they do not belong together"


def channels(pipeline: Any, times: int = 1) -> str | None:
    """The transformer takes the latents alone, `times` as many channels as the VAE's where it takes squares of them."""
    wanted = pipeline.transformer.config.in_channels
    if wanted == times * pipeline.vae.config.latent_channels:
        return None
    return f"its transformer takes {wanted} channels: it wants an image beside the text"
