"""`python -m bench cache`: what drafts, reused features and both save on one lane and on all, beside fewer steps.

The model must have been exported with its denoiser in two parts (`make engines CACHE=1`). A row has how far its images
end from the sequential ones and how many captions are right; on each set of lanes the seconds per image, measured image
by image in turns with all other rows, and the device-seconds.

On one lane drafts save nothing but what larger calls save: all samplers of DRiffusion evaluate the model N times. So
rows of kind `curve` have the seconds of calls by their number of branches, and what each plan must gain by them;
`--curve` adds one that was measured elsewhere.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.models import model_arguments, one_lane, scenes
from bench.quality import GUIDANCE, STEPS, Case, Gallery
from bench.statistics import percentiles, ratio
from engines.base import Branch
from engines.errors import ParameterError
from runtime.auto import Candidate, call_seconds, predicted_seconds
from runtime.call import Call
from runtime.pipeline import Pipeline
from runtime.sampling.drafts import resolve
from runtime.sampling.noise import gaussian
from runtime.sampling.operations import STATE
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule

FEWER = (34, 26, 20, 14, 10)  # steps
MODES, KS = ("conservative", "aggressive"), (2, 4)
INTERVALS = (2, 3, 5, 8)  # of the cache alone
ANCHORS = 64  # an interval beyond every block: anchors alone are whole
BATCHES = (1, 2, 4, 8, 16)  # branches


def plans(images: int) -> list[Case]:
    """Sequential first, then every way to be faster."""

    def case(name: str, line: str, mode: str, steps: int = STEPS, **options: Any) -> Case:
        return Case(name, line, images, mode, options, steps=steps)

    drafted = list(product(MODES, KS))
    reused = {2: "half of all steps whole", ANCHORS: "anchors whole"}
    return [
        case("sequential", "sequential", "sequential"),
        *(case(f"sequential, {steps} steps", "fewer steps", "sequential", steps) for steps in FEWER),
        *(case(f"{mode}, k = {k}", "drafts", mode, k=k) for mode, k in drafted),
        *(case(f"sequential, one step of {n} whole", "cache", "sequential", cache_interval=n) for n in INTERVALS),
        *(
            case(f"{mode}, k = {k}, {name}", "drafts + cache", mode, k=k, cache_interval=n)
            for (mode, k), (n, name) in product(drafted, reused.items())
            if (mode, k, n) != ("aggressive", 2, 2)  # whose last drafts, the next anchors, are that half
        ),
    ]


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.set_defaults(model="shapes+cache")
    parser.add_argument("--images", type=int, default=48, help="captions per row")
    parser.add_argument("--passes", type=int, default=8, help="images per row whose seconds are measured")
    parser.add_argument("--seed", type=int, default=0, help="which captions")
    parser.add_argument(
        "--curve", action="append", default=[], type=curve, metavar="NAME=BRANCHES:SECONDS,…",
        help="seconds of a model call by its number of branches, measured elsewhere",
    )  # fmt: skip


def curve(text: str) -> tuple[str, dict[int, float]]:
    """`--curve`; ArgumentTypeError where it cannot be read."""
    name, _, points = text.partition("=")
    found = re.findall(r"(\d+):([0-9.eE+-]+)(?:,|$)", points)
    try:
        seconds = {int(branches): float(taken) for branches, taken in found}
    except ValueError:
        seconds = {}
    whole = ",".join(f"{branches}:{taken}" for branches, taken in found) == points
    if not (name and whole and seconds and min(seconds) >= 1 and min(seconds.values()) > 0):
        raise argparse.ArgumentTypeError(f"must be NAME=BRANCHES:SECONDS,… as in 'H100=2:0.010,4:0.018', not {text!r}")
    return name, seconds


@dataclass
class Timed:
    """Seconds of each plan's images on some lanes."""

    pipeline: Pipeline
    cases: Sequence[Case]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, passes: int, seed: int) -> None:
        """All plans in turns; what the first image of each takes is left out."""
        asked = [scene.caption() for scene in scenes(1, passes + 1, seed)]
        for number, prompt in enumerate(tqdm(asked, desc=self.devices, unit="pass")):
            noise = gaussian(number, 0, 0, self.pipeline.latent_shape)[None]
            for case in self.cases:
                call = Call(prompt, latents=noise, seed=number, mode=case.mode, num_inference_steps=case.steps,
                            guidance_scale=case.guidance_scale, **case.options)  # fmt: skip
                taken = self.pipeline.run(call).report.seconds["denoise"]
                if number:
                    self.seconds.setdefault(case.name, []).append(taken)

    @property
    def devices(self) -> str:
        """The lanes."""
        return ",".join(map(str, self.pipeline.devices))

    def row(self, case: Case) -> dict[str, Any]:
        """What was measured of one plan: `speedup` over sequential on the same lanes, by pairs of images."""
        seconds, lanes = self.seconds[case.name], self.pipeline.devices
        held = {lane.device for lane in lanes} if lanes[0].gpu is not None else None
        count = len(held) if held else sum(lane.threads for lane in lanes)
        found = percentiles(seconds)
        return {"seconds": found, "device_seconds": round(count * found["p50"], 5),
                "speedup": ratio(self.seconds[self.cases[0].name], seconds)}  # fmt: skip


