"""Diffusers folders of every family at tiny size with random weights, saved by diffusers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from export.spec import EMBEDDED
from tests import tiny_transformers
from tests.tiny_transformers import SEED, seeded

WORDS = (
    "a",
    "large",
    "small",
    "red",
    "blue",
    "green",
    "star",
    "ring",
    "on",
    "the",
    "left",
    "right",
    "of",
    "background",
)
TOKENS = 16  # of the CLIP encoders


def clip_tokenizer() -> Any:
    """The embedded model's tokenizer: a CLIP tokenizer with few words."""
    folder = EMBEDDED["shapes"] / "tokenizer"
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    """A T5 tokenizer with few words."""
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -9.0),
        *((f"▁{word}", -2.0 - n) for n, word in enumerate(WORDS)),
    ]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=32)


@seeded
def clip(
    width: int, projection: int | None = None, hidden_act: str = "quick_gelu", eos: int = 605, layers: int = 3
) -> Any:
    """A CLIP text encoder of three layers."""
    config = transformers.CLIPTextConfig(
        vocab_size=606, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=TOKENS, projection_dim=projection or width, hidden_act=hidden_act,
        bos_token_id=604, eos_token_id=eos, pad_token_id=605,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


@seeded
def t5(width: int) -> Any:
    """A T5 encoder of two layers."""
    config = transformers.T5Config(
        vocab_size=3 + len(WORDS), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


@seeded
def vae(channels: int = 4, **more: Any) -> Any:
    """A VAE that halves each side twice."""
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=channels, norm_num_groups=8, sample_size=64, **more,
    )  # fmt: skip


@seeded
def tiny_vae() -> Any:
    """An `AutoencoderTiny` (TAESD) that halves each side twice."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16), decoder_block_out_channels=(16, 16, 16), num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )  # fmt: skip


@seeded
def unet(cross_attention_dim: int, **more: Any) -> Any:
    """A UNet of two levels."""
    settings: dict[str, Any] = {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 16,
        "attention_head_dim": 2, "cross_attention_dim": cross_attention_dim,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**settings | more)


STABLE_DIFFUSION = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip


def stable_diffusion(**more: Any) -> Any:
    """Stable Diffusion 1.x, whose folders name PNDM."""
    parts: dict[str, Any] = {
        "vae": vae(), "text_encoder": clip(16), "tokenizer": clip_tokenizer(), "unet": unet(16),
        "scheduler": diffusers.PNDMScheduler(**STABLE_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    return diffusers.StableDiffusionPipeline(**parts | more)


def least() -> Any:
    """A Stable Diffusion of few layers, for tests of exports that any model would do for."""
    network = unet(
        16, block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )  # fmt: skip
    return stable_diffusion(unet=network, text_encoder=clip(16, layers=1), vae=tiny_vae())


def stable_diffusion_2() -> Any:
    """Stable Diffusion 2.1: v prediction, linear projections, another activation, padding with id 0."""
    tokenizer = clip_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION, prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False
    )
    network = unet(16, use_linear_projection=True, attention_head_dim=(2, 4), upcast_attention=True)
    return stable_diffusion(
        unet=network, text_encoder=clip(16, hidden_act="gelu"), tokenizer=tokenizer, scheduler=scheduler
    )


def stable_diffusion_xl(**more: Any) -> Any:
    """Two encoders, pooled embeddings, time ids, zeros for no negative prompt, a VAE that must not run in fp16.

    With `time_cond_proj_dim` the UNet is told the guidance scale, as LCM-SDXL is.
    """
    network = unet(
        16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=6 * 8 + 24, transformer_layers_per_block=(1, 2), **more,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="leading")
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(force_upcast=True, scaling_factor=0.13025), text_encoder=clip(16), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(24, projection=24, hidden_act="gelu"), tokenizer_2=clip_tokenizer(), unet=network,
        scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(*, with_t5: bool = True) -> Any:
    """Flow matching, three encoders of which T5 may be absent."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=16 + 24, out_channels=4,
        pos_embed_max_size=24,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(16, projection=16), tokenizer=clip_tokenizer(),
        text_encoder_2=clip(24, projection=24, hidden_act="gelu"), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(48) if with_t5 else None, tokenizer_3=t5_tokenizer() if with_t5 else None,
    )  # fmt: skip


def flux(*, guidance_embeds: bool = True) -> Any:
    """A transformer over packed latents that is told the guidance scale; schnell is the one that is not."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds, base_shift=0.5, max_shift=1.15
    )
    return diffusers.FluxPipeline(
        scheduler=scheduler, transformer=transformer, text_encoder=clip(16), tokenizer=clip_tokenizer(),
        vae=vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder_2=t5(32), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def latent_consistency() -> Any:
    """Distilled: few steps, told the guidance scale as an embedding."""
    return diffusers.LatentConsistencyModelPipeline(
        vae=vae(), text_encoder=clip(16), tokenizer=clip_tokenizer(), unet=unet(16, time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(**STABLE_DIFFUSION), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "sd1": stable_diffusion,
    "least": least,
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "sd3-no-t5": lambda: stable_diffusion_3(with_t5=False),
    "flux": flux,
    "flux-schnell": lambda: flux(guidance_embeds=False),
    "lcm": latent_consistency,
    "lcm-sdxl": lambda: stable_diffusion_xl(time_cond_proj_dim=32),
    "sd1-tiny-vae": lambda: stable_diffusion(
        vae=tiny_vae(), scheduler=diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION)
    ),
}


def save(name: str, folder: Path) -> Any:
    """Saves a family with random weights, the same each time, to `folder/name`; as diffusers loads it again."""
    torch.manual_seed(SEED)
    pipeline = (FAMILIES.get(name) or tiny_transformers.FAMILIES[name])()
    pipeline.save_pretrained(folder / name)
    absent = {part: None for part, component in pipeline.components.items() if component is None}
    loaded = type(pipeline).from_pretrained(folder / name, **absent)
    if name == "flux2-dev":  # its tokenizer comes in a processor, which diffusers cannot load without torchvision
        index = folder / name / "model_index.json"
        index.write_text(index.read_text().replace('"TokenizersBackend"', '"PixtralProcessor"'))
    return loaded


def lora_file(folder: Path, target: Path, seed: int, *, text: bool = False) -> Path:
    """A LoRA of random weights for the attention of a folder's denoiser, saved by diffusers."""
    import diffusers
    import torch
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(seed)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    layers = {}
    for part in ("unet", "transformer", *(["text_encoder"] if text else [])):
        module = getattr(pipeline, part, None)
        if module is not None:
            targets = ["q_proj", "v_proj"] if part == "text_encoder" else ["to_q", "to_v"]
            module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
    pipeline.save_lora_weights(target.parent, weight_name=target.name, **layers)
    return target


def weights(folder: Path, *loras: tuple[Path, float], part: str = "unet") -> dict[str, np.ndarray]:
    """A component's weights as they would be exported."""
    from export.loading import load, open_source
    from export.lora import Lora

    source = open_source(folder, [Lora(file, scale) for file, scale in loras])
    module = getattr(load(source, [part], "fp32"), part)
    return {name: value.numpy() for name, value in module.state_dict().items()}
