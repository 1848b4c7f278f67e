"""Tiny folders, as in `tests.tiny`, of the families whose texts are read by a language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SEED = 0


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """Equal arguments, equal random weights: what families share is one network."""

    @functools.wraps(make)
    def made(*given: Any, **named: Any) -> Any:
        torch.manual_seed(SEED)
        return make(*given, **named)

    return made


# What Qwen's own templates do to one message of a user; the published ones also know tools and pictures.
QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
FLOW = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def qwen_tokenizer(**more: Any) -> Any:
    """A byte-level tokenizer without merges, with the special tokens of Qwen."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *letters])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=1 << 17, **more)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def qwen3_config(layers: int, width: int = 8) -> Any:
    """A narrow Qwen3."""
    return transformers.Qwen3Config(
        vocab_size=264, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
    )  # fmt: skip


def flux2_vae() -> Any:
    """A VAE that halves each side twice, with statistics of its own; `save_pretrained` keeps those."""
    made = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2.0)
    return made


def flux2_klein(layers: int = 4, *, is_distilled: bool = False) -> Any:
    """FLUX.2 klein; the published one has 36 layers, of which its pipeline takes the 27th."""
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **FLOW), vae=flux2_vae(),
        text_encoder=transformers.Qwen3ForCausalLM(qwen3_config(layers)), tokenizer=qwen_tokenizer(),
        transformer=transformer, is_distilled=is_distilled,
    )  # fmt: skip


MISTRAL_TEMPLATE = (  # as Mistral's own for texts alone
    "{{- bos_token }}{%- for message in messages %}{%- set text = message.content[0].text %}"
    "{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}{%- endif %}{%- endfor %}"
)


def mistral_tokenizer() -> Any:
    """A byte-level tokenizer with Mistral's special tokens, what a processor has inside; padding comes first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        "[INST]",
        "[/INST]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[IMG]",
        "[IMG_BREAK]",
        "[IMG_END]",
    ]
    model = models.BPE({token: number for number, token in enumerate([*special, *letters])}, [])
    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=MISTRAL_TEMPLATE, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=special[4:], padding_side="left",
        model_max_length=1 << 17,
    )  # fmt: skip


def flux2_dev() -> Any:
    """FLUX.2 dev: told the scale; its text encoder also sees images, and padding stands on the left."""
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(
            vocab_size=280, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, sliding_window=None, max_position_embeddings=2048,
        ),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32,
        ),
    )  # fmt: skip
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return diffusers.Flux2Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **FLOW), vae=flux2_vae(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config), tokenizer=mistral_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


def z_image() -> Any:
    """Z-Image; the published ones have two refiners of each kind."""
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 6, 6], axes_lens=[600, 32, 32],
    )  # fmt: skip
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=transformer,
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.Qwen3Model(qwen3_config(3)), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def qwen_image() -> Any:
    """Qwen-Image, whose VAE is for films and whose text encoder also sees images."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 264, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[-0.7, 0.4, 0.1, -0.2], latents_std=[2.8, 1.5, 2.3, 0.9],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, **FLOW), vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer=qwen_tokenizer(),
        transformer=transformer,
    )  # fmt: skip


@seeded
def tiny_vae(**more: Any) -> Any:
    """The VAE of `tests.tiny`, smaller."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, sample_size=64, **more,
    )  # fmt: skip


FAMILIES: Mapping[str, Callable[[], Any]] = {
    "flux2-dev": flux2_dev,
    "flux2-klein": flux2_klein,
    "flux2-klein-deep": lambda: flux2_klein(28),
    "flux2-klein-distilled": lambda: flux2_klein(is_distilled=True),
    "qwen-image": qwen_image,
    "z-image": z_image,
}
