"""`python -m bench scenario single-stream|server|offline`: MLPerf-style requests, unofficial.

Modelled on its text-to-image benchmark: every image from the same fixed latents, prompts in random order from a
fixed seed; for SDXL Euler, 20 steps, guidance 8 and its negative prompt, for other models their own scheduler and this
engine's defaults. A performance run, then an accuracy run whose images are compared with sequential ones of the same
latents and checked against the quality window. The MLPerf name is a trademark of MLCommons; these results are not
verified by it, and the short defaults are not those of its rules (`--min-queries 1024 --min-duration 600`).

The output has the layout that its submission tools read, and AIPerf's and perf_analyzer's formats: see
bench/README.md. The exit code is 1 when a request failed or quality is outside the window.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.formats import Folder, Outcome, Request, aiperf
from bench.metrics import Coco, Judges
from bench.models import is_embedded, lane_names, model_arguments, scenes
from bench.models import prompts as named
from bench.statistics import median, quantile
from engines.base import Array
from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.call import MODES, Call, add_options
from runtime.distances import drift, psnr
from runtime.pipeline import Pipeline, Result
from runtime.sampling.noise import gaussian

SCENARIOS = {"single-stream": "SingleStream", "server": "Server", "offline": "Offline"}
SEED = 3066443479025735752  # of the order of prompts and of arrivals


@dataclass(frozen=True)
class Setting:
    """How the images of a benchmark are made and judged; windows are (metric, lowest, highest).

    `judged` are the windows that apply beside when there are judges, weights and images to compare with.
    """

    scheduler: str | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    negative_prompt: str = ""
    windows: tuple[tuple[str, float, float], ...] = (("psnr", 30.0, math.inf),)
    judged: tuple[tuple[str, float, float], ...] = ()
    benchmark: str | None = None


DEFAULTS = {
    "StableDiffusionXLPipeline": Setting(
        "euler", 20, 8.0, "normal quality, low quality, worst quality, low res, blurry, nsfw, nude",
        judged=(("CLIP_SCORE", 31.68631873, 31.81331801), ("FID_SCORE", 23.01085758, 23.95007626)),
        benchmark="stable-diffusion-xl",
    ),
}  # fmt: skip
# of the embedded model's captions that are right when sequential, as many must be right
EMBEDDED = Setting(windows=(("share_of_sequential_accuracy", 0.98, math.inf), ("psnr", 30.0, math.inf)))


# --- load ------------------------------------------------------------------------------------------------------------

Draw = Callable[[Sequence[int]], list[Any]]


@dataclass
class Load:
    """Sends requests and records their outcomes. `draw(prompts)` makes images, one per prompt, or raises."""

    draw: Draw
    order: Sequence[int]
    minimum: int
    min_duration: float
    requests: list[Request] = field(default_factory=list)
    answers: dict[int, Any] = field(default_factory=dict)

    def single_stream(self) -> None:
        """One after another, until count and duration suffice."""
        start = time.perf_counter()
        while len(self.requests) < self.minimum or time.perf_counter() - start < self.min_duration:
            number = len(self.requests)
            now = time.perf_counter() - start
            self._serve(start, [(number, now)])

    def server(self, qps: float) -> None:
        """Poisson arrivals, served first come, first served; latency counts from arrival."""
        gaps = np.random.default_rng(SEED).exponential(1 / qps, 1_000_000)
        arrivals, start = np.cumsum(gaps), time.perf_counter()
        while len(self.requests) < self.minimum or arrivals[len(self.requests)] < self.min_duration:
            number = len(self.requests)
            wait = float(arrivals[number]) - (time.perf_counter() - start)
            if wait > 0:
                time.sleep(wait)
            self._serve(start, [(number, float(arrivals[number]))])

    def offline(self, batch: int) -> None:
        """Everything at once, drawn in batches."""
        start = time.perf_counter()
        while len(self.requests) < self.minimum or time.perf_counter() - start < self.min_duration:
            count = min(batch, max(self.minimum - len(self.requests), 1))
            self._serve(start, [(len(self.requests) + n, 0.0) for n in range(count)])

    def _serve(self, start: float, asked: Sequence[tuple[int, float]]) -> None:
        issued = time.perf_counter() - start
        wanted = [self.order[number % len(self.order)] for number, _ in asked]
        images: list[Any] = [None] * len(asked)
        error: str | None = None
        try:
            images = self.draw(wanted)
        except EngineError as problem:
            error = f"{type(problem).__name__}: {problem}"
        completed = time.perf_counter() - start
        for (number, scheduled), prompt, image in zip(asked, wanted, images, strict=True):
            self.requests.append(Request(number, prompt, scheduled, issued, completed, error))
            self.answers[prompt] = image


# --- accuracy --------------------------------------------------------------------------------------------------------


def quality(
    asked: Sequence[str], results: Sequence[Result], references: Sequence[Result], judges: Judges, *, scenic: bool
) -> dict[str, float | None]:
    """The distance to the sequential images, what judges say, and what share the checker finds right.

    CLIP_SCORE and FID_SCORE are named as in MLPerf's accuracy.txt.
    """
    pairs = list(zip(results, references, strict=True))
    drifts = [drift(a.latents, b.latents) for a, b in pairs]
    found: dict[str, float | None] = {
        "psnr": median([psnr(a.images, b.images) for a, b in pairs]),
        "drift": median(drifts), "drift_p90": quantile(drifts, 0.9),
    }  # fmt: skip
    if judges.metrics:
        images = [result.images[0] for result in results]
        found["CLIP_SCORE"] = float(np.mean(judges.scores(images, asked)["clip"]))
        found["FID_SCORE"] = judges.fid(images)
    if scenic:
        from bench.quality import wrong_attributes

        wanted = scenes(1, len(asked), 0)

        def right(several: Sequence[Result]) -> float:
            return float(np.mean([not wrong_attributes(r.images[0], s) for r, s in zip(several, wanted, strict=True)]))

        own, sequential = right(results), right(references)
        found |= {"caption_accuracy": own, "sequential_caption_accuracy": sequential}
        found["share_of_sequential_accuracy"] = own / sequential if sequential else None
    return found


def outside(found: dict[str, float | None], windows: Sequence[tuple[str, float, float]]) -> list[str]:
    """The metrics outside their windows, in words; an unmeasured metric is outside."""
    wrong = []
    for name, low, high in windows:
        value = found.get(name)
        if value is None:
            wrong.append(f"{name} was not measured, and must be within {low:g} and {high:g}")
        elif not low <= value <= high:
            wrong.append(f"{name} is {value:.5g}, not within {low:g} and {high:g}")
    return wrong


def window(text: str) -> tuple[str, float, float]:
    """NAME:LOW:HIGH; either bound may be missing."""
    try:
        name, low, high = text.split(":")
        return name, float(low or "-inf"), float(high or "inf")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME:LOW:HIGH, like psnr:30:") from None


# --- the command -----------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("scenario", nargs="+", choices=SCENARIOS, help="one or several")
    model_arguments(parser)
    parser.add_argument("--mode", choices=MODES, default="auto")
    add_options(parser, ["k", "tolerance"], {"tolerance": 0.01})
    parser.add_argument("--steps", type=int, help="default: what the benchmark of this model says")
    parser.add_argument("--guidance", type=float, dest="guidance_scale")
    parser.add_argument("--scheduler")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    parser.add_argument("--coco", type=Path, help="folder of MS-COCO: its captions are the prompts, and with --weights")
    parser.add_argument("--weights", type=Path, help="folder of CLIP and FID's Inception: see bench/metrics.py")
    parser.add_argument("--samples", type=int, default=24, help="prompts; 5000 in MLPerf")
    parser.add_argument("--latents", type=Path, help=".npy of unit variance, (1, channels, height, width)")
    parser.add_argument("--min-queries", type=int, default=64)
    parser.add_argument("--min-duration", type=float, default=0.0, help="seconds")
    parser.add_argument("--qps", type=float, help="of server; default: 70 %% of what one image after another gives")
    parser.add_argument("--target-latency", type=float, default=20.0, help="seconds, of server's 99th percentile")
    parser.add_argument("--batch", type=int, default=8, help="images per call of offline")
    parser.add_argument("--window", type=window, action="append", dest="windows", metavar="NAME:LOW:HIGH")
    parser.add_argument("--output", type=Path, default=BUILD / "bench" / "scenario", help="folder of the logs")


def measure(
    scenario: Sequence[str], model: str, build: Path, devices: str, mode: str, k: int | None, tolerance: float,
    steps: int | None, guidance_scale: float | None, scheduler: str | None, negative_prompt: str | None,
    prompts: Path | None, coco: Path | None, weights: Path | None, samples: int, latents: Path | None,
    min_queries: int, min_duration: float, qps: float | None, target_latency: float, batch: int,
    windows: Sequence[tuple[str, float, float]] | None, output: Path,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per scenario, and their folder."""
    for name, value in (("samples", samples), ("min_queries", min_queries), ("batch", batch)):
        if value < 1:
            raise ParameterError(name, f"{name} must be at least 1, not {value}")
    if qps is not None and not 0 < qps < math.inf:
        raise ParameterError("qps", f"qps must be a positive number, not {qps}")
    pipeline = Pipeline.load(model, devices, build)
    try:
        reference = Coco.read(coco, samples, 0) if coco else None
        judges = Judges(("clip", "fid"), weights, reference) if weights else Judges()
        bench = Bench(pipeline, mode, k, tolerance, judges)
        bench.ask(list(reference.captions) if reference else named(pipeline.manifest, samples, file=prompts), latents)
        bench.scenic = is_embedded(pipeline.manifest) and prompts is None and reference is None
        bench.configure(steps, guidance_scale, scheduler, negative_prompt, windows)
        load = (min_queries, min_duration, qps, target_latency, batch)
        return [bench.run(SCENARIOS[name], *load, output) for name in scenario]
    finally:
        pipeline.close()


