"""`python -m bench quality`: does the picture show what the caption says, and how far is it from the sequential one?

The captions are combinations that training never showed. An independent checker reads colour, shape, size, place and
background back from the pixels. Every sampler is held against the sequential pictures of the same noise: distance of
the latents, PSNR, SSIM. So is what one would do instead, fewer sequential steps in the same number of rounds. What the
distance cannot be blamed for, another batch size and lane count, comes first.

Every row is kept in `build/bench` as soon as it is drawn, so that an interrupted run continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from bench.checker import mistakes, read
from bench.contact_sheet import contact_sheet
from bench.run import drift, median, psnr, quantile
from engines.base import Array
from engines.errors import ParameterError
from engines.manifest import sha256_files
from engines.store import BUILD, Bundle
from export.shapes.data import Scene, random_scene
from runtime.pipeline import Pipeline

WORK = BUILD / "bench"
BATCH = 8  # captions per call
SHEET_ROWS = 6
STEPS, GUIDANCE = 50, 4.0
OTHER_SCHEDULERS = ("ddpm", "euler", "euler_a", "dpm++2m")


def scenes(shapes: int, count: int, seed: int) -> list[Scene]:
    """Random held-out scenes with one or two shapes each."""
    rng = np.random.default_rng((seed, shapes))
    return [random_scene(rng, shapes, held_out=True) for _ in range(count)]


def wrong_attributes(picture: Any, scene: Scene) -> list[str]:
    """What the checker finds wrong in a picture of a scene."""
    words = [(s.size, s.colour, s.kind, s.place) for s in scene.shapes]
    return mistakes(read(np.asarray(picture)), scene.background, words)


@dataclass(frozen=True)
class Case:
    """One row: how to draw, and what to compare with. `options` go to `Pipeline.generate`."""

    name: str
    line: str  # of the plot
    images: int
    mode: str = "sequential"
    options: dict[str, Any] = field(default_factory=dict)
    shapes: int = 1
    steps: int = STEPS
    reference_steps: int = STEPS
    guidance_scale: float = GUIDANCE
    scheduler: str = "ddim"
    devices: str | None = None  # the gallery's
    batch: int = BATCH

    def reference(self) -> Case:
        """The sequential pictures that this one is compared with."""
        keep = {
            name: getattr(self, name) for name in ("images", "shapes", "reference_steps", "guidance_scale", "scheduler")
        }
        return Case("sequential", "", steps=self.reference_steps, **keep)

    def key(self, plan: str, seed: int) -> str:
        """What a drawn row depends on."""
        text = json.dumps([asdict(self), plan, seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cases(images: int, *, full: bool) -> list[Case]:
    """The rows of the table: DDIM with every sampler; with `full` the other schedulers and more captions too."""

    def case(name: str, line: str, mode: str = "sequential", **more: Any) -> Case:
        return Case(name, line, images, mode, **more)

    rows = [
        case("sequential", "sequential, fewer steps"),
        case("sequential, one lane, one picture at a time", "", batch=1, devices="cpu@1"),
    ]
    for mode in ("conservative", "aggressive"):
        for drafts, kind in (("frozen", "as in the paper"), ("corrected", "corrected")):
            rows += [
                case(f"{mode}, k = {k}, {kind}", f"{mode}, {kind}", mode, options={"k": k, "drafts": drafts})
                for k in (2, 3, 4)
            ]
    rows += [case(f"srds, {p} iteration{'s'[: p - 1]}", "srds", "srds", options={"iterations": p}) for p in (1, 2)]
    for tolerance in (0.003, 0.01, 0.03):
        options = {"k": 4, "tolerance": tolerance, "drafts": "frozen"}
        rows.append(case(f"adaptive, k = 4, tolerance {tolerance}", "adaptive, k = 4", "adaptive", options=options))
    rows += [case(f"sequential, {n} steps", "sequential, fewer steps", steps=n) for n in (34, 26, 20, 14)]
    if full:
        rows += [Case("sequential", "", 200), Case("sequential, two shapes", "", 100, shapes=2)]
        rows += [case for scheduler in OTHER_SCHEDULERS for case in _other(scheduler)]
    return rows


def _other(scheduler: str) -> list[Case]:
    """The rows of another scheduler than DDIM, at k = 4."""
    kinds = ["frozen", "corrected", *(["fresh"] if scheduler in ("ddpm", "euler_a") else [])]
    wanted: list[tuple[str, dict[str, Any]]] = [("sequential", {})]
    wanted += [(mode, {"k": 4, "drafts": kind}) for mode in ("conservative", "aggressive") for kind in kinds]
    wanted += [("srds", {"iterations": 1})] if scheduler != "dpm++2m" else []

    def name(mode: str, options: dict[str, Any]) -> str:
        kind = {"fresh": "fresh noise", "frozen": "as in the paper"}.get(
            options.get("drafts", ""), options.get("drafts")
        )
        return ", ".join(filter(None, (scheduler, mode, "k = 4" if "k" in options else None, kind)))

    return [Case(name(*row), "", 25, row[0], row[1], scheduler=scheduler) for row in wanted]


@dataclass(frozen=True)
class Drawn:
    """The latents and pictures of a case, in the order of its scenes, and the report of the first call."""

    latents: Array
    pictures: list[Image.Image]
    report: dict[str, Any]
    rounds: float
    evaluations: float

    @classmethod
    def of(cls, pipeline: Pipeline, case: Case, seed: int) -> Drawn:
        """Draws every scene, several captions per call; every picture from noise of its own."""
        captions = [scene.caption() for scene in scenes(case.shapes, case.images, seed)]
        noise = np.random.default_rng((seed, 7)).standard_normal((case.images, *pipeline.latent_shape), np.float32)
        results = []
        for start in range(0, case.images, case.batch):
            rows = slice(start, start + case.batch)
            results.append(
                pipeline.generate(
                    captions[rows], latents=noise[rows], seed=seed + start, mode=case.mode, scheduler=case.scheduler,
                    num_inference_steps=case.steps, guidance_scale=case.guidance_scale, **case.options,
                )
            )  # fmt: skip
        pictures = [picture for result in results for picture in result.images]
        alone = case.mode == "adaptive"  # each picture was made by itself, and the report adds them up
        each = [result.report.rounds / (len(result.images) if alone else 1) for result in results]
        latents = np.concatenate([result.latents for result in results])
        shares = [result.report.evaluations / (len(result.images) if alone else 1) for result in results]
        return cls(latents, pictures, results[0].report.to_dict(), float(np.mean(each)), float(np.mean(shares)))


@dataclass
class Gallery:
    """Draws cases, each set of sequential references once, and keeps every row in the work folder."""

    build: Path
    model: str
    devices: str
    seed: int
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    references: dict[str, Drawn] = field(default_factory=dict)

    def draw(self, case: Case) -> Drawn:
        """The pictures of a case."""
        devices = case.devices or self.devices
        if devices not in self.pipelines:
            self.pipelines[devices] = Pipeline.load(self.model, devices, self.build)
        return Drawn.of(self.pipelines[devices], case, self.seed)

    def reference(self, case: Case) -> Drawn:
        """The sequential pictures of a case."""
        wanted = case.reference()
        key = wanted.key("", self.seed)
        if key not in self.references:
            self.references[key] = self.draw(wanted)
        return self.references[key]

    def row(self, case: Case) -> dict[str, Any]:
        """One row of the result file, drawn now or taken from the work folder."""
        identity = f"{Bundle.open(self.model, self.build).manifest.source} {self.devices} {_code()}"
        path = WORK / f"quality-{case.key(identity, self.seed)}.json"
        if path.is_file():
            row: dict[str, Any] = json.loads(path.read_text())
            return row
        reference = self.reference(case)
        same = replace(case, name="sequential", line="") == case.reference()
        row = compare(case, reference if same else self.draw(case), reference, self.seed)
        WORK.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row) + "\n")
        os.replace(partial, path)
        return row

    def close(self) -> None:
        """Stops all lanes."""
        for pipeline in self.pipelines.values():
            pipeline.close()


@cache
def _code() -> str:
    """The content of everything that a drawn row depends on beside the model."""
    root = Path(__file__).parent.parent
    return sha256_files(root, [*(path for name in ("engines", "runtime") for path in (root / name).glob("*.py"))])


def compare(case: Case, drawn: Drawn, reference: Drawn, seed: int) -> dict[str, Any]:
    """`caption_accuracy` is the share of pictures that are right in every attribute."""
    from skimage.metrics import structural_similarity

    asked = scenes(case.shapes, case.images, seed)
    wrong = [wrong_attributes(picture, scene) for picture, scene in zip(drawn.pictures, asked, strict=True)]
    pairs = list(zip(drawn.pictures, reference.pictures, strict=True))
    drifts = [drift(a, b) for a, b in zip(drawn.latents, reference.latents, strict=True)]
    ssims = [
        float(structural_similarity(np.asarray(a), np.asarray(b), channel_axis=2))  # type: ignore[no-untyped-call]
        for a, b in pairs
    ]
    keep = ("model", "mode", "scheduler", "steps", "k", "drafts", "lanes", "devices", "guidance_scale")
    return {
        "name": case.name, "line": case.line,
        **{key: drawn.report[key] for key in keep},
        "rounds": round(drawn.rounds, 2), "speedup_in_rounds": round(case.reference_steps / drawn.rounds, 3),
        "evaluations": drawn.evaluations,
        "shapes": case.shapes, "images": case.images, "seed": seed,
        "captions": "held-out combinations of colour, shape and place",
        "caption_accuracy": round(sum(not mistake for mistake in wrong) / len(wrong), 4),
        "wrong": dict(Counter(name for mistake in wrong for name in mistake).most_common()),
        "compared_with": f"sequential, {case.reference_steps} steps",
        "drift": {"median": median(drifts), "p90": quantile(drifts, 0.9)},
        "psnr": {"median": median([psnr([a], [b]) for a, b in pairs])},
        "ssim": {"median": median(ssims)},
    }  # fmt: skip


def quality(
    model: str, build: Path, devices: str, images: int, seed: int, pictures: Path | None = None, *, full: bool
) -> list[dict[str, Any]]:
    """One row per case; `pictures` is a contact sheet to write."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    if model != "shapes":
        raise ParameterError("model", f"the checker knows the pictures of 'shapes' only, not those of {model!r}")
    gallery = Gallery(build, model, devices, seed)
    try:
        rows = [gallery.row(case) for case in tqdm(cases(images, full=full), desc="quality", unit="row")]
        if pictures:
            sheet(gallery, pictures)
        return rows
    finally:
        gallery.close()


