"""The checker against images drawn by the code that it must not share anything with."""

from __future__ import annotations

import ast
import inspect
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bench import checker
from bench.checker import Reading, Seen, Words, mistakes, read
from export.shapes.data import COLOURS, KINDS, PLACES, RADII, Scene, Shape, draw, random_scene

Image = NDArray[np.uint8]
SCENE = Scene((Shape("large", "red", "star", "at the left"),), "blue")


@pytest.fixture
def seed() -> int:
    """A fresh seed; pytest shows what a test that fails has printed."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return seed


def words(scene: Scene) -> list[Words]:
    return [(s.size, s.colour, s.kind, s.place) for s in scene.shapes]


def judge(image: Image, scene: Scene) -> list[str]:
    return mistakes(read(image), scene.background, words(scene))


def degraded(image: Image, rng: np.random.Generator) -> Image:
    """Blurred by 0.7 px, every colour shifted by up to 8, with noise of 6."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / 0.7) ** 2)
    values = np.pad(image.astype(np.float64), ((2, 2), (2, 2), (0, 0)), mode="edge")
    for axis in (0, 1):
        values = np.apply_along_axis(lambda line: np.convolve(line, taps / taps.sum(), mode="valid"), axis, values)
    values += rng.uniform(-8, 8, 3) + rng.normal(0, 6, values.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def misread(
    seed: int, shapes: int, images: int, change: Callable[[Image, np.random.Generator], Image] | None = None
) -> list[str]:
    """Mistakes and caption of each random image that is not read right."""
    rng = np.random.default_rng(seed)
    wrong = []
    for _ in range(images):
        scene = random_scene(rng, shapes)
        image = draw(scene, rng)
        found = judge(change(image, rng) if change else image, scene)
        wrong += [f"{found}: {scene.caption()}"] if found else []
    return wrong


def test_single_shapes_are_read(seed: int) -> None:
    wrong = misread(seed, 1, 150)
    assert len(wrong) <= 0.01 * 150, wrong


def test_two_shapes_are_read(seed: int) -> None:
    wrong = misread(seed, 2, 100)
    assert len(wrong) <= 0.03 * 100, wrong


def test_slightly_degraded_shapes_are_read(seed: int) -> None:
    wrong = misread(seed, 1, 100, degraded)
    assert len(wrong) <= 0.05 * 100, wrong


def test_touching_shapes_of_one_colour_are_two(seed: int) -> None:
    left, right = Shape("large", "red", "circle", "at the left"), Shape("large", "red", "ring", "at the right")
    pair = Scene((left, right), "blue")
    image = draw(pair, np.random.default_rng(seed)).copy()
    image[31:33, 16:38] = COLOURS["red"]  # a bridge
    assert judge(image, pair) == []


@pytest.mark.parametrize(
    ("attribute", "options"),
    [("size", RADII), ("colour", COLOURS), ("kind", KINDS), ("place", PLACES), ("background", COLOURS)],
)
@pytest.mark.parametrize("shapes", [1, 2])
def test_each_wrong_attribute_is_named(attribute: str, options: Any, shapes: int, seed: int) -> None:
    """An image that differs from its caption in one attribute of one shape has exactly that mistake."""
    rng = np.random.default_rng(seed)
    for option in options:
        asked = random_scene(rng, shapes)
        drawn = changed(asked, attribute, option)
        if drawn is not None:
            assert judge(draw(drawn, rng), asked) == [attribute], f"{drawn.caption()}, asked for {asked.caption()}"


def changed(scene: Scene, attribute: str, value: str) -> Scene | None:
    """The scene with another value of one attribute; None where that is the same scene or not a possible one."""
    if attribute == "background":
        possible = value != scene.background and all(s.colour != value for s in scene.shapes)
        return replace(scene, background=value) if possible else None
    first, *others = scene.shapes
    other = replace(first, **{attribute: value})
    if other == first or other.colour == scene.background or any(apart(other, s) < 30 for s in others):
        return None
    return replace(scene, shapes=(other, *others))


def apart(one: Shape, other: Shape) -> float:
    return float(np.hypot(*np.subtract(PLACES[one.place], PLACES[other.place])))


def test_swapped_colours_of_two_shapes_are_two_mistakes(seed: int) -> None:
    left, right = Shape("large", "red", "star", "at the left"), Shape("large", "green", "star", "at the right")
    swapped = Scene((replace(left, colour="green"), replace(right, colour="red")), "white")
    found = judge(draw(swapped, np.random.default_rng(seed)), Scene((left, right), "white"))
    assert len(found) == 2 and set(found) <= {"colour", "place"}


def test_a_missing_or_extra_shape_is_a_wrong_count(seed: int) -> None:
    rng = np.random.default_rng(seed)
    double = random_scene(rng, 2)
    for shape in double.shapes:
        single = Scene((shape,), double.background)
        assert judge(draw(double, rng), single) == ["count"]
        assert judge(draw(single, rng), double) == ["count"]
    assert judge(draw(Scene((), "blue"), rng), SCENE) == ["count"]


@pytest.mark.parametrize("colour", [(220, 40, 40), (250, 225, 60), (128, 128, 128)])
def test_a_small_extra_blob_is_a_wrong_count(colour: tuple[int, int, int], seed: int) -> None:
    image = draw(SCENE, np.random.default_rng(seed)).copy()
    image[50:54, 50:54] = colour
    assert judge(image, SCENE) == ["count"]


def test_a_speck_is_forgiven(seed: int) -> None:
    image = draw(SCENE, np.random.default_rng(seed)).copy()
    image[50:52, 50:52] = 255
    assert judge(image, SCENE) == []


IMPOSTORS: dict[str, Callable[[NDArray[Any], NDArray[Any]], NDArray[np.bool_]]] = {
    "diamond": lambda u, v: np.abs(u) + np.abs(v) < 1.1,
    "triangle on its head": lambda u, v: np.maximum(-v, 0.866 * np.abs(u) + 0.5 * v) < 0.54,
    "half disc": lambda u, v: (np.hypot(u, v) < 1) & (v < 0),
    "long ellipse": lambda u, v: np.hypot(u, v / 0.7) < 1,
    "thin cross": lambda u, v: (np.maximum(np.abs(u), np.abs(v)) < 1) & (np.minimum(np.abs(u), np.abs(v)) < 0.2),
    "slanted cross": lambda u, v: (np.abs(u) + np.abs(v) < 1.3) & (np.abs(np.abs(u) - np.abs(v)) < 0.45),
    "broken ring": lambda u, v: (np.abs(np.hypot(u, v) - 0.775) < 0.225) & ~((np.abs(v) < 0.3) & (u > 0)),
    "disc with a small hole": lambda u, v: (np.hypot(u, v) < 1) & (np.hypot(u, v) > 0.3),
    "L": lambda u, v: (np.maximum(np.abs(u), np.abs(v)) < 0.82) & ~((u > 0) & (v < 0)),
    "smeared blob": lambda u, v: np.hypot(u, v) < 0.8 + 0.25 * np.cos(3 * np.arctan2(v, u) + 1) + 0.2 * u,
}


@pytest.mark.parametrize("radius", [8.5, 14.0])
@pytest.mark.parametrize("name", IMPOSTORS)
def test_what_is_no_kind_is_not_read_as_one(name: str, radius: float, seed: int) -> None:
    rows, columns = (np.indices((512, 512)) + 0.5) / 8
    inside = IMPOSTORS[name]((columns - 32.2) / radius, (rows - 31.7) / radius)
    coverage = inside.reshape(64, 8, 64, 8).mean(axis=(1, 3))[..., np.newaxis]
    sharp = np.rint(coverage * COLOURS["green"] + (1 - coverage) * COLOURS["white"]).astype(np.uint8)
    for image in (sharp, degraded(sharp, np.random.default_rng(seed))):
        assert not {shape.kind for shape in read(image).shapes} & set(KINDS)


def test_a_shape_of_two_colours_is_wrong(seed: int) -> None:
    square = Scene((Shape("large", "red", "square", "in the center"),), "white")
    image = draw(square, np.random.default_rng(seed)).copy()
    red = np.abs(image.astype(int) - COLOURS["red"]).sum(axis=2) == 0
    image[red & (np.indices((64, 64))[1] > 32)] = COLOURS["orange"]
    assert judge(image, square)


def test_two_shapes_are_paired_with_the_fewest_mistakes() -> None:
    one, other = Seen("small", "red", "ring", "at the top", 0.9), Seen("large", "blue", "cross", "at the bottom", 0.9)
    asked: list[Words] = [("large", "blue", "star", "at the bottom"), ("small", "red", "ring", "at the left")]
    assert mistakes(Reading("white", (one, other)), "black", asked) == ["background", "kind", "place"]
    assert mistakes(Reading("white", (other, one)), "white", asked) == ["kind", "place"]
    assert mistakes(Reading("white", (one,)), "black", asked) == ["background", "count"]


def test_an_image_of_noise_is_read_as_anything_but_a_scene(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert judge(noise, SCENE)


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        read(np.zeros((64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="64"):
        read(np.zeros((32, 32, 3), np.uint8))


def test_the_checker_shares_nothing_with_the_drawing_code() -> None:
    tree = ast.walk(ast.parse(inspect.getsource(checker)))
    imported = {name for node in tree for name in imports(node)}
    assert imported <= {"__future__", "collections", "dataclasses", "functools", "itertools", "math", "numpy"}
    assert checker.PALETTE == COLOURS and checker.RADIUS == RADII and checker.PLACES == PLACES
    assert tuple(checker.AREA) == KINDS


def imports(node: ast.AST) -> list[str]:
    """The top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [str(node.module).split(".")[0]] if isinstance(node, ast.ImportFrom) else []
