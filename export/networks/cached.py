"""A UNet in two parts for feature caching, as in DeepCache (Ma et al., CVPR 2024): the deep part, and the shallow rest.

The cut is before the last layer of the way up, where DeepCache cuts by default (`cache_branch_id` 0): the deep part
makes the features that this layer takes, and the shallow part is the first convolution, that layer and the last one.
The two in a row compute what the UNet does.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from export.networks import Exported, Input, normal
from export.networks.denoisers import PooledUNet, UNet, pooled_unet, unet

PLAIN = {
    "DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D",
}  # fmt: skip


class _Part(nn.Module):
    """What both parts have of a diffusers UNet; answers as one does."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.config = unet.config
        self.unet: Any = unet

    def embedding(self, sample: Tensor, timestep: Tensor, states: Tensor, more: dict[str, Tensor] | None) -> Tensor:
        """The embedding of times and of what else the UNet is told."""
        found: Tensor = self.unet.time_embedding(self.unet.get_time_embed(sample=sample, timestep=timestep))
        told = self.unet.get_aug_embed(emb=found, encoder_hidden_states=states, added_cond_kwargs=more)
        return found if told is None else found + told


class DeepPart(_Part):
    """Everything but the last layer of the way up and what follows: its `sample` is the features."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        """(batch, channels, height, width), as large as the latents."""
        told = {"temb": self.embedding(sample, timestep, encoder_hidden_states, added_cond_kwargs)}
        text = {"encoder_hidden_states": encoder_hidden_states}
        x = self.unet.conv_in(sample)
        skips = [x]
        for block in self.unet.down_blocks:
            x, found = block(x, **told, **(text if hasattr(block, "attentions") else {}))
            skips += found
        x = self.unet.mid_block(x, **told, **text)
        *blocks, last = self.unet.up_blocks
        for block in blocks:
            skips, own = skips[: -len(block.resnets)], tuple(skips[-len(block.resnets) :])
            x = block(x, res_hidden_states_tuple=own, **told, **(text if hasattr(block, "attentions") else {}))
        attentions = getattr(last, "attentions", ())
        for number, layer in enumerate(last.resnets[:-1]):
            x = layer(torch.cat([x, skips.pop()], 1), told["temb"])
            if attentions:
                x = attentions[number](x, **text, return_dict=False)[0]
        return SimpleNamespace(sample=x)


class ShallowPart(_Part):
    """The first convolution, the last layer of the way up, and the last convolution."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.features: list[Tensor] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, timestep_cond: None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        """A prediction of the latents' shape."""
        told = self.embedding(sample, timestep, encoder_hidden_states, added_cond_kwargs)
        last = self.unet.up_blocks[-1]
        x = last.resnets[-1](torch.cat([self.features[-1], self.unet.conv_in(sample)], 1), told)
        if getattr(last, "attentions", ()):
            x = last.attentions[-1](x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        if self.unet.conv_norm_out is not None:
            x = self.unet.conv_act(self.unet.conv_norm_out(x))
        return SimpleNamespace(sample=self.unet.conv_out(x))


class ShallowUNet(UNet):
    """`UNet` with features as its last input."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, features: Tensor
    ) -> Tensor:
        """As UNet."""
        part: Any = self.model
        part.features[:] = [features]
        return super().forward(sample, timestep, encoder_hidden_states)


class ShallowPooledUNet(PooledUNet):
    """`PooledUNet` with features as its last input."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor,
        features: Tensor,
    ) -> Tensor:  # fmt: skip
        """As PooledUNet."""
        part: Any = self.model
        part.features[:] = [features]
        return super().forward(sample, timestep, encoder_hidden_states, text_embeds, time_ids)


def uncacheable(config: Any) -> str | None:
    """Why a UNet cannot be cut, by its config; None where it can."""
    kinds = [*config.down_block_types, *config.up_block_types, config.mid_block_type]
    foreign = sorted({str(kind) for kind in kinds} - PLAIN)
    if foreign:
        return f"its UNet has {', '.join(foreign)}, which is not known how to cut"
    return "it is distilled to a few steps, which leave nothing to reuse" if config.time_cond_proj_dim else None


def deep(pipeline: Any) -> Exported:
    """The network that makes features, with the denoiser's inputs."""
    whole = _whole(pipeline)
    module: Any = whole.module
    module.model = DeepPart(module.model)
    return Exported(module, whole.inputs, {"features": _axes(pipeline)})


def shallow(pipeline: Any) -> Exported:
    """The network that takes features beside the denoiser's inputs, and predicts as it does."""
    whole, kind = _whole(pipeline), ShallowPooledUNet if _pooled(pipeline) else ShallowUNet
    features = Input("features", _axes(pipeline), normal(pipeline.unet.dtype))
    return Exported(kind(ShallowPart(pipeline.unet)), (*whole.inputs, features), whole.outputs)


def _pooled(pipeline: Any) -> bool:
    return pipeline.unet.config.addition_embed_type is not None


def _whole(pipeline: Any) -> Exported:
    return pooled_unet(pipeline) if _pooled(pipeline) else unet(pipeline)


def _axes(pipeline: Any) -> tuple[int | str, ...]:
    """What the last layer of the way up takes beside the first convolution's output."""
    config, last = pipeline.unet.config, pipeline.unet.up_blocks[-1]
    return ("batch", last.resnets[-1].in_channels - config.block_out_channels[0], "height", "width")