def sheet(gallery: Gallery, path: Path) -> None:
    """The first captions, sequential beside the parallel modes."""
    wanted = [
        ("sequential", "corrected"),
        ("conservative", "corrected"),
        ("aggressive", "corrected"),
        ("aggressive", "frozen"),
    ]
    asked = scenes(1, SHEET_ROWS, gallery.seed)
    drawn = [gallery.draw(Case("", "", SHEET_ROWS, mode, {"k": 4, "drafts": kind})) for mode, kind in wanted]
    wrong = [[wrong_attributes(p, scene) for p, scene in zip(d.pictures, asked, strict=True)] for d in drawn]
    names = [
        f"{mode}{' (paper)' if kind == 'frozen' else ''}, {d.report['rounds']}"
        for (mode, kind), d in zip(wanted, drawn, strict=True)
    ]
    contact_sheet(path, names, [scene.caption() for scene in asked], [d.pictures for d in drawn], wrong)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| | pictures | rounds | distance to sequential, median (p90) | PSNR | SSIM | right in every attribute |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        drifts = row["drift"]
        lines.append(
            f"| {row['name']} | {row['images']} | {row['rounds']:g} | {drifts['median']:.4f} ({drifts['p90']:.4f}) "
            f"| {row['psnr']['median']:.1f} dB | {row['ssim']['median']:.4f} | {100 * row['caption_accuracy']:.1f} % |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up in rounds against the distance to sequential, one line per sampler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["line"] and row["drift"]["median"]:
            lines.setdefault(row["line"], []).append((row["drift"]["median"], row["speedup_in_rounds"]))
    for number, (name, points) in enumerate(lines.items()):
        points.sort()
        style = "--" if "paper" in name else "-"
        axes.plot(*zip(*points, strict=True), style, marker="osD^vPX*"[number % 8], label=name)
    axes.set(xscale="log", xlabel="distance of the latents to sequential, 50 steps (median)", ylabel="50 / rounds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table_of_drafts(rows: Sequence[dict[str, Any]]) -> str:
    """Per kind of drafts, how many times closer to sequential than frozen ones it ends: median / 90th percentile."""
    kinds = list(dict.fromkeys(row["drafts"] for row in rows if row["drafts"] != "frozen"))
    cells = list(dict.fromkeys((r["steps"], r["guidance_scale"], r["mode"], r["k"]) for r in rows))
    by = {((r["steps"], r["guidance_scale"], r["mode"], r["k"]), r["drafts"]): r["drift"] for r in rows}
    lines = [f"| steps | guidance | | k | frozen | {' | '.join(kinds)} |", "|---" * (5 + len(kinds)) + "|"]
    for cell in cells:
        frozen = by[cell, "frozen"]
        ratios = [
            f"{frozen['median'] / by[cell, kind]['median']:.2f} / {frozen['p90'] / by[cell, kind]['p90']:.2f}"
            for kind in kinds
        ]
        steps, guidance, mode, k = cell
        lines.append(
            f"| {steps} | {guidance:g} | {mode} | {k} | {frozen['median']:.4f} ({frozen['p90']:.4f}) "
            f"| {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def drafts(
    model: str, build: Path, devices: str, images: int, seed: int, kinds: Sequence[str]
) -> list[dict[str, Any]]:  # fmt: skip
    """Kinds of drafts beside the paper's, k = 2, 3, 4, 50 and 28 steps, guidance 4 and 7.5; `seed` chooses captions."""
    if images < 1:
        raise ParameterError("images", f"images must be at least 1, not {images}")
    gallery = Gallery(build, model, devices, seed)
    wanted = [
        Case(
            f"{mode}, k = {k}, {kind}", "", images, mode, {"k": k, "drafts": kind}, steps=steps,
            reference_steps=steps, guidance_scale=guidance,
        )
        for steps in (50, 28) for guidance in (4.0, 7.5) for mode in ("conservative", "aggressive")
        for k in (2, 3, 4) for kind in dict.fromkeys(("frozen", *kinds))
    ]  # fmt: skip
    try:
        return [gallery.row(case) for case in tqdm(wanted, desc="drafts", unit="row")]
    finally:
        gallery.close()
