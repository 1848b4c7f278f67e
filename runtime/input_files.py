"""Arrays and images that a command line names by their files."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from engines.errors import ParameterError
from runtime.input_image import to_srgb


def load_latents(path: Path | None) -> np.ndarray | None:
    """The array of an .npy file; ParameterError when it is none."""
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ParameterError("latents", f"{path} cannot be read as an .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ParameterError("latents", f"{path} cannot be used as latents: save one array of numbers with numpy.save")
    return array


def load_image(path: Path | None) -> Image.Image | None:
    """An image from a file; ParameterError when it is none."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return to_srgb(image)
    except (OSError, ValueError) as error:
        raise ParameterError("image", f"{path} cannot be read as an image: {error}") from error
