"""Distances between images of the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from engines.base import Array


def drift(latents: Array, reference: Array) -> float:
    """Relative L2 distance of the finished latents from the sequential ones."""
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))


def psnr(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio of images in dB, capped at 99 where they are equal."""
    pairs = zip(images, references, strict=True)
    errors = [np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2) for a, b in pairs]
    return float(min(99.0, 10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9))))


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity of two images, 1 where they are equal."""
    from skimage.metrics import structural_similarity

    pixels = (np.asarray(image), np.asarray(reference))
    return float(structural_similarity(*pixels, channel_axis=2))  # type: ignore[no-untyped-call]
