"""Reads an image of `shapes` back from its pixels: background, and each shape's size, colour, kind and place.

It is the judge of generated images, so it shares nothing with the code that draws the training images: the
specification (palette, radii, places, geometry) is stated here a second time, as signed distances, and fitted to the
pixels by least squares.

The reading has four steps: the background from the border; regions of one colour, grown from flat seed pixels; each
region as soft coverage fitted with all six kinds; what no fitted shape explains is an extra shape. Whatever is
ambiguous is read as "unclear", which matches no caption.

Coordinates are pixels, x to the right and y downwards; the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Words = tuple[str, str, str, str]  # size, colour, kind, place

SIDE = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "purple": (145, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
RADIUS = {"small": 8.5, "large": 14.0}  # px
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
AREA = {"circle": 3.142, "square": 2.690, "triangle": 1.515, "star": 1.428, "ring": 2.191, "cross": 2.258}  # of r = 1
UNCLEAR = "unclear"

# Half the distance of the palette's closest pair (orange and yellow, 90 in RGB): within it a colour is certain.
COLOUR_REACH = 45.0
COLOUR_SHARE = 0.8  # of a shape's flat pixels that must be nearest to the shape's colour
RADIUS_SLACK = 0.2  # relative; images are drawn with 0.06, and the two sizes stay apart up to 0.24
PLACE_SLACK = 6.0  # px along each axis; images are drawn with 2, and half-way between two places is 8
# Drawn shapes blurred by 0.7 px with noise of 6 fit at 0.94, 0.92, 0.89, 0.83, 0.90 and 0.89 or better (in this order).
# Impostors: a diamond fits circle at 0.84 and a 6:5 rectangle square at 0.84, a half disc or a triangle on its head
# fit nothing above 0.70, a four-pointed star fits cross at 0.79.
FIT_NEEDED = {"circle": 0.88, "square": 0.88, "triangle": 0.85, "star": 0.8, "ring": 0.82, "cross": 0.82}
MARGIN_NEEDED = 0.03  # to the second-best kind; the drawn ones keep 0.08, a square with very round corners 0.02
BLURS = (0.0, 0.6, 1.0)  # px, sigma: what a template may be blurred by to fit better; more is not forgiven
SPECK = 12.0  # px²: what is smaller is noise, what is larger must be explained
DEPTH = 2.0  # px: what is this far outside of every fitted outline is a shape of its own
HOLE = 6.0  # px²: the largest part that may be missing from a shape, counted HOLE_DEPTH inside its outline
HOLE_DEPTH = 1.0  # px
MAXIMUM_ANGLE = math.radians(12)  # images are drawn with 8 degrees
# RGB per px: noise of 6 has a slope of 10; the middle of an edge has half of its contrast, or 0.4 when blurred by 1 px.
_FLAT, _FLAT_SHARE = 25.0, 0.1
_FAINT = 25.0  # RGB distance from the background at which a pixel may belong to a shape
_MOST_REGIONS = 4  # fitted, the largest first; an image of noise has hundreds, and the others count unfitted
_SEED_PIXELS = 4  # fewer flat pixels of one colour than this are an edge or noise
_ROUNDS = 6
_LONGEST_MOVE = np.array([2.0, 2.0, 2.0, 0.12])  # px, px, px, radians in one round
_ALL = slice(0, SIDE)


@dataclass(frozen=True)
class Seen:
    """One shape as the pixels show it; `fit` is the IoU (0..1) with the best template."""

    size: str
    colour: str
    kind: str
    place: str
    fit: float


@dataclass(frozen=True)
class Reading:
    """What an image shows."""

    background: str
    shapes: tuple[Seen, ...]


@dataclass(frozen=True)
class _Template:
    """A kind at its best: x, y, radius (px) and angle (radians) as (4,), and the IoU it reaches there."""

    kind: str
    parameters: Floats
    fit: float
    clear: bool  # fits well, better than every other kind, and without holes

    def distance(self) -> Floats:
        """Signed distance of every pixel from the outline, (64, 64) px."""
        whole: Floats = _distance(self.kind, self.parameters[np.newaxis], _ALL, _ALL)[0]
        return whole


def read(image: NDArray[np.uint8]) -> Reading:
    """The background and the shapes of an image, (64, 64, 3) uint8; ValueError for any other array."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"an image is ({SIDE}, {SIDE}, 3) uint8, not {image.shape} {image.dtype}")
    pixels = image.astype(np.float64)
    background = _background(pixels)
    contrast: Floats = np.linalg.norm(pixels - background, axis=2)
    unexplained = contrast > COLOUR_REACH
    shapes: list[Seen] = []
    for region, seeds in _regions(pixels, contrast)[:_MOST_REGIONS]:
        coverage = _coverage(pixels, region, background, np.median(pixels[seeds], axis=0))
        for template in _templates(coverage) if coverage.sum() > SPECK else []:
            shapes.append(_seen(template, _colour_name(pixels[seeds])))
            unexplained &= (template.distance() > DEPTH) & (template.clear | ~region)
    extra = Seen(UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR, 0.0)
    shapes += [extra] * _blobs(unexplained, SPECK)
    return Reading(_colour_name(background[np.newaxis]), tuple(shapes))


