"""`python -m bench robustness`: whether mode `auto` keeps its tolerance on captions that calibration never saw.

For every scheduler, number of steps and guidance, candidates are calibrated on the model's examples, as `make engines`
does, and then draw other captions with other noise. A row has what calibration said of each candidate and how far its
other images ended up, so that any rule can be judged by it: `auto` may only play what its rule lets through.

Every row is stored in `build/bench` as soon as it is measured, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.models import model_arguments, prompts
from bench.quality import WORK, code_hash
from engines.errors import ParameterError
from engines.files import written_whole
from runtime.auto import SAME_PSNR, Candidate, Drift, Setting, candidates
from runtime.calibrate import calibration_prompts, distances
from runtime.pipeline import Pipeline
from runtime.sampling.schedulers import SCHEDULERS, make_schedule

STEPS = (10, 20, 50, 100)
GUIDANCE = (1.0, 4.0, 7.5, 12.0)
TOLERANCES = (None, 0.003, 0.01, 0.03)
CALIBRATED = 16  # images, as `python -m runtime.calibrate` has them
HOPELESS = 0.1  # no rule lets a candidate through whose calibration was further off in the median
SEED = 1000


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--images", type=int, default=24, help="other captions per setting")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, help="default: all that the model can play")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=GUIDANCE)


def measure(
    model: str, build: Path, devices: str, images: int, schedulers: Sequence[str] | None = None,
    steps: Sequence[int] = STEPS, guidance: Sequence[float] = GUIDANCE,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per setting."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    pipeline = Pipeline.load(model, devices, build)
    try:
        playable = [name for name in schedulers or SCHEDULERS if schedulers or _plays(pipeline, name)]
        settings = list(product(playable, steps, guidance))
        return [_row(pipeline, images, *setting) for setting in tqdm(settings, desc="robustness", unit="setting")]
    finally:
        pipeline.close()


def _plays(pipeline: Pipeline, scheduler: str) -> bool:
    """Whether the model has such a schedule, of steps that are short enough to be drafted."""
    try:
        return make_schedule(pipeline.manifest, scheduler, STEPS[0]).draftable
    except ParameterError:
        return False


def _row(pipeline: Pipeline, images: int, scheduler: str, steps: int, guidance: float) -> dict[str, Any]:
    manifest = pipeline.manifest
    identity = [manifest.source, pipeline.devices, code_hash(), images, CALIBRATED, scheduler, steps, guidance]
    key = hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]
    path = WORK / f"robustness-{key}.json"
    if path.is_file():
        row: dict[str, Any] = json.loads(path.read_text())
        return row

    def measured(captions: Sequence[str], wanted: Sequence[Candidate], seed: int) -> dict[Candidate, dict[str, Any]]:
        return {
            candidate: {"drift": [float(f"{value:.3g}") for value in apart], "psnr": np.round(decibels, 1).tolist()}
            for candidate, apart, decibels in distances(pipeline, captions, steps, guidance, scheduler, wanted, seed)
        }

    calibrated = measured(calibration_prompts(pipeline, CALIBRATED), candidates(), 0)
    hopeful = [candidate for candidate, found in calibrated.items() if np.median(found["drift"]) <= HOPELESS]
    other = measured(prompts(manifest, images), hopeful, SEED) if hopeful else {}
    row = {
        "model": manifest.model, "scheduler": scheduler, "steps": steps, "guidance_scale": guidance, "images": images,
        "candidates": [candidate.model_dump() | {"calibration": found, "other": other.get(candidate)}
                       for candidate, found in calibrated.items()],
    }  # fmt: skip
    WORK.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(row) + "\n")
    return row


def kept(row: dict[str, Any], tolerance: float | None) -> list[tuple[str, np.ndarray]]:
    """What may be played at a tolerance by the rule of `auto`, and how much of it other images use: over 1 misses."""
    setting = Setting(eta=0.0, **{name: row[name] for name in ("scheduler", "steps", "guidance_scale")})
    found = []
    for one in row["candidates"]:
        candidate = Candidate(**{name: one[name] for name in ("mode", "k", "drafts")})
        calibration, other = one["calibration"], one["other"]
        drift = Drift.of(setting, candidate, *(np.asarray(calibration[name]) for name in ("drift", "psnr")))
        if other is not None and drift.within(tolerance):
            if tolerance is None:  # as a ratio of errors: 6 dB more is half as far
                used = 10 ** ((SAME_PSNR - np.asarray(other["psnr"])) / 20)
            else:
                used = np.asarray(other["drift"]) / tolerance
            found.append((f"{candidate.mode}, k = {candidate.k}", used))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per scheduler and tolerance: what was let through, and how far other images were within it."""
    heads = ["scheduler", "tolerance", "settings with a plan", "plans", "other images", "within", "p99 / tolerance",
             "worst / tolerance", "plans outside"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    names = list(dict.fromkeys(row["scheduler"] for row in rows))
    for name, tolerance in [*product(names, TOLERANCES), *product(["all"], TOLERANCES)]:
        plans = [kept(row, tolerance) for row in rows if name in (row["scheduler"], "all")]
        used = [used for found in plans for _, used in found]
        there = np.concatenate(used) if used else np.zeros(0)
        bound = f"{SAME_PSNR:g} dB" if tolerance is None else f"{tolerance:g}"
        cells = [name, bound, f"{sum(map(bool, plans))} of {len(plans)}", str(len(used)), str(len(there))]
        if len(there):
            outside = sum(bool(np.quantile(one, 0.9) > 1) for one in used)
            cells += [
                f"{100 * np.mean(there <= 1):.2f} %",
                f"{np.quantile(there, 0.99):.2f}",
                f"{there.max():.2f}",
                str(outside),
            ]
        lines.append(f"| {' | '.join(cells + [''] * (len(heads) - len(cells)))} |")
    return "\n".join(lines)
