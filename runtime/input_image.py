"""Images that come in: upright, in sRGB, eight bits a channel, whatever their file says about itself."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from engines.errors import ParameterError


def read_image(content: bytes, side: int) -> Image.Image:
    """A PNG, JPEG or WebP file as RGB; ParameterError when it is none, or larger than `side` pixels.

    Its size is looked at before its pixels are decoded.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as opened:
            if max(opened.size) > side:
                message = f"image: width and height end at {side} pixels here, this has {opened.size}"
                raise ParameterError("image", message)
            return to_srgb(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow's readers raise
        # Pillow's message for files that it does not know holds the address of a buffer
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ParameterError("image", f"image: this is no readable PNG, JPEG or WebP file{why}") from None


def to_srgb(image: Image.Image) -> Image.Image:
    """The image as RGB: turned as its EXIF orientation says, 16 bits scaled to 8, its ICC profile converted to sRGB.

    Transparency is dropped, as diffusers does. ParameterError for modes without a defined range ("F", and "I" beyond
    16 bits) and for profiles that cannot be read, because guessing would draw another image without a word.
    """
    profile = image.info.get("icc_profile")
    upright = _eight_bits(ImageOps.exif_transpose(image))
    if upright.mode in ("P", "PA", "1", "LA", "La", "RGBA", "RGBa", "RGBX"):
        upright = _without_alpha(upright)
    if upright.mode == "LAB":
        return _converted(upright, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")))
    if profile and upright.mode in ("RGB", "L", "CMYK"):
        return _converted(upright, _profile(profile))
    return upright.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Modes of more than eight bits as "L": 65535 becomes 255."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        message = f"image has mode {image.mode!r}, whose range of values is not known: convert it to RGB first"
        raise ParameterError("image", message)
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def _without_alpha(image: Image.Image) -> Image.Image:
    """The colours alone; those that are stored multiplied with alpha are divided by it."""
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _profile(content: bytes) -> ImageCms.ImageCmsProfile:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(content))
    except OSError as error:
        message = f"image has an ICC profile that cannot be read ({error}): remove it, or convert the image to sRGB"
        raise ParameterError("image", message) from error


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile) -> Image.Image:
    """From a profile's colours to sRGB; sRGB itself stays as it is, to the bit."""
    if "srgb" in ImageCms.getProfileDescription(profile).lower():
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except ImageCms.PyCMSError as error:
        message = f"image is {image.mode} and its ICC profile does not fit that ({error}): convert it to sRGB"
        raise ParameterError("image", message) from error
    assert converted is not None  # of profileToProfile, without inPlace
    return converted