def mistakes(reading: Reading, background: str, shapes: Sequence[Words]) -> list[str]:
    """What is wrong with a reading, one name per wrong attribute of each shape; [] when everything is right.

    `shapes` are (size, colour, kind, place). Shapes are paired so that the fewest mistakes remain; when their number
    is wrong, "count" stands for all of their attributes.
    """
    wrong = [] if reading.background == background else ["background"]
    if len(reading.shapes) != len(shapes):
        return [*wrong, "count"]
    pairings = [
        [name for seen, words in zip(order, shapes, strict=True) for name in _differences(seen, words)]
        for order in permutations(reading.shapes)
    ]
    return wrong + min(pairings, key=len)


def _differences(seen: Seen, words: Words) -> list[str]:
    """The names of the attributes in which a shape differs from its (size, colour, kind, place)."""
    found = {"size": seen.size, "colour": seen.colour, "kind": seen.kind, "place": seen.place}
    return [name for (name, value), wanted in zip(found.items(), words, strict=True) if value != wanted]


# ---- colours


def _nearest(pixels: Floats) -> tuple[Integers, Floats]:
    """The index of the nearest palette colour and its RGB distance; (..., 3) to two arrays (...)."""
    distances = np.linalg.norm(pixels[..., np.newaxis, :] - np.array(list(PALETTE.values()), float), axis=-1)
    return np.argmin(distances, axis=-1), np.min(distances, axis=-1)


def _colour_name(pixels: Floats) -> str:
    """The one colour of these pixels, (n, 3), or "unclear" if it is off the palette or only some of them have it."""
    index, distance = _nearest(np.median(pixels, axis=0))
    share = np.mean(_nearest(pixels)[0] == index)
    return list(PALETTE)[int(index)] if distance < COLOUR_REACH and share >= COLOUR_SHARE else UNCLEAR


def _background(pixels: Floats) -> Floats:
    """The border's dominant colour as it really is, (3,): the median over the border pixels of one palette colour."""
    inner = np.zeros(pixels.shape[:2], dtype=bool)
    inner[2:-2, 2:-2] = True
    border = pixels[~inner]
    index = _nearest(border)[0]
    dominant: Floats = np.median(border[index == np.argmax(np.bincount(index))], axis=0)
    return dominant


# ---- regions


def _neighbours(grid: Integers, outside: int) -> Iterator[Integers]:
    """The grid shifted by one pixel in each of the four directions."""
    padded = np.pad(grid, 1, constant_values=outside)
    yield from (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])


def _components(labels: Integers) -> list[Mask]:
    """The 4-connected components of equal labels >= 0, as masks.

    Every pixel starts with its own number, points at the largest of its equal neighbours', and follows the pointers
    until nothing changes.
    """
    inside = labels >= 0
    same = [(other == labels) & inside for other in _neighbours(labels, -1)]
    number = np.arange(labels.size).reshape(labels.shape)
    while True:
        before = number
        for linked, other in zip(same, _neighbours(number, -1), strict=True):
            number = np.maximum(number, np.where(linked, other, -1))
        number = number.ravel()[number]
        if np.array_equal(number, before):
            return [number == n for n in np.unique(number[inside])]


def _blobs(mask: Mask, size: float) -> int:
    """How many connected parts of a mask are larger than a size in px²."""
    if mask.sum() <= size:
        return 0
    return sum(int(part.sum() > size) for part in _components(np.where(mask, 0, -1)))


