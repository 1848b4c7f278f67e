"""The images that `shapes` learns from, and the captions that describe them.

An image is 64×64 RGB: one or two filled shapes on a plain background. Its caption names size, colour, shape, place
and background, or leaves some of them out, so that "a red star" is a prompt too.

Some combinations of (colour, shape, place) are *held out*: they never occur in training, alone or beside another
shape, and `bench quality` asks for exactly those.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (145, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
RADII = {"small": 8.5, "large": 14.0}
PLACES: dict[str, tuple[int, int]] = {
    "at the left": (16, 32),
    "at the right": (48, 32),
    "at the top": (32, 16),
    "at the bottom": (32, 48),
    "in the center": (32, 32),
    "at the top left": (16, 16),
    "at the top right": (48, 16),
    "at the bottom left": (16, 48),
    "at the bottom right": (48, 48),
}
_OVERSAMPLE = 4
_HELD_OUT_SHARE = 12  # one (colour, kind, place) in this many


WORDS = tuple(sorted({"a", "and", "on", "background", *COLOURS, *KINDS, *RADII, *" ".join(PLACES).split()}))


@dataclass(frozen=True)
class Shape:
    """One shape of an image, in the words of its caption."""

    size: str
    colour: str
    kind: str
    place: str

    @property
    def held_out(self) -> bool:
        """Whether this (colour, kind, place) is kept out of the training images."""
        digest = hashlib.sha256(f"{self.colour}/{self.kind}/{self.place}".encode()).digest()
        return digest[0] % _HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Scene:
    """One or two shapes on a background: what a caption says and what an image shows."""

    shapes: tuple[Shape, ...]
    background: str

    def caption(self) -> str:
        """The full caption, e.g. "a large red star at the left on blue background"."""
        parts = [f"a {s.size} {s.colour} {s.kind} {s.place}" for s in self.shapes]
        return f"{' and '.join(parts)} on {self.background} background"

    def loose_caption(self, rng: np.random.Generator) -> str:
        """A caption that leaves out each size, colour, place and the background with probability 1/4."""
        parts = []
        for s in self.shapes:
            words = ["a"]
            words += [s.size] if rng.random() > 0.25 else []
            words += [s.colour] if rng.random() > 0.25 else []
            words += [s.kind]
            words += [s.place] if rng.random() > 0.25 else []
            parts.append(" ".join(words))
        background = f" on {self.background} background" if rng.random() > 0.25 else ""
        return " and ".join(parts) + background


def held_out_scenes() -> Iterator[Scene]:
    """Every single-shape scene whose (colour, kind, place) is never seen in training, in a fixed order."""
    for size, colour, kind, place, background in product(RADII, COLOURS, KINDS, PLACES, COLOURS):
        shape = Shape(size, colour, kind, place)
        if background != colour and shape.held_out:
            yield Scene((shape,), background)


def random_scene(rng: np.random.Generator, shapes: int, *, held_out: bool = False) -> Scene:
    """A random scene of 1 or 2 shapes; every shape is held out, or none is."""

    def pick(options: object) -> str:
        return str(rng.choice(list(options)))  # type: ignore[call-overload]

    while True:
        background = pick(COLOURS)
        chosen = tuple(Shape(pick(RADII), pick(COLOURS), pick(KINDS), pick(PLACES)) for _ in range(shapes))
        if any(s.colour == background or s.held_out != held_out for s in chosen):
            continue
        if shapes == 2 and math.dist(PLACES[chosen[0].place], PLACES[chosen[1].place]) < 30:
            continue  # the two would touch
        return Scene(chosen, background)


def draw(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The image of a scene, (64, 64, 3) uint8, antialiased.

    Place, size and angle vary a little (±2 px, ±6 %, ±8°), so that one caption has many images.
    """
    scale = _OVERSAMPLE
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        x, y = (c + rng.uniform(-2, 2) for c in PLACES[shape.place])
        radius = RADII[shape.size] * rng.uniform(0.94, 1.06)
        angle = math.radians(rng.uniform(-8, 8))
        _draw_shape(pen, shape.kind, x * scale, y * scale, radius * scale, angle, scene.background, shape.colour)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def _draw_shape(
    pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, r: float, angle: float, background: str, colour: str
) -> None:
    def disc(radius: float, fill: str) -> None:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[fill])

    def polygon(points: list[tuple[float, float]]) -> None:
        """Points in units of the radius, turned by the angle; y grows downwards."""
        c, s = math.cos(angle), math.sin(angle)
        pen.polygon([(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in points], fill=COLOURS[colour])

    if kind in ("circle", "ring"):
        disc(r, colour)
        if kind == "ring":
            disc(0.55 * r, background)
    elif kind == "square":
        polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])
    elif kind == "triangle":
        polygon([(math.sin(2 * math.pi * i / 3) * 1.08, 0.2 - math.cos(2 * math.pi * i / 3) * 1.08) for i in range(3)])
    elif kind == "star":
        reach = (1.08, 0.45)
        polygon(
            [(math.sin(math.pi * i / 5) * reach[i % 2], -math.cos(math.pi * i / 5) * reach[i % 2]) for i in range(10)]
        )
    else:  # cross
        w = 0.34
        polygon(
            [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w), (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w)]
        )