def measure(
    model: str, build: Path, devices: str, images: int, passes: int, seed: int,
    curve: Sequence[tuple[str, dict[int, float]]] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """A row per plan, then a row per curve."""
    for name, value in (("images", images), ("passes", passes)):
        if value < 1:
            raise ParameterError(name, f"{name} must be at least 1, not {value}")
    cases, gallery = plans(images), Gallery(build, model, devices, seed)
    try:
        rows = [
            {"kind": "plan", "cache_interval": case.options.get("cache_interval", 1), **gallery.row(case), "on": {}}
            for case in tqdm(cases, desc="images", unit="row")
        ]
    finally:
        gallery.close()
    curves = list(curve)
    for lanes in dict.fromkeys((one_lane(devices), devices)):
        pipeline = Pipeline.load(model, lanes, build)
        try:
            timed = Timed(pipeline, cases)
            timed.measure(passes, seed)
            for row, case in zip(rows, cases, strict=True):
                row["on"][timed.devices] = timed.row(case)
            if lanes == one_lane(devices):
                curves.insert(0, (f"{model}, {lanes}, measured", call_curve(pipeline)))
                schedule = make_schedule(pipeline.manifest, rows[0]["scheduler"], STEPS)
        finally:
            pipeline.close()
    return rows + [_curve_row(name, seconds, schedule) for name, seconds in curves]


def call_curve(pipeline: Pipeline) -> dict[int, float]:
    """Seconds of a call of the whole denoiser by its branches, on the first lane, with the last image's latents."""
    found = {}
    for branches in BATCHES:
        call = [Branch(STATE, 0, f"timed {n}", 1) for n in range(branches)]
        calls = [call, *([] for _ in pipeline.devices[1:])]
        found[branches] = min(pipeline.backend.measurements.timed(calls) for _ in range(5))
    return found


def _curve_row(name: str, seconds: dict[int, float], schedule: Schedule) -> dict[str, Any]:
    """What plans gain on one lane by the calls alone, guided and not; a gain of 1 is the break-even."""

    def gain(mode: str, k: int, guidance: float) -> float:
        both = (Candidate(mode=one, k=k, drafts=resolve("auto")) for one in ("sequential", mode))
        plain, drafted = (predicted_seconds(one, schedule, 1, guidance, seconds, 1) for one in both)
        return round(plain / drafted, 4)

    each = call_seconds(seconds)
    return {
        "kind": "curve", "name": name, "call_seconds": seconds,
        "of_proportional": {branches: round(each(branches) / (branches * each(1)), 4) for branches in seconds},
        "gains": [
            {"mode": mode, "k": k, "guidance_scale": guidance, "gain": gain(mode, k, guidance)}
            for guidance, mode, k in product((GUIDANCE, 1.0), MODES, (2, 4, 8))
        ],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Plans with their seconds on each set of lanes, then the curves."""
    planned = [row for row in rows if row["kind"] == "plan"]
    lanes = list(planned[0]["on"])
    names = ["one lane" if "," not in one else f"{one.count(',') + 1} lanes" for one in lanes]
    per_lanes = [f"{what}, {one}" for one in names for what in ("seconds", "device-seconds", "× sequential")]
    heads = ["", "rounds", "drift, median (p90)", "right captions", *per_lanes]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in planned:
        cells = [row["name"], f"{row['rounds']:g}", f"{row['drift']['median']:.4f} ({row['drift']['p90']:.4f})",
                 f"{100 * row['caption_accuracy']:.1f} %"]  # fmt: skip
        for found in row["on"].values():
            cells += [f"{found['seconds']['p50']:.3f}", f"{found['device_seconds']:.3f}",
                      f"{found['speedup']['median']:.2f}"]  # fmt: skip
        lines.append(_line(cells))
    return "\n".join(lines) + "\n\n" + _curves([row for row in rows if row["kind"] == "curve"])


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    gains = rows[0]["gains"]
    lines = []
    for guidance in dict.fromkeys(one["guidance_scale"] for one in gains):
        wanted = [n for n, one in enumerate(gains) if one["guidance_scale"] == guidance]
        heads = [f"one lane, guidance {guidance:g}: × sequential by the calls alone",
                 *(f"{gains[n]['mode']}, k = {gains[n]['k']}" for n in wanted)]  # fmt: skip
        lines += ["", _line(heads), "|---" * len(heads) + "|"]
        lines += [_line([row["name"], *(f"{row['gains'][n]['gain']:.2f}" for n in wanted)]) for row in rows]
    return "\n".join(lines[1:])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