def _regions(pixels: Floats, contrast: Floats) -> list[tuple[Mask, Mask]]:
    """Regions of one palette colour larger than a speck, each with its seed pixels, the largest first.

    Only flat pixels have a colour of their own: at the edge between red and yellow a pixel is orange. They are the
    seeds; every other pixel belongs to the seeds that reach it first.
    """
    slope = np.linalg.norm(np.concatenate(np.gradient(pixels, axis=(0, 1)), axis=2), axis=2)
    flat = (contrast > COLOUR_REACH) & (slope < _FLAT + _FLAT_SHARE * contrast)
    labels = np.full(contrast.shape, -1)
    labels[flat] = _nearest(pixels[flat])[0]
    seeds = np.zeros_like(flat)
    for component in _components(labels):
        seeds |= component & (component.sum() >= _SEED_PIXELS)
    grown = _grow(np.where(seeds, labels, -1), contrast > _FAINT)
    regions = [(c, c & seeds) for c in _components(grown) if c.sum() > SPECK]
    return sorted(regions, key=lambda region: int(region[0].sum()), reverse=True)


def _grow(labels: Integers, domain: Mask) -> Integers:
    """Spread labels >= 0 over the domain, one pixel at a time."""
    while True:
        free = domain & (labels < 0)
        for other in _neighbours(labels, -1):
            labels = np.where(free & (labels < 0), other, labels)
        if np.array_equal(free, domain & (labels < 0)):
            return labels


def _coverage(pixels: Floats, region: Mask, background: Floats, colour: Floats) -> Floats:
    """How much of each pixel the region covers, (64, 64) in 0..1: where its colour lies from background to shape."""
    line = colour - background
    share = np.clip((pixels - background) @ line / max(float(line @ line), 1.0), 0.0, 1.0)
    return np.where(region, share, 0.0)


# ---- templates


def _distance(kind: str, parameters: Floats, rows: slice, columns: slice) -> Floats:
    """Signed distance from the outline, negative inside, for n shapes: (n, 4) x, y, radius, angle to (n, h, w) px."""
    x, y, radius, angle = (p[:, np.newaxis, np.newaxis] for p in parameters.T)
    right = (np.arange(columns.start, columns.stop) + 0.5 - x) / radius
    down = (np.arange(rows.start, rows.stop)[:, np.newaxis] + 0.5 - y) / radius
    u = np.cos(angle) * right + np.sin(angle) * down
    v = np.cos(angle) * down - np.sin(angle) * right
    return np.asarray(_OUTLINE[kind](u, v) * radius)


def _circle(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1.0


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - 0.775) - 0.225  # from 0.55 to 1


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def _triangle(u: Floats, v: Floats) -> Floats:
    """Equilateral, one corner up, circumradius 1.08, its centre 0.2 below the place."""
    v = v - 0.2
    return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - 0.54


