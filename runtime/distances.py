"""Distances between images of the same noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from engines.base import Array

EQUAL_PSNR = 99.0  # dB
WINDOW = 7  # pixels of a side, of SSIM


def drift(latents: Array, reference: Array) -> float:
    """Relative L2 distance of the finished latents from the sequential ones."""
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))


def psnr(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio of images in dB, capped at 99 where they are equal."""
    pairs = zip(images, references, strict=True)
    errors = [np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2) for a, b in pairs]
    return float(min(EQUAL_PSNR, 10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9))))


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity of two images, 1 where they are equal (Wang et al. 2004; windows of 7 × 7 as scikit-image).

    Images are larger than a window.
    """
    x, y = (np.asarray(one, np.float64) for one in (image, reference))

    def local(values: np.ndarray) -> np.ndarray:
        rows = sliding_window_view(values, WINDOW, 0).mean(-1)
        found: np.ndarray = sliding_window_view(rows, WINDOW, 1).mean(-1)
        return found

    mean_x, mean_y, sample = local(x), local(y), WINDOW**2 / (WINDOW**2 - 1)
    variances = sample * (local(x * x) - mean_x**2 + local(y * y) - mean_y**2)
    covariance = sample * (local(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))))