class Bench:
    """A model, its prompts and its fixed latents; every image that it draws leaves the seconds of its stages."""

    def __init__(self, pipeline: Pipeline, mode: str, k: int | None, tolerance: float, judges: Judges) -> None:
        self.pipeline, self.mode, self.judges = pipeline, mode, judges
        self.options: dict[str, Any] = {"mode": mode}
        self.options |= {"k": k} if k is not None and mode != "auto" else {}
        self.options |= {"tolerance": tolerance} if mode in ("srds", "adaptive") else {}
        self.scenic = False  # whether the checker knows what the prompts ask for
        self.stages: dict[str, list[float]] = {}

    def ask(self, prompts: Sequence[str], latents: Path | None) -> None:
        """What is drawn, and from which noise."""
        self.prompts, self.latents = prompts, self._latents(latents)

    def _latents(self, path: Path | None) -> Array:
        shape = self.pipeline.latent_shape
        if path is None:
            return gaussian(0, 0, 0, shape)[None]
        try:
            given: Array = np.load(path, allow_pickle=False).astype(np.float32)
        except ValueError as error:
            raise ParameterError("latents", f"{path} is no .npy file of numbers ({error})") from None
        if given.shape != (1, *shape):
            raise ParameterError("latents", f"{path} must hold an array of shape {(1, *shape)}, not {given.shape}")
        return given

    def configure(
        self, steps: int | None, guidance_scale: float | None, scheduler: str | None, negative_prompt: str | None,
        windows: Sequence[tuple[str, float, float]] | None,
    ) -> None:  # fmt: skip
        """What is asked for, and else what the benchmark of this family says."""
        manifest = self.pipeline.manifest
        default = EMBEDDED if self.scenic else DEFAULTS.get(manifest.family, Setting())
        given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "scheduler": scheduler,
                 "negative_prompt": negative_prompt, "windows": tuple(windows) if windows else None}  # fmt: skip
        self.setting = replace(default, **{name: value for name, value in given.items() if value is not None})
        if self.judges.metrics and not windows:
            self.setting = replace(self.setting, windows=(*self.setting.windows, *self.setting.judged))
        self.benchmark = self.setting.benchmark or manifest.model

    def draw(self, wanted: Sequence[int], **other: Any) -> list[Result]:
        """One result per prompt, all from the fixed latents."""
        setting = self.setting
        call = Call(
            [self.prompts[n] for n in wanted], latents=self.latents.repeat(len(wanted), 0),
            negative_prompt=setting.negative_prompt, num_inference_steps=setting.num_inference_steps,
            guidance_scale=setting.guidance_scale, scheduler=setting.scheduler, **(other or self.options),
        )  # fmt: skip
        result = self.pipeline.run(call)
        for name, seconds in result.report.seconds.items():
            self.stages.setdefault(name, []).append(seconds)
        each = zip(result.images, result.latents, strict=True)
        return [Result([image], latents[None], result.report) for image, latents in each]

    def run(
        self, scenario: str, minimum: int, min_duration: float, qps: float | None, target_latency: float, batch: int,
        output: Path,
    ) -> dict[str, Any]:  # fmt: skip
        """Warm-up, performance, accuracy; writes the folder and returns the row."""
        size = batch if scenario == "Offline" else 1
        warm = []
        for _ in range(3):
            start = time.perf_counter()
            self.draw([n % len(self.prompts) for n in range(size)])
            warm.append(time.perf_counter() - start)
        self.stages.clear()
        order = np.random.default_rng(SEED).permutation(len(self.prompts)).tolist()
        load = Load(self.draw, order, minimum, min_duration)
        rate = None
        if scenario == "SingleStream":
            load.single_stream()
        elif scenario == "Server":
            rate = qps or 0.7 / float(np.median(warm))
            load.server(rate)
        else:
            load.offline(batch)
        stages = {name: list(values) for name, values in self.stages.items()}
        server = scenario == "Server"
        outcome = Outcome(scenario, load.requests, minimum, min_duration, target_latency if server else None, rate)
        results, references = self._accuracy(size)
        found = quality(self.prompts, results, references, self.judges, scenic=self.scenic)
        wrong = outside(found, self.setting.windows)
        row = self._row(outcome, stages, found, wrong)
        images = [result.images[0] for result in results]
        Folder(output, self.benchmark, scenario).write(self.pipeline, outcome, row, images, stages, SEED)
        return row

    def _accuracy(self, size: int) -> tuple[list[Result], list[Result]]:
        """Every prompt once, and its sequential image."""
        parts = [range(n, min(n + size, len(self.prompts))) for n in range(0, len(self.prompts), size)]
        results, references = [], []
        for part in tqdm(parts, desc="accuracy", unit="call"):
            results += self.draw(part)
            references += self.draw(part, mode="sequential")
        return results, references

    def _row(
        self, outcome: Outcome, stages: dict[str, list[float]], found: dict[str, float | None], wrong: list[str]
    ) -> dict[str, Any]:
        key, value = outcome.metric
        devices = lane_names(self.pipeline)
        config = {**asdict(self.setting), **self.options, "model": self.pipeline.manifest.model, "devices": devices}
        del config["judged"]
        config["windows"] = [[name, *(_bound(b) for b in bounds)] for name, *bounds in self.setting.windows]
        reasons = [f"{name} not met" for name, met in outcome.met.items() if not met]
        failed = len(outcome.failed)
        reasons += [f"{failed} request{'s'[: failed - 1]} failed: {outcome.failed[0].error}"] if failed else []
        return {
            "name": f"{self.benchmark}, {outcome.scenario}", "unofficial": True, "scenario": outcome.scenario,
            "benchmark": self.benchmark, "model": self.pipeline.manifest.model, "devices": devices, "config": config,
            "queries": len(outcome.requests), "failed": len(outcome.failed), "seconds": round(outcome.seconds, 4),
            "metric": {"name": key, "value": value}, "valid": outcome.valid, "reasons": [*reasons, *wrong],
            "target_qps": outcome.target_qps, "target_latency": outcome.target_latency,
            "quality": found, "samples": len(self.prompts), "metrics": aiperf(outcome, config, stages),
            "status": "failed" if outcome.failed or wrong else "passed",
        }  # fmt: skip


