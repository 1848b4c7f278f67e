"""Qwen-Image: two streams of image and text tokens, whose guidance keeps the length of every token's velocity.

That is not linear in the two branches, so the denoiser makes both of them itself and combines them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.families.base import QWEN_TOKENIZERS, Family, Latents, Sides, Text, sides_around, widths
from export.families.templates import frame
from export.networks import Exported, Input, language_models, normal, rotary
from export.networks.denoisers import denoiser
from export.networks.language_models import real_rows
from export.networks.rotary import Angles

SIDE = 1024  # pixels; a folder does not say
TOKENS = 512  # the default `max_sequence_length` of the pipeline
POSITIONS = 4096  # of an axis, the length of diffusers' table
TEMPLATE = (  # `prompt_template_encode` of the pipeline
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34  # states of the template's beginning, `prompt_template_encode_start_idx`


class _Attention:
    """Diffusers' `QwenDoubleStreamAttnProcessor2_0` with real numbers: text before image in one attention."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[Angles, Angles], **_: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        image, text = (
            [rotary.split_heads(attn, make(states)) for make in makes]
            for states, makes in (
                (hidden_states, (attn.to_q, attn.to_k, attn.to_v)),
                (encoder_hidden_states, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            )
        )
        for heads, norms, angles in (
            (image, (attn.norm_q, attn.norm_k), image_rotary_emb[0]),
            (text, (attn.norm_added_q, attn.norm_added_k), image_rotary_emb[1]),
        ):
            for number, norm in enumerate(norms):
                heads[number] = rotary.rotate(norm(heads[number]), angles)
        both = [torch.cat(pair, 1) for pair in zip(text, image, strict=True)]
        sees = nn.functional.pad(encoder_hidden_states_mask, (0, hidden_states.shape[1]), value=True)
        query, key, value = both
        found = rotary.attend(query, key, value, sees[:, None, None])
        words = encoder_hidden_states.shape[1]
        return attn.to_out[0](found[:, words:]), attn.to_add_out(found[:, :words])


