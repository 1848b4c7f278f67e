"""The decoder and the encoder of a VAE; its scaling is part of the graphs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from export.networks import Exported, Input, normal, uniform


class LatentDecoder(nn.Module):
    """Latents as the denoiser leaves them → pixels in [−1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.shift = _scaling(vae)

    def forward(self, latent_sample: Tensor) -> Tensor:
        """The scaling is part of the graph."""
        latents = latent_sample * self.scale.to(latent_sample) + self.shift.to(latent_sample)
        output: Tensor = self.vae.decode(latents).sample
        return output


class TinyEncoder(nn.Module):
    """Pixels in [−1, 1] → their latents, of an encoder that draws none (`AutoencoderTiny`)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.shift = _scaling(vae)

    def forward(self, image: Tensor) -> Tensor:
        """The inverse of the decoder's scaling."""
        latents: Tensor = self.vae.encode(image).latents
        return (latents - self.shift.to(latents)) / self.scale.to(latents)


class LatentEncoder(nn.Module):
    """Pixels in [−1, 1] and normal noise → a sample of their latents, as the denoiser takes them."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae
        self.scale, self.shift = _scaling(vae)

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """mean + std · noise, then the inverse of the decoder's scaling."""
        found = self.vae.encode(image).latent_dist
        latents: Tensor = found.mean + found.std * noise
        return (latents - self.shift.to(latents)) / self.scale.to(latents)


def _scaling(vae: Any) -> tuple[Tensor, Tensor]:
    """What the denoiser's latents are multiplied with and what is added, per channel."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scale, shift = torch.tensor(1 / config.scaling_factor), torch.tensor(getattr(config, "shift_factor", None) or 0.0)
    if mean is not None and std is not None:
        scale, shift = scale * torch.tensor(std).view(1, -1, 1, 1), torch.tensor(mean).view(1, -1, 1, 1)
    return scale, shift


def vae_factor(pipeline: Any) -> int:
    """How many pixels a latent is wide."""
    return int(2 ** (len(pipeline.vae.config.block_out_channels) - 1))


def decoder(pipeline: Any) -> Exported:
    """The decoder of any VAE."""
    vae, factor = pipeline.vae, vae_factor(pipeline)
    latents = Input("latent_sample", ("batch", vae.config.latent_channels, "height", "width"), normal(vae.dtype))
    pixels = ("batch", vae.config.out_channels, f"{factor}*height", f"{factor}*width")
    return Exported(LatentDecoder(vae), (latents,), {"sample": pixels})


def encoder(pipeline: Any) -> Exported:
    """The encoder of any VAE."""
    vae, factor = pipeline.vae, vae_factor(pipeline)
    latents = ("batch", vae.config.latent_channels, "height", "width")
    pixels = ("batch", vae.config.in_channels, f"{factor}*height", f"{factor}*width")
    image = Input("image", pixels, uniform(vae.dtype, -1, 1))
    if isinstance(vae, AutoencoderTiny):
        return Exported(TinyEncoder(vae), (image,), {"latent_sample": latents})
    noise = Input("noise", latents, normal(vae.dtype))
    return Exported(LatentEncoder(vae), (image, noise), {"latent_sample": latents})
