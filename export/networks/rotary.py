"""Attention whose heads are rotated by real cosines and sines, in place of diffusers' complex numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]


def table(length: int, dim: int, theta: float) -> Angles:
    """Cosines and sines (length, dim / 2) of whole positions, calculated in float64 (Su et al. 2021)."""
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, angles: Angles) -> Tensor:
    """(batch, tokens, heads, width), neighbours as pairs, by angles (batch or 1, tokens, width / 2); in float32."""
    cos, sin = (one[:, :, None] for one in angles)
    pairs = heads.float().reshape(*heads.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.flatten(-2).to(heads.dtype)


def split_heads(attention: Any, hidden: Tensor) -> Tensor:
    """(batch, tokens, heads · width) → (batch, tokens, heads, width)."""
    return hidden.reshape(*hidden.shape[:-1], attention.heads, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over (batch, tokens, heads, width); the result has its heads side by side."""
    found = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return found.transpose(1, 2).flatten(2)