class QwenImage(nn.Module):
    """Latents, a timestep per row, the states of both branches and the scale → a velocity of the latents' shape.

    States behind the end of a text are zeros.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.model: Any = transformer
        for block in transformer.transformer_blocks:
            block.attn.set_processor(_Attention())
        self.tables = [rotary.table(POSITIONS, dim, 10_000.0) for dim in transformer.config.axes_dims_rope]

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, negative_encoder_hidden_states: Tensor,
        guidance: Tensor,
    ) -> Tensor:  # fmt: skip
        """Both branches as one batch, then c' = u + g·(c − u) with the norm of c for every token."""
        batch, channels, height, width = sample.shape
        rows, columns = height // 2, width // 2
        squares = sample.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        tokens = squares.reshape(batch, rows * columns, channels * 4)
        texts = torch.cat([encoder_hidden_states, negative_encoder_hidden_states])
        both = torch.cat([tokens, tokens]), torch.cat([timestep, timestep])
        found = self._velocity(*both, texts, rows, columns).float()
        positive, negative = found[:batch], found[batch:]
        mixed = negative + guidance.float()[:, None, None] * (positive - negative)
        mixed = mixed * (positive.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))
        squares = mixed.to(sample.dtype).view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        result: Tensor = squares.reshape(batch, channels, height, width)
        return result

    def _velocity(self, image: Tensor, timestep: Tensor, states: Tensor, rows: int, columns: int) -> Tensor:
        """`QwenImageTransformer2DModel.forward`, but times are embedded as they came, in float32."""
        model, there = self.model, real_rows(states)
        image, text = model.img_in(image), model.txt_in(model.txt_norm(states))
        told = model.time_text_embed(timestep / 1000, image)
        angles = self._of_image(rows, columns), self._of_text(rows, columns, text.shape[1])
        for block in model.transformer_blocks:
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, encoder_hidden_states_mask=there, temb=told,
                image_rotary_emb=angles,
            )  # fmt: skip
        output: Tensor = model.proj_out(model.norm_out(image, told))
        return output

    def _angles(self, *places: Tensor) -> Angles:
        """Of positions (tokens) on three axes; the sine of a negative one is that of its opposite, negated."""
        cosines = [cos[place.abs()] for (cos, _), place in zip(self.tables, places, strict=True)]
        sines = [sin[place.abs()] * place.sign()[:, None] for (_, sin), place in zip(self.tables, places, strict=True)]
        return torch.cat(cosines, -1)[None], torch.cat(sines, -1)[None]

    def _of_image(self, rows: int, columns: int) -> Angles:
        """Rows and columns count from the middle."""
        row = (torch.arange(rows) - (rows - rows // 2))[:, None].expand(rows, columns).reshape(-1)
        column = (torch.arange(columns) - (columns - columns // 2))[None].expand(rows, columns).reshape(-1)
        return self._angles(torch.zeros_like(row), row, column)

    def _of_text(self, rows: int, columns: int, words: int) -> Angles:
        """Behind the image, on all three axes."""
        place = torch.arange(words) + torch.maximum(torch.arange(rows // 2 + 1)[-1], torch.arange(columns // 2 + 1)[-1])
        return self._angles(place, place, place)


def _latents(pipeline: Any) -> Latents:
    config = pipeline.vae.config
    return Latents(config.z_dim, 2 ** len(config.temperal_downsample))


def _denoiser(pipeline: Any) -> Exported:
    transformer, config = pipeline.transformer, pipeline.transformer.config
    states = (TOKENS, config.joint_attention_dim)
    return denoiser(
        QwenImage(transformer), config.in_channels // 4, transformer.dtype, encoder_hidden_states=states,
        negative_encoder_hidden_states=states, guidance=(),
    )  # fmt: skip


class Decoder(nn.Module):
    """Latents as the denoiser leaves them → pixels in [−1, 1], by a VAE for films of one picture."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.mean, self.std = (
            torch.tensor(one).view(1, -1, 1, 1) for one in (vae.config.latents_mean, vae.config.latents_std)
        )

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The first picture needs none of the states that others would find in `feat_cache`."""
        latents = latent_sample * self.std.to(latent_sample) + self.mean.to(latent_sample)
        output: Tensor = self.vae.decoder(self.vae.post_quant_conv(latents[:, :, None]))
        pixels: Tensor = output[:, :, 0].clamp(-1, 1)
        return pixels


def _decoder(pipeline: Any) -> Exported:
    vae, latents = pipeline.vae, _latents(pipeline)
    sample = Input("latent_sample", ("batch", latents.channels, "height", "width"), normal(vae.dtype))
    pixels = ("batch", vae.config.input_channels, f"{latents.factor}*height", f"{latents.factor}*width")
    return Exported(Decoder(vae), (sample,), {"sample": pixels})


def _text(pipeline: Any) -> Exported:
    model = pipeline.text_encoder.model.language_model
    return language_models.encoder(model, pipeline.tokenizer, DROPPED + TOKENS, (-1,), zero=True, drop=DROPPED)


def _sides(pipeline: Any, full: bool = False) -> Sides:
    token = 2 * _latents(pipeline).factor
    return sides_around(SIDE, token, full, (POSITIONS - TOKENS) * token)


def _refused(pipeline: Any) -> str | None:
    config, latents = pipeline.transformer.config, _latents(pipeline).channels
    if config.in_channels != 4 * latents:
        return f"its transformer takes {config.in_channels} channels, and its VAE makes 4 times {latents} per square"
    for field in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        if getattr(config, field):
            return f"its transformer says {field}, which is for editing or layers"
    wide = pipeline.text_encoder.config.get_text_config().hidden_size
    return widths(
        "its transformer's joint_attention_dim", config.joint_attention_dim, "its text encoder's states", wide
    )


QWEN_IMAGE = Family(
    networks={
        "text_encoder": (("text_encoder",), _text),
        "denoiser": (("transformer",), _denoiser),
        "vae_decoder": (("vae",), _decoder),
    },
    texts=(
        Text(
            "tokenizer", "input_ids", lambda tokenizer: DROPPED + TOKENS, QWEN_TOKENIZERS,
            template=lambda tokenizer: frame(TEMPLATE.format, "the pipeline's template"),
        ),
    ),
    sides=_sides,
    guidance=lambda pipeline: "in_graph",
    refused=_refused,
    latents=_latents,
    patch=2,
    even_sigmas=True,
    encoders={"text_encoder": ("Qwen2_5_VLForConditionalGeneration",)},
    denoiser="QwenImageTransformer2DModel",
    vaes=("AutoencoderKLQwenImage",),
    defaults={"num_inference_steps": 50, "guidance_scale": 4.0, "strength": 0.6},
)  # fmt: skip