def _bound(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


# the short names of what MLPerf's logs say is not met, in words
UNMET = {
    "duration not met": "the run was too short",
    "queries not met": "too few requests were answered",
    "performance not met": "the 99th percentile exceeds the target latency",
    "early_stopping not met": "too few requests, or too many late ones, for 99 % confidence in the percentile "
    "(MLPerf's early stopping)",
}
WORDS = {
    "psnr": "PSNR {:.1f} dB", "drift": "drift {:.1e}", "drift_p90": "drift p90 {:.1e}",
    "caption_accuracy": "{:.1%} of captions right", "sequential_caption_accuracy": "{:.1%} sequentially",
    "share_of_sequential_accuracy": "{:.0%} of the sequential share",
    "CLIP_SCORE": "CLIP score {:.2f}", "FID_SCORE": "FID {:.2f}",
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per scenario, and what its columns mean; unofficial."""
    lines = ["| unofficial, MLPerf-style | mode, devices | requests | result | latency p50 / p90 / p99 "
             "| quality | verdict |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        value, latency = row["metric"], row["metrics"].get("request_latency")
        shown = f"{value['value'] / 1e6:.0f} ms (90th percentile)" if value["name"].endswith("(ns)") else (
            f"{value['value']:.2f} images per second"
        )  # fmt: skip
        tail = " / ".join(f"{latency[q]:.0f}" for q in ("p50", "p90", "p99")) + " ms" if latency else ""
        quality = ", ".join(_words(name, v) for name, v in row["quality"].items() if v is not None)
        reasons = "; ".join(UNMET.get(reason, reason) for reason in row["reasons"])
        good = "quality within its window, " if row["status"] == "passed" else "failed, "
        verdict = good + (f"not valid: {reasons}" if reasons else "valid")
        lines.append(
            f"| {row['name']} | {row['config']['mode']}, {row['devices']} | {row['queries']} | {shown} | {tail} "
            f"| {quality} | {verdict} |"
        )
    return "\n".join([*lines, "", _notes(rows)])


def _words(name: str, value: float) -> str:
    return WORDS.get(name, f"{name} {{:.4g}}").format(value).replace("%", " %")


def _notes(rows: Sequence[dict[str, Any]]) -> str:
    """What the columns mean, of the scenarios that are there."""
    windows = {tuple(window): None for row in rows for window in row["config"]["windows"]}
    notes = [f"The quality window: {'; '.join(_window(*window) for window in windows)}."] if windows else []
    if any(row["metric"]["name"].endswith("(ns)") for row in rows):
        notes.append("MLPerf's 90th percentile is the latency of one request (nearest rank); the percentiles of the")
        notes.append("latency column are AIPerf's, interpolated between two requests.")
    if any(row["scenario"] == "Offline" for row in rows):
        notes.append("Offline requests arrive at once, and latencies count from then.")
    return " ".join(notes)


def _window(name: str, low: float | None, high: float | None) -> str:
    bounds = [f"{_words(name, low)} or more" if low is not None else None]
    bounds.append(f"{_words(name, high)} or less" if high is not None else None)
    return " and ".join(filter(None, bounds))
