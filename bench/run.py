"""`python -m bench run`: seconds of the denoising loop, every sampler beside its floor and beside the alternatives.

All configurations are interleaved picture by picture, so that what else the machine does hits them alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.floor import replay
from engines.base import Array
from engines.errors import ParameterError
from engines.host import HostBackend
from export.shapes.data import Scene, random_scene
from runtime.pipeline import Pipeline, Result
from runtime.report import load_average

PAUSE = 0.02  # seconds between measurements: threads of the last session stop spinning


@dataclass
class Configuration:
    """One way to make the same picture, and what was measured of it."""

    name: str
    pipeline: Pipeline
    mode: str
    k: int
    steps: int
    guidance_scale: float
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    overhead_us: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    last: Result | None = None

    def measure(self, prompt: str, seed: int, reference: Result | None) -> Result:
        """One picture and one replay of its calls."""
        time.sleep(PAUSE)
        result = self.pipeline.generate(
            prompt, mode=self.mode, k=self.k, num_inference_steps=self.steps, guidance_scale=self.guidance_scale,
            seed=seed,
        )  # fmt: skip
        time.sleep(PAUSE)
        backend = self.pipeline.backend
        assert isinstance(backend, HostBackend), "the replay is of lanes in host memory"
        self.floor_seconds.append(replay(backend))
        self.seconds.append(result.report.seconds["denoise"])
        self.overhead_us.append(result.report.overhead_us_per_round or 0.0)
        if reference is not None:
            self.drift.append(drift(result.latents, reference.latents))
            self.psnr.append(psnr(result.images, reference.images))
        self.last = result
        return result

    def forget(self) -> None:
        """Ends the warm-up."""
        for values in (self.seconds, self.floor_seconds, self.overhead_us, self.drift, self.psnr):
            values.clear()

    def row(self, single: Configuration, session: Configuration) -> dict[str, Any]:
        """One row of the result file; speed-ups are against one lane with one thread, and against one session."""
        assert self.last is not None
        report = self.last.report
        keep = ("model", "mode", "scheduler", "steps", "k", "lanes", "devices", "guidance_scale", "guidance_split",
                "drafts", "rounds", "evaluations", "calls")  # fmt: skip
        return {
            "name": self.name,
            **{key: report.to_dict()[key] for key in keep},
            "images": len(self.seconds),
            "seconds": percentiles(self.seconds),
            "floor_seconds": percentiles(self.floor_seconds),
            "share_of_floor": ratio(self.floor_seconds, self.seconds),
            "share_of_rounds": round(self.steps / report.rounds, 3),
            "overhead_us_per_round": round(float(np.median(self.overhead_us)), 1),
            "speedup": ratio(single.seconds, self.seconds),
            "speedup_over_one_session": ratio(session.seconds, self.seconds),
            "drift": {"median": median(self.drift), "p90": quantile(self.drift, 0.9)},
            "psnr": {"median": median(self.psnr)},
        }


def drift(latents: Array, reference: Array) -> float:
    """Relative L2 distance of the finished latents from the sequential ones."""
    return float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))


def psnr(pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio of pictures in dB, capped at 99 where they are equal."""
    pairs = zip(pictures, references, strict=True)
    errors = [np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2) for a, b in pairs]
    return float(min(99.0, 10 * np.log10(255**2 / max(float(np.mean(errors)), 1e-9))))


def median(values: Sequence[float]) -> float | None:
    """The median, six digits; None of nothing."""
    return quantile(values, 0.5)


def quantile(values: Sequence[float], q: float) -> float | None:
    """A quantile, six digits; None of nothing."""
    return float(f"{np.quantile(values, q):.6g}") if values else None


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {f"p{q}": round(float(np.percentile(seconds, q)), 5) for q in (20, 50, 80)}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median of the ratios measured side by side, with a 95 % interval from 2,000 bootstrap samples."""
    ratios = np.divide(above, below)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return {"median": round(float(np.median(ratios)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def configurations(
    model: str, build: Path, devices: str, modes: Sequence[str], k: int | None, steps: int, guidance_scale: float
) -> list[Configuration]:
    """The two baselines first: one lane with one thread, and one session on all cores; then every mode."""
    single, session, parallel = (Pipeline.load(model, name, build) for name in ("cpu@1", "cpu", devices))
    lanes = len(parallel.devices)
    return [
        Configuration("sequential, one lane, one thread", single, "sequential", 1, steps, guidance_scale),
        Configuration("sequential, one session, all cores", session, "sequential", 1, steps, guidance_scale),
        *(Configuration(f"{mode}, {lanes} lanes", parallel, mode, k or lanes, steps, guidance_scale) for mode in modes),
    ]


def run(
    model: str, build: Path, devices: str, modes: Sequence[str], k: int | None, steps: int, guidance_scale: float,
    images: int, warmup: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measures and returns the rows of the result file."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    configs = configurations(model, build, devices, modes, k, steps, guidance_scale)
    rng = np.random.default_rng(0)
    loads = []
    for number in tqdm(range(warmup + images), desc="bench run", unit="picture"):
        if number == warmup:
            for config in configs:
                config.forget()
        scene: Scene = random_scene(rng, 1)
        reference = configs[0].measure(scene.caption(), number, None)
        for config in configs[1:]:
            config.measure(scene.caption(), number, reference)
        loads.append(load_average())
    rows = [config.row(configs[0], configs[1]) for config in configs]
    for row in rows:
        row["load_average"] = round(float(np.median(loads)), 2)
    for pipeline in {id(config.pipeline): config.pipeline for config in configs}.values():
        pipeline.close()
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = "| | rounds | seconds (p20–p80) | × one lane | × one session | of the floor | overhead per round | drift |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        s, drifted = row["seconds"], row["drift"]["median"]
        lines.append(
            f"| {row['name']} | {row['rounds']} | {s['p50']:.3f} ({s['p20']:.3f}–{s['p80']:.3f}) "
            f"| {interval(row['speedup'])} | {interval(row['speedup_over_one_session'])} "
            f"| {row['share_of_floor']['median']:.3f} | {row['overhead_us_per_round']:.0f} µs "
            f"| {'' if drifted is None else format(drifted, '.1e')} |"
        )
    return "\n".join(lines)


def interval(value: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{value['median']:.2f} ({value['low']:.2f}–{value['high']:.2f})"
