"""Images that come in, against closed forms: every orientation, mode, bit depth and a colour profile made by hand."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines.errors import ParameterError
from runtime.input_image import to_srgb

# what a reader has to do with rows and columns, by the EXIF specification's table of orientations
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}
BEST: dict[str, dict[str, Any]] = {
    "PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True},
}  # fmt: skip
MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "La")
DEEP = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I": "<i4"}


def reopened(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return Image.open(io.BytesIO(content.getvalue()))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_orientation(rng: np.random.Generator, kind: str, orientation: int) -> None:
    blocks = rng.integers(0, 256, (3, 5, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = reopened(Image.fromarray(blocks), kind, exif=exif, **BEST[kind])
    expected = TURNS[orientation](np.asarray(stored.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(to_srgb(stored)), expected)
    assert to_srgb(to_srgb(stored)).size == to_srgb(stored).size, "turned once, not again"


def test_every_mode_is_named_here() -> None:
    assert {*MODES, *DEEP, "F", "I;16N"} == set(Image.MODES)  # I;16N is one of the other two, by machine


@pytest.mark.parametrize("mode", MODES)
def test_colours_of_every_mode(mode: str) -> None:
    """Grey of 204 in any mode stays grey of 204, within what the mode itself can say."""
    grey = Image.new("RGB", (6, 4), (204, 204, 204))
    if mode == "LAB":
        image = Image.new("LAB", (6, 4), (round(82.046 / 100 * 255), 128, 128))  # CIE L* of sRGB 204
    elif mode == "1":
        image, grey = Image.new("1", (6, 4), 1), Image.new("RGB", (6, 4), (255, 255, 255))
    elif mode in ("La", "RGBa"):
        image = grey.convert({"La": "LA", "RGBa": "RGBA"}[mode]).convert(mode)
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
    else:
        image = grey.convert("L" if mode == "LA" else "RGB").convert(mode)
    assert image.mode == mode
    found = to_srgb(image)
    assert found.mode == "RGB" and found.size == (6, 4)
    assert np.abs(np.asarray(found, int) - np.asarray(grey, int)).max() <= 3


def test_half_transparent_colours_are_not_darkened() -> None:
    seen = Image.new("RGBA", (2, 2), (200, 100, 50, 128))
    for mode in ("RGBA", "RGBa"):
        assert np.abs(np.asarray(to_srgb(seen.convert(mode)), int) - (200, 100, 50)).max() <= 1


@pytest.mark.parametrize("mode", DEEP)
def test_sixteen_bits_are_scaled(rng: np.random.Generator, mode: str) -> None:
    values = rng.integers(0, 65536, (7, 5))
    values[0, :4] = 0, 30000, 65535, 32768
    image = Image.frombytes(mode, (5, 7), values.astype(DEEP[mode]).tobytes())
    found = np.asarray(to_srgb(image))
    assert found[0, :4, 0].tolist() == [0, 117, 255, 128]
    np.testing.assert_array_equal(found, np.rint(values / 257).astype(np.uint8)[..., None].repeat(3, 2))


def test_a_sixteen_bit_png() -> None:
    stored = reopened(Image.fromarray(np.full((3, 3), 30000, np.uint16)), "PNG")
    assert to_srgb(stored).getpixel((1, 1)) == (117, 117, 117)


@pytest.mark.parametrize(
    "values", [np.array([[0.5]], np.float32), np.array([[70000]], np.int32), np.array([[-1]], np.int32)]
)
def test_values_without_a_range_are_refused(values: NDArray[np.float32]) -> None:
    with pytest.raises(ParameterError, match=r"mode '[FI]', whose range of values is not known: convert it to RGB"):
        to_srgb(Image.fromarray(values))


def linear_profile() -> bytes:
    """An ICC profile of linear light with sRGB's primaries, put together by the ICC specification."""

    def fixed(*numbers: float) -> bytes:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))

    def xyz(*numbers: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*numbers)

    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)  # no entries: the identity
    name = b"linear light"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(4 + 4 + 2 + 1 + 67)
    tags = {
        b"desc": description, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4360747, 0.2225045, 0.0139322), b"gXYZ": xyz(0.3850649, 0.7168786, 0.0971045),
        b"bXYZ": xyz(0.1430804, 0.0606169, 0.7141733), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, data = struct.pack(">I", len(tags)), b""
    offset = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = struct.pack(">I", offset + len(data))
    head = (
        size + bytes(4) + b"\x02\x10\0\0" + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642, 1, 0.8249)
    )
    return head.ljust(128, b"\0") + table + data


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_profile_is_converted(kind: str) -> None:
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    pixels = levels[:, None, None].repeat(16, 0).repeat(16, 1).repeat(3, 2)
    stored = reopened(Image.fromarray(pixels), kind, icc_profile=linear_profile(), **BEST[kind])
    light = levels / 255
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    found = np.asarray(to_srgb(stored), int)[8::16, 8]
    assert np.abs(found - np.rint(encoded * 255)[:, None]).max() <= 2


def test_srgb_itself_is_kept_to_the_bit(rng: np.random.Generator) -> None:
    from PIL import ImageCms

    pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    stored = reopened(Image.fromarray(pixels), "PNG", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(to_srgb(stored)), pixels)


def test_a_damaged_profile_is_refused() -> None:
    stored = reopened(Image.new("RGB", (4, 4)), "PNG", icc_profile=b"no profile at all")
    with pytest.raises(ParameterError, match=r"ICC profile that cannot be read .*: remove it, or convert"):
        to_srgb(stored)
