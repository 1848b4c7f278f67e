"""Predictions held against measurement, on the lanes of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.models import lane_names, prompts
from bench.simulation.costs import MeasuredCosts, measured_costs
from bench.simulation.predict import MODES, options
from bench.statistics import ratio
from engines.base import Backend, LaneCall
from engines.null import NullBackend
from runtime.auto import rehearse
from runtime.call import Call
from runtime.pipeline import Pipeline
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule


@cache
def _shapes(mode: str, schedule: Schedule, chosen: Options, lanes: int, guidance_scale: float) -> frozenset[Any]:
    """The sums of a plan."""
    seen = set()

    class Noting(MeasuredCosts):
        def round(self, calls: Sequence[LaneCall]) -> float:
            return 0.0

        def combine(self, sources: int, targets: int) -> float:
            seen.add((sources, targets))
            return 0.0

    rehearse(mode, chosen, schedule, guidance_scale, NullBackend(lanes, Noting()))
    return frozenset(seen)


@dataclass
class Recorder:
    """The distances that a sampler measured in its last image."""

    backend: Backend
    answers: list[float] = field(default_factory=list)

    def __enter__(self) -> Recorder:
        measured = self.backend.distances

        def noting(pairs: Sequence[tuple[str, str]]) -> list[float]:
            found = measured(pairs)
            self.answers += found
            return found

        vars(self.backend)["distances"] = noting
        return self

    def __exit__(self, *error: object) -> None:
        del vars(self.backend)["distances"]


def validate(
    pipeline: Pipeline, steps: int, guidance_scales: Sequence[float], passes: int, tolerance: float
) -> list[dict[str, Any]]:
    """Prediction against measurement on lanes: in every pass the costs, an image per sampler, the costs again."""
    lanes, schedule = len(pipeline.devices), make_schedule(pipeline.manifest, None, steps)
    cases = [(mode, scale) for scale in guidance_scales for mode in MODES]
    chosen = {mode: options(mode, max(lanes, 2), split=False, tolerance=tolerance) for mode in MODES}
    shapes = {s for mode, scale in cases for s in _shapes(mode, schedule, chosen[mode], lanes, scale)}
    found: dict[tuple[str, float], list[tuple[float, float, int]]] = {case: [] for case in cases}

    def costs_now() -> MeasuredCosts:
        pipeline.run(Call(asked[0], mode="sequential", num_inference_steps=1))  # binds an image
        return measured_costs(pipeline.backend, shapes)

    asked = prompts(pipeline.manifest, passes + 1)
    for number in tqdm(range(passes + 1), desc=f"validation on {lane_names(pipeline)}", unit="pass"):
        costs, images = costs_now(), []
        for mode, scale in cases:
            option = chosen[mode]
            with Recorder(pipeline.backend) as recorder:
                call = Call(
                    asked[number], mode=mode, k=option.k, drafts=option.drafts, tolerance=option.tolerance,
                    iterations=option.iterations, num_inference_steps=steps, guidance_scale=scale, seed=number,
                )  # fmt: skip
                report = pipeline.run(call).report
            images.append((mode, scale, recorder.answers, report))
        costs = costs.mean(costs_now())
        for mode, scale, answers, report in images:
            null = NullBackend(lanes, costs, iter(answers))
            counts = rehearse(mode, chosen[mode], schedule, scale, null)
            assert counts.rounds == report.rounds, "the prediction plays another plan than the engine"
            if number:  # the first pass warms up
                found[mode, scale].append((null.seconds, report.seconds["denoise"], counts.rounds))
    rows = []
    for (mode, scale), several in found.items():
        predicted, measured, rounds = zip(*several, strict=True)
        against = ratio(predicted, measured)
        rows.append({
            "kind": "validation", "model": pipeline.manifest.model, "devices": lane_names(pipeline), "lanes": lanes,
            "mode": mode, "k": chosen[mode].k, "guidance_scale": scale, "steps": steps,
            "rounds": float(np.median(rounds)), "images": passes,
            "predicted_seconds": round(float(np.median(predicted)), 5),
            "measured_seconds": round(float(np.median(measured)), 5),
            "error": {name: round(value - 1, 4) for name, value in against.items()},
        })  # fmt: skip
    return [*rows, _cost_row(pipeline, costs)]


def _cost_row(pipeline: Pipeline, costs: MeasuredCosts) -> dict[str, Any]:
    """The last table, for people to read, with plain copies beside it."""
    copies = {}
    for size in (1 << 12, 1 << 15, 1 << 17, 1 << 19, 1 << 22):
        source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
        taken = []
        for _ in range(50):
            start = time.perf_counter()
            np.copyto(target, source)
            taken.append(time.perf_counter() - start)
        copies[size] = float(f"{np.median(taken):.4g}")
    return {
        "kind": "costs", "model": pipeline.manifest.model, "devices": lane_names(pipeline),
        "latent_bytes": int(4 * np.prod(pipeline.latent_shape)),
        "call_seconds": {busy: {b: float(f"{s:.5g}") for b, s in one.items()} for busy, one in costs.calls.items()},
        "launch_seconds": {busy: float(f"{s:.4g}") for busy, s in costs.launch.items()},
        "sum_seconds": {f"{a}→{b}": float(f"{s:.4g}") for (a, b), s in sorted(costs.sums.items())},
        "distance_seconds": float(f"{costs.distance:.4g}"), "host_copy_seconds": copies,
    }  # fmt: skip


def record(pipeline: Pipeline, steps: Sequence[int], ks: Iterable[int]) -> dict[tuple[int, int], list[float]]:
    """What `adaptive` measures on a real image, for predictions on machines that are not here."""
    (prompt,), found = prompts(pipeline.manifest, 1), {}
    for count in steps:
        for k in sorted(set(ks)):
            option = options("adaptive", k, split=False)
            with Recorder(pipeline.backend) as recorder:
                call = Call(
                    prompt, mode="adaptive", k=k, tolerance=option.tolerance, drafts=option.drafts,
                    num_inference_steps=count,
                )  # fmt: skip
                pipeline.run(call)
            found[count, k] = recorder.answers
    return found
