"""`python -m bench speculative`: rounds of exact sampling by speculation, on `shapes` and simulated for larger latents.

Images are drawn with every k, number of steps and kind of drafts; captions that are right stand beside those of the
sequential sampler. Rounds depend on ‖Δ‖ alone, how far a draft's mean is off in units of the step's noise: a draft is
kept with the chance 2Φ(−‖Δ‖/2). For latents of d numbers with the same error in each, ‖Δ‖ grows with √d; so the rounds
of larger latents are simulated from what was measured here.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.models import model_arguments, scenes
from bench.quality import Case, Gallery, compare, read_back
from engines.base import Backend, Rows
from engines.errors import ParameterError
from runtime.pipeline import Pipeline
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule
from runtime.sampling.speculative import Speculation

CELLS = ((50, 4.0), (50, 1.0), (100, 4.0), (200, 4.0))  # steps, guidance
KS = (2, 4, 8)
SCHEDULERS = ("ddpm", "euler_a", "dpm++2m_sde")
STEPS = tuple(dict.fromkeys(steps for steps, _ in CELLS))
LATENTS = {"SD 1.5, 512²": 4 * 64 * 64, "SDXL, 1024²": 4 * 128 * 128}
CHAINS = 400
Shifts = Mapping[tuple[int, int], list[float]]  # ‖Δ‖ by step and place in the round


@dataclass
class Recorder:
    """‖Δ‖ of every draft that was measured, by step and by its place in the round."""

    backend: Backend
    schedule: Schedule
    shifts: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))

    def __enter__(self) -> Recorder:
        measured = self.backend.inner_products

        def noting(products: Sequence[tuple[Sequence[str], Rows]]) -> list[float]:
            found = measured(products)
            for place, (sources, _) in enumerate(products):
                step = next(int(slot.split()[1]) for slot in sources if slot.startswith("fresh "))
                shift = math.sqrt(found[3 * place + 1]) / self.schedule.rows[step].fresh
                self.shifts[step, place].append(shift)
            return found

        vars(self.backend)["inner_products"] = noting
        return self

    def __exit__(self, *error: object) -> None:
        del vars(self.backend)["inner_products"]


def simulated_rounds(shifts: Shifts, schedule: Schedule, k: int, scale: float) -> float:
    """Expected rounds when every ‖Δ‖ is `scale` times what was measured at its step and place."""
    generator, rounds = np.random.default_rng(0), Speculation(schedule, Options(k=k))
    chance = {
        key: [math.erfc(scale * shift / math.sqrt(8)) for shift in found] for key, found in shifts.items()
    }  # 2Φ(−‖Δ‖/2)

    @cache
    def nearest(step: int, place: int) -> list[float]:
        """Of the step that was measured at this place and lies nearest: no image may have begun a round before it."""
        return chance[min((abs(key[0] - step), key) for key in chance if key[1] == place)[1]]

    played = 0
    for _ in range(CHAINS):
        i = 0
        while i < schedule.steps:
            taken, ahead = 1, rounds.position(i).ahead
            while taken <= ahead and generator.random() < generator.choice(nearest(i + taken - 1, taken - 1)):
                taken += 1
            i, played = i + taken, played + 1
    return played / CHAINS


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--images", type=int, default=16, help="captions per row")
    parser.add_argument("--seed", type=int, default=0, help="which captions")
    parser.add_argument("--steps", type=int, nargs="+", choices=STEPS, default=STEPS, help="of the scheduler")
    parser.add_argument(
        "--schedulers", nargs="+", choices=SCHEDULERS, default=SCHEDULERS, help="all but ddpm: 50 steps"
    )


def measure(
    model: str, build: Path, devices: str, images: int, seed: int, steps: Sequence[int] = STEPS,
    schedulers: Sequence[str] = SCHEDULERS,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per cell, k and kind of drafts; the sequential one of each cell first."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    gallery = Gallery(build, model, devices, seed)
    wanted = [
        (scheduler, *cell, k, drafts)
        for scheduler in schedulers
        for cell in (CELLS if scheduler == SCHEDULERS[0] else CELLS[:1])
        if cell[0] in steps
        for k, drafts in [(1, ""), *((k, "corrected") for k in KS), *([(4, "frozen")] if cell == CELLS[0] else [])]
    ]
    try:
        return [_row(gallery, images, *one) for one in tqdm(wanted, desc="speculative", unit="row")]
    finally:
        gallery.close()


def _row(
    gallery: Gallery, images: int, scheduler: str, steps: int, guidance_scale: float, k: int, drafts: str
) -> dict[str, Any]:
    mode, options = ("speculative", {"k": k, "drafts": drafts}) if drafts else ("sequential", {})
    name = f"speculative, k = {k}, {drafts}" if drafts else "sequential"
    case = Case(name, "", images, mode, options, steps=steps, reference_steps=steps, guidance_scale=guidance_scale,
                scheduler=scheduler)  # fmt: skip
    if gallery.devices not in gallery.pipelines:
        gallery.pipelines[gallery.devices] = Pipeline.load(gallery.model, gallery.devices, gallery.build)
    pipeline = gallery.pipelines[gallery.devices]
    schedule = make_schedule(pipeline.manifest, scheduler, steps)
    reference = gallery.reference(case)
    with Recorder(pipeline.backend, schedule) as recorder:  # drawn now: a row from the work folder measures nothing
        drawn = gallery.draw(case) if drafts else reference
    row = compare(case, drawn, reference, gallery.seed) | read_back(drawn.images, scenes(1, images, gallery.seed))
    keep = ("name", "model", "mode", "scheduler", "steps", "k", "drafts", "guidance_scale", "rounds", "evaluations",
            "images", "seed", "caption_accuracy", "devices", "drift")  # fmt: skip
    found = {key: row[key] for key in keep}
    found["speedup_in_rounds"] = round(steps / row["rounds"], 3)
    if drafts and recorder.shifts:
        ahead: dict[int, list[float]] = defaultdict(list)
        for (_, place), shifts in recorder.shifts.items():
            ahead[place] += [math.erfc(shift / math.sqrt(8)) for shift in shifts]
        found["chance_by_place"] = [round(float(np.mean(ahead[place])), 4) for place in sorted(ahead)]
        size = math.prod(pipeline.latent_shape)
        scales = {model: math.sqrt(numbers / size) for model, numbers in LATENTS.items()}
        found["simulated_rounds"] = {
            model: round(simulated_rounds(recorder.shifts, schedule, k, scale), 2)
            for model, scale in ({"here": 1.0} | scales).items()
        }
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rounds measured here and simulated on larger latents."""
    heads = ["scheduler", "steps", "guidance", "", "rounds", "evaluations", "speed-up in rounds", "right captions",
             "kept, by place in the round", *(f"rounds, {name} (simulated)" for name in LATENTS)]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        chances, simulated = row.get("chance_by_place", ()), row.get("simulated_rounds", {})
        cells = [row["scheduler"], str(row["steps"]), f"{row['guidance_scale']:g}", row["name"], f"{row['rounds']:g}",
                 f"{row['evaluations']:g}", f"{row['speedup_in_rounds']:.2f}", f"{100 * row['caption_accuracy']:.0f} %",
                 " ".join(f"{chance:.2f}" for chance in chances),
                 *(f"{simulated[name]:.0f}" if name in simulated else "" for name in LATENTS)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
