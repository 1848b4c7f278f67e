"""Language models as text encoders: ids, padded to a fixed length, to the states of some layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from engines.errors import ExportError
from export.networks import Axis, Exported, Input


def real(input_ids: Tensor, pad: int, *, left: bool = False) -> Tensor:
    """(batch, tokens), true but for padding: the run of `pad` at the end, or, with `left`, at the beginning.

    So a prompt may hold the pad token itself, as the mask of a tokenizer allows it.
    """
    places = torch.arange(input_ids.shape[1])
    word = input_ids != pad
    if left:
        return places >= torch.where(word, places, input_ids.shape[1]).amin(1, keepdim=True)
    return places <= torch.where(word, places, -1).amax(1, keepdim=True)


def causal(mask: Tensor) -> Tensor:
    """(batch, tokens), true for real ones → (batch, 1, tokens, tokens), what each of them sees: real ones before it."""
    places = torch.arange(mask.shape[1])
    return (places[None, :] <= places[:, None])[None, None] & mask[:, None, None, :]


def _attend(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """As transformers' attention functions. What sees nothing, padding before a text, gets zeros, as torch has it.

    ONNX leaves that open, and its runtimes take the mean of all values.
    """
    groups = layer.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    seen = torch.where(attention_mask.any(-1, keepdim=True), found, 0.0)
    return seen.transpose(1, 2).contiguous(), None


_ATTENTION = "sees nothing, gets zeros"
AttentionInterface.register(_ATTENTION, _attend)


def ragged(words: int, pad: int, *, left: bool = False) -> Callable[[tuple[int, ...]], Tensor]:
    """Random ids of texts of any length, padded to the same one."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        length = torch.randint(1, shape[1] + 1, (shape[0], 1))
        places = torch.arange(shape[1])
        inside = places >= shape[1] - length if left else places < length
        drawn = torch.randint(words - 1, shape)
        return torch.where(inside, drawn + (drawn >= pad), pad)

    return draw


class LanguageModel(nn.Module):
    """Ids → the hidden states of `layers` side by side (batch, tokens, layers · width), counted as transformers does.

    `padding` "keep" leaves the states of padding as they are; "zero" makes them zeros, which `real_rows` finds again.
    The first `drop` states, those of a template, are left out.
    """

    def __init__(
        self, model: Any, layers: tuple[int, ...], pad: int, *, left: bool = False, zero: bool = False, drop: int = 0
    ) -> None:
        super().__init__()
        self.model, self.layers, self.pad, self.left, self.zero, self.drop = model, layers, pad, left, zero, drop

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        mask = real(input_ids, self.pad, left=self.left)
        sees: Any = causal(mask)
        if hasattr(self.model.config, "layer_types"):
            sees = dict.fromkeys(set(self.model.config.layer_types), sees)
        found = self.model(
            input_ids=input_ids, attention_mask=sees, use_cache=False, output_hidden_states=True
        ).hidden_states
        states = torch.cat([found[layer] for layer in self.layers], -1)
        if self.zero:
            states = states * mask[..., None]
        result: Tensor = states[:, self.drop :]
        return result


def real_rows(states: Tensor) -> Tensor:
    """(batch, tokens, width) → (batch, tokens), false where all of a state is 0, as padding is."""
    return (states != 0).any(-1)


def encoder(
    model: Any, tokenizer: Any, tokens: int, layers: tuple[int, ...], *, left: bool = False, zero: bool = False,
    drop: int = 0,
) -> Exported:  # fmt: skip
    """A `LanguageModel` as a network of a bundle; its output is the denoiser's `encoder_hidden_states`."""
    config, pad = model.config, tokenizer.pad_token_id
    if left:
        config._attn_implementation = _ATTENTION
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in getattr(config, "layer_types", ["sliding_attention"])
    if slides and window is not None and window < tokens:
        raise ExportError(f"the text encoder sees {window} tokens at a time (sliding_window), fewer than its {tokens}")
    ids = Input("input_ids", ("batch", tokens), ragged(config.vocab_size, pad, left=left))
    states: tuple[Axis, ...] = ("batch", tokens - drop, len(layers) * config.hidden_size)
    module = LanguageModel(model, layers, pad, left=left, zero=zero, drop=drop)
    return Exported(module, (ids,), {"encoder_hidden_states": states})