def _star(u: Floats, v: Floats) -> Floats:
    """Five points at 1.08, one of them up, and five notches at 0.45.

    Folding the plane into one of its ten equal sectors leaves one half-plane, through a point and a notch.
    """
    length, turn = np.hypot(u, v), np.arctan2(u, -v)
    folded = np.abs((turn + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    notch = 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    along = notch - (1.08, 0.0)
    normal = np.array([along[1], -along[0]]) / np.linalg.norm(along)
    return np.asarray((length * np.cos(folded) - 1.08) * normal[0] + length * np.sin(folded) * normal[1])


def _cross(u: Floats, v: Floats) -> Floats:
    """Two bars, 2 long and 0.68 wide."""
    wide, narrow = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
    return np.maximum(wide - 1.0, narrow - 0.34)


_OUTLINE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def _render(kind: str, parameters: Floats, rows: slice = _ALL, columns: slice = _ALL) -> Floats:
    """Antialiased coverage of n shapes, (n, h, w) in 0..1."""
    return np.clip(0.5 - _distance(kind, parameters, rows, columns), 0.0, 1.0)


def _fit(kind: str, coverage: Floats) -> tuple[Floats, float]:
    """The (x, y, radius, angle) at which a kind comes closest to a coverage (64, 64), and their IoU.

    Gauss-Newton on the squared difference, from the coverage's centroid, area and no angle.
    """
    rows, columns = _window(coverage)
    target = coverage[rows, columns]
    steps = np.diag([0.25, 0.25, 0.25, 0.03])
    guess = _first_guess(kind, coverage)
    best, least = guess, np.inf
    for _ in range(_ROUNDS):
        drawn = _render(kind, np.concatenate([guess[np.newaxis], guess + steps]), rows, columns)
        error = (target - drawn[0]).ravel()
        if error @ error < least:
            best, least = guess, error @ error
        slope = ((drawn[1:] - drawn[0]).reshape(4, -1).T) / np.diag(steps)
        normal = slope.T @ slope + np.diag([1e-3, 1e-3, 1e-3, 1.0])  # a circle has no angle
        move = np.linalg.solve(normal, slope.T @ error)
        if np.abs(move * (1.0, 1.0, 1.0, guess[2])).max() < 0.02:
            break
        guess = guess + np.clip(move, -_LONGEST_MOVE, _LONGEST_MOVE)
        guess[2:] = np.clip(guess[2:], (4.0, -MAXIMUM_ANGLE), (20.0, MAXIMUM_ANGLE))
    sharp = _render(kind, best[np.newaxis], rows, columns)[0]
    return best, max(_overlap(target, band[rows, rows] @ sharp @ band[columns, columns]) for band in _blurs())


def _overlap(one: Floats, other: Floats) -> float:
    """Soft intersection over union of two coverages, 0..1."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


@lru_cache(maxsize=1)
def _blurs() -> tuple[Floats, ...]:
    """For each of BLURS the symmetric (64, 64) matrix that blurs along an axis."""
    offsets = np.subtract.outer(np.arange(SIDE), np.arange(SIDE))
    bands = [np.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2) for sigma in BLURS]
    return tuple(band / band[SIDE // 2].sum() for band in bands)


def _first_guess(kind: str, coverage: Floats) -> Floats:
    """The (x, y, radius, angle) of the kind with this centroid and area, upright."""
    area = coverage.sum()
    rows, columns = np.indices(coverage.shape) + 0.5
    radius = np.sqrt(area / AREA[kind])
    x, y = (coverage * columns).sum() / area, (coverage * rows).sum() / area
    return np.array([x, y - 0.2 * radius if kind == "triangle" else y, radius, 0.0])


def _window(coverage: Floats, margin: int = 5) -> tuple[slice, slice]:
    """The rows and columns around everything covered, with a margin in px."""
    rows, columns = (np.flatnonzero(coverage.any(axis=axis)) for axis in (1, 0))
    tall = slice(max(rows[0] - margin, 0), min(rows[-1] + 1 + margin, SIDE))
    wide = slice(max(columns[0] - margin, 0), min(columns[-1] + 1 + margin, SIDE))
    return tall, wide


def _best_template(coverage: Floats) -> _Template:
    """The kind that fits best; clear if it fits well, better than the others, and nothing deep inside is missing."""
    fits = sorted(((*_fit(kind, coverage), kind) for kind in AREA), key=lambda f: f[1], reverse=True)
    (parameters, fit, kind), runner_up = fits[0], fits[1][1]
    hole = (_distance(kind, parameters[np.newaxis], _ALL, _ALL)[0] < -HOLE_DEPTH) & (coverage < 0.5)
    clear = fit >= FIT_NEEDED[kind] and fit - runner_up >= MARGIN_NEEDED and not _blobs(hole, HOLE)
    return _Template(kind, parameters, fit, clear)


def _templates(coverage: Floats) -> list[_Template]:
    """One template, or two where the region is two shapes of one colour that touch."""
    whole = _best_template(coverage)
    if whole.clear:
        return [whole]
    halves = [_best_template(half) for half in _halves(coverage) if half.sum() > SPECK]
    return halves if len(halves) == 2 and all(h.clear for h in halves) else [whole]


def _halves(coverage: Floats) -> tuple[Floats, Floats]:
    """The coverage cut at its waist: across its longest axis, where it is narrowest in the middle third."""
    points = np.indices(coverage.shape).reshape(2, -1)
    axis = np.linalg.eigh(np.cov(points, aweights=coverage.ravel()))[1][:, -1]
    along = (axis @ points).reshape(coverage.shape)
    low, high = along[coverage > 0].min(), along[coverage > 0].max()
    cuts = np.linspace(low + (high - low) / 3, high - (high - low) / 3, 25)
    widths = [coverage[np.abs(along - cut) < 1.0].sum() for cut in cuts]
    beyond = along > cuts[int(np.argmin(widths))]
    return np.where(beyond, coverage, 0.0), np.where(beyond, 0.0, coverage)


# ---- words


def _seen(template: _Template, colour: str) -> Seen:
    """A fitted template in the words of a caption."""
    x, y, radius = template.parameters[:3]
    sizes = [name for name, nominal in RADIUS.items() if abs(radius / nominal - 1) <= RADIUS_SLACK]
    places = [name for name, (a, b) in PLACES.items() if max(abs(x - a), abs(y - b)) <= PLACE_SLACK]
    kind = template.kind if template.clear else UNCLEAR
    return Seen((sizes or [UNCLEAR])[0], colour, kind, (places or [UNCLEAR])[0], template.fit)
