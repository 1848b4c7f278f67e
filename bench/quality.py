"""`python -m bench quality`: does the picture show what the caption says?

The captions are combinations that training never showed. An independent checker reads colour, shape, size, place and
background back from the pixels, and the parallel modes are held against the sequential pictures of the same seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.checker import mistakes, read
from bench.contact_sheet import contact_sheet
from bench.run import drift, median, psnr, quantile
from engines.errors import ParameterError
from export.shapes.data import Scene, random_scene
from runtime.pipeline import Pipeline, Result

BATCH = 8  # captions per call
SHEET_ROWS = 6


def scenes(shapes: int, count: int, seed: int) -> list[Scene]:
    """Random held-out scenes with one or two shapes each."""
    rng = np.random.default_rng((seed, shapes))
    return [random_scene(rng, shapes, held_out=True) for _ in range(count)]


def wrong_attributes(picture: Any, scene: Scene) -> list[str]:
    """What the checker finds wrong in a picture of a scene."""
    words = [(s.size, s.colour, s.kind, s.place) for s in scene.shapes]
    return mistakes(read(np.asarray(picture)), scene.background, words)


def quality(
    model: str, build: Path, devices: str, modes: Sequence[str], k: int | None, steps: int, guidance_scale: float,
    images: int, shapes: Sequence[int], seed: int, pictures: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per number of shapes and mode, compared with the first mode; `pictures` is a contact sheet to write."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    if model != "shapes":
        raise ParameterError("model", f"the checker knows the pictures of 'shapes' only, not those of {model!r}")
    pipeline = Pipeline.load(model, devices, build)
    rows = []
    for count in shapes:
        asked = scenes(count, images, seed)
        drawn = []
        for mode in modes:
            options = {"mode": mode, "k": k, "num_inference_steps": steps, "guidance_scale": guidance_scale}
            drawn.append(Drawn.of(pipeline, asked, seed, options))
            rows.append(drawn[-1].row(drawn[0], count, seed))
        if pictures and count == shapes[0]:
            captions = [scene.caption() for scene in asked[:SHEET_ROWS]]
            contact_sheet(pictures, modes, captions, [d.pictures for d in drawn], [d.wrong for d in drawn])
    pipeline.close()
    return rows


@dataclass(frozen=True)
class Drawn:
    """The pictures of one mode, in the order of the scenes, and what the checker found wrong in each."""

    results: list[Result]
    wrong: list[list[str]]

    @classmethod
    def of(cls, pipeline: Pipeline, asked: Sequence[Scene], seed: int, options: dict[str, Any]) -> Drawn:
        """Draws every scene, several captions per call."""
        results = []
        for start in tqdm(range(0, len(asked), BATCH), desc=options["mode"], unit="batch"):
            captions = [scene.caption() for scene in asked[start : start + BATCH]]
            results.append(pipeline.generate(captions, seed=seed + start, **options))
        pictures = [picture for result in results for picture in result.images]
        return cls(results, [wrong_attributes(p, scene) for p, scene in zip(pictures, asked, strict=True)])

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures in order."""
        return [picture for result in self.results for picture in result.images]

    def row(self, reference: Drawn, shapes: int, seed: int) -> dict[str, Any]:
        """`caption_accuracy` is the share of pictures that are right in every attribute."""
        report = self.results[0].report
        keep = ("model", "mode", "scheduler", "steps", "k", "lanes", "devices", "guidance_scale", "rounds",
                "evaluations")  # fmt: skip
        latents = [np.concatenate([r.latents for r in drawn.results]) for drawn in (self, reference)]
        drifts = [drift(a, b) for a, b in zip(*latents, strict=True)]
        likeness = [psnr([a], [b]) for a, b in zip(self.pictures, reference.pictures, strict=True)]
        return {
            **{key: report.to_dict()[key] for key in keep},
            "shapes": shapes,
            "images": len(self.wrong),
            "captions": "held-out combinations of colour, shape and place",
            "seed": seed,
            "caption_accuracy": round(sum(not wrong for wrong in self.wrong) / len(self.wrong), 4),
            "wrong": dict(Counter(name for wrong in self.wrong for name in wrong).most_common()),
            "compared_with": reference.results[0].report.mode,
            "drift": {"median": median(drifts), "p90": quantile(drifts, 0.9)},
            "psnr": {"median": median(likeness)},
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | shapes | rounds | right in every attribute | drift, median (p90) | wrong |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        wrong = ", ".join(f"{name} {count}" for name, count in row["wrong"].items()) or "none"
        drifts = row["drift"]
        lines.append(
            f"| {row['mode']}, k = {row['k']} | {row['shapes']} | {row['rounds']} "
            f"| {100 * row['caption_accuracy']:.1f} % of {row['images']} "
            f"| {drifts['median']:.3f} ({drifts['p90']:.3f}) | {wrong} |"
        )
    return "\n".join(lines)
