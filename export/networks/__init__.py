"""The torch modules behind the networks of every family, with their inputs: what is exported to ONNX.

Everything that is special to one family happens in these graphs: how several text encoders make one conditioning, how
latents are packed, positions, scaling before the VAE. So every text encoder here maps token ids to the denoiser's
inputs by name, and every denoiser maps latents to an output of their shape.

Axes of tensors are named: `batch`; `height` and `width` of the latents; `8*height` for what is so many times larger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Axis = int | str


@dataclass(frozen=True)
class Input:
    """One input of a network: its axes, and random values for it. `values` takes a shape, with numbers for names."""

    name: str
    axes: tuple[Axis, ...]
    values: Callable[[tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Exported:
    """A network to export. Its module takes the inputs in order; with several outputs it returns a tuple."""

    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: Mapping[str, tuple[Axis, ...]]


# --- random inputs -------------------------------------------------------------------------------------------------


def ids(words: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Token ids below `words`."""
    return lambda shape: torch.randint(words, shape)


def normal(dtype: torch.dtype) -> Callable[[tuple[int, ...]], Tensor]:
    """Latents and embeddings."""
    return lambda shape: torch.randn(shape).to(dtype)


def uniform(dtype: torch.dtype, low: float, high: float) -> Callable[[tuple[int, ...]], Tensor]:
    """Pixels, scales and sizes."""
    return lambda shape: (low + (high - low) * torch.rand(shape)).to(dtype)


def timesteps(shape: tuple[int, ...]) -> Tensor:
    """Whole timesteps, as float32."""
    return torch.randint(1000, shape).float()
