"""`python -m bench quality`: does the picture show what the caption says?

The captions are combinations that training never showed. An independent checker reads colour, shape, size, place and
background back from the pixels, and the parallel modes are held against the sequential pictures of the same seeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.checker import mistakes, read
from bench.run import drift, median, psnr, quantile
from engines.errors import ParameterError
from export.shapes.data import Scene, random_scene
from runtime.pipeline import Pipeline, Result

BATCH = 8


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
    images: int, shapes: int, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per mode; `caption_accuracy` is the share of pictures that are right in every attribute."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    if model != "shapes":
        raise ParameterError("model", f"the checker knows the pictures of 'shapes' only, not those of {model!r}")
    pipeline = Pipeline.load(model, devices, build)
    asked = scenes(shapes, images, seed)
    rows = []
    references: list[Result] = []
    for mode in modes:
        results = []
        for start in tqdm(range(0, images, BATCH), desc=f"{mode}, {shapes} shapes", unit="batch"):
            prompts = [scene.caption() for scene in asked[start : start + BATCH]]
            results.append(
                pipeline.generate(
                    prompts, mode=mode, k=k, num_inference_steps=steps, guidance_scale=guidance_scale, seed=seed + start
                )
            )
        references = references or results
        pictures = [picture for result in results for picture in result.images]
        wrong = [wrong_attributes(picture, scene) for picture, scene in zip(pictures, asked, strict=True)]
        report = results[0].report
        against = list(zip(results, references, strict=True))
        drifts = [
            drift(a, b)
            for one, other in against
            for a, b in zip(one.latents, other.latents, strict=True)
        ]  # fmt: skip
        rows.append(
            {
                "model": report.model, "mode": mode, "scheduler": report.scheduler, "steps": steps, "k": report.k,
                "lanes": report.lanes, "devices": report.devices, "guidance_scale": guidance_scale,
                "rounds": report.rounds, "evaluations": report.evaluations, "shapes": shapes, "images": images,
                "captions": "held-out combinations of colour, shape and place", "seed": seed,
                "caption_accuracy": round(sum(not w for w in wrong) / images, 4),
                "wrong": dict(Counter(name for names in wrong for name in names).most_common()),
                "compared_with": modes[0],
                "drift": {"median": median(drifts), "p90": quantile(drifts, 0.9)},
                "psnr": {"median": median([psnr(one, other) for one, other in against])},
            }
        )  # fmt: skip
    pipeline.close()
    return rows


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
