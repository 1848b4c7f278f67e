"""The text encoders of every family: token ids to the denoiser's inputs by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from export.networks import Exported, Input, ids

SD3_TOKENS = 256  # that T5 reads: diffusers' default `max_sequence_length` of each pipeline
FLUX_TOKENS = 512


def _layer(states: Sequence[Tensor], clip_skip: Tensor, last: int) -> Tensor:
    """Of the hidden states of every layer, for each row the one that is `clip_skip` before the `last` from the end."""
    stacked = torch.stack(tuple(states), 1)
    index = (len(states) - last) - clip_skip
    return stacked.gather(1, index.view(-1, 1, 1, 1).expand(-1, 1, *stacked.shape[2:])).squeeze(1)


class ClipText(nn.Module):
    """Token ids (batch, tokens) → the normalized states of a layer, as Stable Diffusion 1 and 2 use them."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.model = pipeline.text_encoder

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        """`clip_skip` 0 is the last layer."""
        states = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        normalize = getattr(self.model, "text_model", self.model).final_layer_norm
        result: Tensor = normalize(_layer(states, clip_skip, 1))
        return result


class ClipPairText(nn.Module):
    """Two CLIP encoders side by side, with the second one's pooled embedding: Stable Diffusion XL."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.first, self.second = pipeline.text_encoder, pipeline.text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor, clip_skip: Tensor) -> tuple[Tensor, Tensor]:
        """States of the layer before the last, unnormalized; `clip_skip` counts from there."""
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        states = [_layer(one.hidden_states, clip_skip, 2) for one in (first, second)]
        return torch.cat(states, -1), second.text_embeds


class ClipPairT5Text(nn.Module):
    """Two CLIP encoders side by side, padded to T5's width, then T5's states, or zeros without T5: SD 3."""

    def __init__(self, pipeline: Any, width: int) -> None:
        super().__init__()
        self.first, self.second, self.third = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
        self.width = width

    def forward(
        self, input_ids: Tensor, input_ids_2: Tensor, clip_skip: Tensor, input_ids_3: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """T5's ids come last, where there is a T5."""
        first = self.first(input_ids, output_hidden_states=True)
        second = self.second(input_ids_2, output_hidden_states=True)
        states = torch.cat([_layer(one.hidden_states, clip_skip, 2) for one in (first, second)], -1)
        states = nn.functional.pad(states, (0, self.width - states.shape[-1]))
        if self.third is None:
            long = states.new_zeros((states.shape[0], SD3_TOKENS, self.width))
        else:
            long = self.third(input_ids_3)[0].to(states.dtype)
        return torch.cat([states, long], 1), torch.cat([first.text_embeds, second.text_embeds], -1)


class PooledT5Text(nn.Module):
    """CLIP's pooled state and T5's states: Flux."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.first, self.second = pipeline.text_encoder, pipeline.text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Unmasked, as in diffusers."""
        return self.second(input_ids_2)[0], self.first(input_ids).pooler_output


def _clip_inputs(tokens: int, *models: Any, skip: bool = True) -> tuple[Input, ...]:
    """Ids per encoder, then `clip_skip`."""
    names = ("input_ids", "input_ids_2")
    found = [
        Input(name, ("batch", tokens), ids(model.config.vocab_size)) for name, model in zip(names, models, strict=False)
    ]
    if skip:
        found.append(Input("clip_skip", ("batch",), ids(min(model.config.num_hidden_layers for model in models))))
    return tuple(found)


def clip_text(pipeline: Any) -> Exported:
    """Stable Diffusion 1 and 2, latent consistency."""
    encoder, tokens = pipeline.text_encoder, pipeline.tokenizer.model_max_length
    states = ("batch", tokens, encoder.config.hidden_size)
    return Exported(ClipText(pipeline), _clip_inputs(tokens, encoder), {"encoder_hidden_states": states})


def clip_pair_text(pipeline: Any) -> Exported:
    """Stable Diffusion XL."""
    first, second, tokens = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer.model_max_length
    outputs = {
        "encoder_hidden_states": ("batch", tokens, first.config.hidden_size + second.config.hidden_size),
        "text_embeds": ("batch", second.config.projection_dim),
    }
    return Exported(ClipPairText(pipeline), _clip_inputs(tokens, first, second), outputs)


def clip_pair_t5_text(pipeline: Any) -> Exported:
    """Stable Diffusion 3."""
    first, second, third = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    config, tokens = pipeline.transformer.config, pipeline.tokenizer.model_max_length
    outputs = {
        "encoder_hidden_states": ("batch", tokens + SD3_TOKENS, config.joint_attention_dim),
        "pooled_projections": ("batch", config.pooled_projection_dim),
    }
    inputs = _clip_inputs(tokens, first, second)
    if third is not None:
        inputs = (*inputs, Input("input_ids_3", ("batch", SD3_TOKENS), ids(third.config.vocab_size)))
    return Exported(ClipPairT5Text(pipeline, config.joint_attention_dim), inputs, outputs)


def pooled_t5_text(pipeline: Any) -> Exported:
    """Flux."""
    first, second, tokens = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer.model_max_length
    outputs = {
        "encoder_hidden_states": ("batch", FLUX_TOKENS, second.config.d_model),
        "pooled_projections": ("batch", first.config.hidden_size),
    }
    long = Input("input_ids_2", ("batch", FLUX_TOKENS), ids(second.config.vocab_size))
    inputs = (*_clip_inputs(tokens, first, skip=False), long)
    return Exported(PooledT5Text(pipeline), inputs, outputs)
