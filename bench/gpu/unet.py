"""The UNet of Stable Diffusion in plain PyTorch, with diffusers' names of weights, for machines without diffusers.

Only what `shapes` and Stable Diffusion 1.5 have: residual blocks, attention over the words, one transformer block per
layer (Rombach et al. 2022; Ho et al. 2020).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

SHAPES = Path(__file__).resolve().parents[2] / "export" / "shapes" / "model" / "unet"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_TYPES = {"F16": "<f2", "F32": "<f4"}


@dataclass(frozen=True)
class Config:
    """The fields of diffusers' config that this network has; `heads` is its `attention_head_dim`: it counts heads."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...]  # per resolution, from the top
    layers: int
    heads: int
    words: int
    groups: int = 32

    @classmethod
    def of_shapes(cls) -> Config:
        """The embedded model's."""
        config = json.loads((SHAPES / "config.json").read_text())
        attention = tuple(name.startswith("CrossAttn") for name in config["down_block_types"])
        return cls(
            tuple(config["block_out_channels"]), attention, config["layers_per_block"], config["attention_head_dim"],
            config["cross_attention_dim"], config["norm_num_groups"],
        )  # fmt: skip


STABLE_DIFFUSION_15 = Config((320, 640, 1280, 1280), (True, True, True, False), 2, 8, 768)


class ResBlock(nn.Module):
    """Two convolutions with the time between them."""

    def __init__(self, inputs: int, outputs: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(groups, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(batch, channels, height, width) and (batch, time)."""
        y = self.conv1(functional.silu(self.norm1(x)))
        y = y + self.time_emb_proj(functional.silu(time))[:, :, None, None]
        y = self.conv2(functional.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Over the pixels themselves, or over words."""

    def __init__(self, width: int, words: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(words, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """(batch, pixels, width) and (batch, words, width of words)."""
        q, k, v = (
            one.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for one in (self.to_q(x), self.to_k(words), self.to_v(words))
        )
        return self.to_out[0](functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Gate(nn.Module):
    """GEGLU (Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, pixels, width) → four times as wide."""
        hidden, gate = self.proj(x).chunk(2, dim=-1)
        return hidden * functional.gelu(gate)


class FeedForward(nn.Module):
    """Behind the attentions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gate(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        return self.net[2](self.net[0](x))


class Block(nn.Module):
    """Attention over pixels, over words, and a feed-forward network."""

    def __init__(self, width: int, words: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, width, heads), Attention(width, words, heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """(batch, pixels, width)."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), words)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """One block over the pixels of a feature map."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([Block(width, config.words, config.heads)])

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """(batch, width, height, width of the map)."""
        y = self.proj_in(self.norm(x))
        pixels = self.transformer_blocks[0](y.flatten(2).transpose(1, 2), words)
        return x + self.proj_out(pixels.transpose(1, 2).reshape(y.shape))


class Resample(nn.Module):
    """Half or twice the size."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, height, width of the map)."""
        return self.conv(x if self.down else functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Module):
    """The layers of one resolution; `resnets` are (inputs, outputs)."""

    resnets: Any
    attentions: Any
    downsamplers: Any
    upsamplers: Any

    def __init__(self, resnets: Sequence[tuple[int, int]], config: Config, *, attention: bool) -> None:
        super().__init__()
        time = 4 * config.channels[0]
        self.resnets = nn.ModuleList([ResBlock(a, b, time, config.groups) for a, b in resnets])
        if attention:
            self.attentions = nn.ModuleList([Transformer(b, config) for _, b in resnets])

    def layer(self, n: int, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """One residual block and what follows it."""
        x = self.resnets[n](x, time)
        return self.attentions[n](x, words) if hasattr(self, "attentions") else x


class Middle(Stage):
    """At the lowest resolution: one transformer between two residual blocks."""

    def __init__(self, width: int, config: Config) -> None:
        super().__init__([(width, width), (width, width)], config, attention=False)
        self.attentions = nn.ModuleList([Transformer(width, config)])

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """Keeps the shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), words), time)


class TimeEmbedding(nn.Module):
    """From sines and cosines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, timestep: Tensor) -> Tensor:
        """(batch,) → (batch, 4 · width)."""
        half = self.width // 2
        powers = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(10000) / half)
        angles = timestep.float()[:, None] * powers.exp()
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.linear_1.weight.dtype)
        return self.linear_2(functional.silu(self.linear_1(waves)))


class UNet(nn.Module):
    """ε of (batch, 4, height, width) at (batch,) timesteps under (batch, words, width of words)."""

    down_blocks: Any
    up_blocks: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, levels = config.channels, len(config.channels)
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(channels[0])
        skips, width = [channels[0]], channels[0]
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, (own, attention) in enumerate(zip(channels, config.attention, strict=True)):
            stage = Stage([(width if n == 0 else own, own) for n in range(config.layers)], config, attention=attention)
            skips += [own] * config.layers
            if level < levels - 1:
                stage.downsamplers = nn.ModuleList([Resample(own, down=True)])
                skips.append(own)
            self.down_blocks.append(stage)
            width = own
        self.mid_block = Middle(width, config)
        for level in reversed(range(levels)):
            own, pairs = channels[level], []
            for _ in range(config.layers + 1):
                pairs.append((width + skips.pop(), own))
                width = own
            stage = Stage(pairs, config, attention=config.attention[level])
            if level > 0:
                stage.upsamplers = nn.ModuleList([Resample(own, down=False)])
            self.up_blocks.append(stage)
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """The names of the inputs are diffusers'."""
        words, time = encoder_hidden_states, self.time_embedding(timestep)
        x = self.conv_in(sample)
        skips = [x]
        for stage in self.down_blocks:
            for n in range(len(stage.resnets)):
                x = stage.layer(n, x, time, words)
                skips.append(x)
            if hasattr(stage, "downsamplers"):
                x = stage.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, words)
        for stage in self.up_blocks:
            for n in range(len(stage.resnets)):
                x = stage.layer(n, torch.cat([x, skips.pop()], 1), time, words)
            if hasattr(stage, "upsamplers"):
                x = stage.upsamplers[0](x)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The weights of a file in float32: an index in JSON behind its length, then the bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    index: dict[str, Any] = json.loads(content[8:start])
    weights = {}
    for name, entry in index.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            value = np.frombuffer(content[start + first : start + last], _TYPES[entry["dtype"]])
            weights[name] = torch.from_numpy(value.astype(np.float32).reshape(entry["shape"]))
    return weights


def shapes_unet() -> UNet:
    """The embedded model's denoiser with its trained weights."""
    unet = UNet(Config.of_shapes())
    unet.load_state_dict(read_safetensors(SHAPES / WEIGHTS))
    return unet.eval().requires_grad_(requires_grad=False)


def large_unet() -> UNet:
    """Stable Diffusion 1.5's architecture with random weights: 860 million of them."""
    torch.manual_seed(0)
    return UNet(STABLE_DIFFUSION_15).eval().requires_grad_(requires_grad=False)
