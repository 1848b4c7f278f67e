"""`python -m bench quality`: caption accuracy, and the distance from the sequential image.

For `shapes` the captions are combinations that training never showed, and an independent checker reads colour, shape,
size, place and background back from the pixels. Other models draw the prompts of a file or of MS-COCO, and
`--metrics` scores their images (bench/metrics.py says what they need). Every sampler is compared with the sequential
images of the same noise: distance of the latents, PSNR, SSIM, and LPIPS where its weights are. The usual alternative,
fewer sequential steps for the same number of rounds, is included. The noise floor, another batch size and lane count,
comes first.

Every row is stored in `build/bench` as soon as it is drawn, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
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
from bench.metrics import METRICS, Coco, Judges
from bench.models import is_embedded, model_arguments, one_lane, scenes
from bench.models import prompts as named
from bench.statistics import mean, median, quantile
from engines.base import Array
from engines.errors import ParameterError
from engines.files import written_whole
from engines.manifest import sha256_files
from engines.store import BUILD, Bundle
from export.shapes.data import Scene
from runtime.call import Call
from runtime.distances import drift, psnr, ssim
from runtime.pipeline import Pipeline

WORK = BUILD / "bench"
BATCH = 8  # captions per call
SHEET_ROWS = 6
STEPS, GUIDANCE = 50, 4.0
OTHER_SCHEDULERS = ("ddpm", "euler", "euler_a", "dpm++2m")


def wrong_attributes(image: Any, scene: Scene) -> list[str]:
    """The attributes that the checker reads differently from the scene."""
    words = [(s.size, s.colour, s.kind, s.place) for s in scene.shapes]
    return mistakes(read(np.asarray(image)), scene.background, words)


@dataclass(frozen=True)
class Case:
    """One row: how to draw, and what to compare with. `options` are more fields of its `Call`."""

    name: str
    line: str  # of the plot
    images: int
    mode: str = "sequential"
    options: dict[str, Any] = field(default_factory=dict)
    shapes: int = 1
    steps: int = STEPS
    reference_steps: int = STEPS
    guidance_scale: float = GUIDANCE
    scheduler: str | None = None  # the model's own
    alone: bool = False  # on one lane
    batch: int = BATCH

    def reference(self) -> Case:
        """The sequential images that this one is compared with."""
        keep = {
            name: getattr(self, name) for name in ("images", "shapes", "reference_steps", "guidance_scale", "scheduler")
        }
        return Case("sequential", "", steps=self.reference_steps, **keep)

    def key(self, plan: str, seed: int) -> str:
        """What a drawn row depends on."""
        text = json.dumps([asdict(self), plan, seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cases(images: int, steps: int = STEPS, guidance_scale: float = GUIDANCE, *, full: bool = False) -> list[Case]:
    """The rows of the table: every sampler; with `full` the other schedulers and more captions of `shapes` too."""

    def case(name: str, line: str, mode: str = "sequential", steps: int = steps, **more: Any) -> Case:
        return Case(name, line, images, mode, steps=steps, reference_steps=whole, guidance_scale=guidance_scale, **more)

    whole = steps

    rows = [
        case("sequential", "sequential, fewer steps"),
        case("sequential, one lane, one image at a time", "", batch=1, alone=True),
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
    rows.append(case("auto", "", "auto"))
    fewer = [math.ceil(steps * share) for share in (0.68, 0.52, 0.4, 0.28)]  # as many as the modes have rounds
    rows += [case(f"sequential, {n} steps", "sequential, fewer steps", steps=n) for n in fewer if n < steps]
    if full:
        rows += [Case("sequential, 200 captions", "", 200), Case("sequential, two shapes", "", 100, shapes=2)]
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
    """The latents and images of a case, in the order of its scenes, and the report of the first call."""

    latents: Array
    images: list[Image.Image]
    report: dict[str, Any]
    rounds: float
    evaluations: float

    @classmethod
    def of(cls, pipeline: Pipeline, case: Case, seed: int, captions: Sequence[str]) -> Drawn:
        """Draws every caption, several per call; every image from noise of its own."""
        noise = np.random.default_rng((seed, 7)).standard_normal((case.images, *pipeline.latent_shape), np.float32)
        results = []
        for start in range(0, case.images, case.batch):
            rows = slice(start, start + case.batch)
            results.append(
                pipeline.run(Call(
                    captions[rows], latents=noise[rows], seed=seed + start, mode=case.mode, scheduler=case.scheduler,
                    num_inference_steps=case.steps, guidance_scale=case.guidance_scale, **case.options,
                ))
            )  # fmt: skip
        images = [image for result in results for image in result.images]
        alone = case.mode in ("adaptive", "speculative")  # each image was made by itself, and the report adds them up
        each = [result.report.rounds / (len(result.images) if alone else 1) for result in results]
        latents = np.concatenate([result.latents for result in results])
        shares = [result.report.evaluations / (len(result.images) if alone else 1) for result in results]
        return cls(latents, images, results[0].report.to_dict(), float(np.mean(each)), float(np.mean(shares)))


@dataclass
class Gallery:
    """Draws cases, each set of sequential references once, and keeps every row in the work folder."""

    build: Path
    model: str
    devices: str
    seed: int
    asked: Sequence[str] | None = None  # in place of scenes
    judges: Judges = field(default_factory=Judges)
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    references: dict[str, Drawn] = field(default_factory=dict)

    def captions(self, case: Case) -> Sequence[str]:
        """What a case draws."""
        if self.asked is not None:
            return self.asked[: case.images]
        return [scene.caption() for scene in scenes(case.shapes, case.images, self.seed)]

    def draw(self, case: Case) -> Drawn:
        """The images of a case."""
        devices = one_lane(self.devices) if case.alone else self.devices
        if devices not in self.pipelines:
            self.pipelines[devices] = Pipeline.load(self.model, devices, self.build)
        return Drawn.of(self.pipelines[devices], case, self.seed, self.captions(case))

    def reference(self, case: Case) -> Drawn:
        """The sequential images of a case."""
        wanted = case.reference()
        key = wanted.key("", self.seed)
        if key not in self.references:
            self.references[key] = self.draw(wanted)
        return self.references[key]

    def row(self, case: Case) -> dict[str, Any]:
        """One row of the result file, drawn now or taken from the work folder."""
        manifest = Bundle.open(self.model, self.build).manifest
        judged = [
            *self.judges.metrics,
            str(self.judges.weights),
            *map(str, self.judges.coco.images if self.judges.coco else ()),
        ]
        asked = hashlib.sha256("\n".join([*self.captions(case), *judged]).encode()).hexdigest()
        identity = f"{manifest.source} {self.devices} {code_hash()} {asked}"
        path = WORK / f"quality-{case.key(identity, self.seed)}.json"
        if path.is_file():
            row: dict[str, Any] = json.loads(path.read_text())
            return row
        reference = self.reference(case)
        same = replace(case, name="sequential", line="") == case.reference()
        drawn = reference if same else self.draw(case)
        row = compare(case, drawn, reference, self.seed) | self._judged(case, drawn, reference)
        WORK.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_text(json.dumps(row) + "\n")
        return row

    def row_or_reason(self, case: Case) -> dict[str, Any]:
        """The row; of a sampler that cannot play this model's schedule, why it cannot."""
        try:
            return self.row(case)
        except ParameterError as error:
            if case.mode == "sequential":
                raise
            return {"name": case.name, "mode": case.mode, "status": "not possible here", "reason": str(error)}

    def _judged(self, case: Case, drawn: Drawn, reference: Drawn) -> dict[str, Any]:
        """What the checker or the metrics say of the images, and their perceptual distance to the sequential ones."""
        captions = self.captions(case)
        found: dict[str, Any] = {}
        if self.asked is None:
            found |= read_back(drawn.images, scenes(case.shapes, case.images, self.seed))
        apart = self.judges.lpips(drawn.images, reference.images)
        found["lpips"] = {"median": median(apart)} if apart else None
        found["lpips_reason"] = self.judges.lpips_reason
        own, sequential = (self.judges.scores(one.images, captions) for one in (drawn, reference))
        found["metrics"] = {
            name: mean(scores) | {"minus_sequential": mean(np.subtract(scores, sequential[name]).tolist())}
            for name, scores in own.items()
        }
        fid = self.judges.fid(drawn.images)
        return found | ({} if fid is None else {"fid": round(fid, 4)})

    def close(self) -> None:
        """Stops all lanes."""
        for pipeline in self.pipelines.values():
            pipeline.close()


@cache
def code_hash() -> str:
    """A hash of the code that a drawn row depends on."""
    root = Path(__file__).parent.parent
    return sha256_files(root, [*(path for name in ("engines", "runtime") for path in (root / name).rglob("*.py"))])


def compare(case: Case, drawn: Drawn, reference: Drawn, seed: int) -> dict[str, Any]:
    """How it was drawn, and how far it is from the sequential images."""
    pairs = list(zip(drawn.images, reference.images, strict=True))
    apart = [psnr([a], [b]) for a, b in pairs]
    drifts = [drift(a, b) for a, b in zip(drawn.latents, reference.latents, strict=True)]
    keep = ("model", "mode", "scheduler", "steps", "k", "drafts", "lanes", "devices", "guidance_scale")
    return {
        "name": case.name, "line": case.line,
        **{key: drawn.report[key] for key in keep},
        "rounds": round(drawn.rounds, 2), "speedup_in_rounds": round(case.reference_steps / drawn.rounds, 3),
        "evaluations": drawn.evaluations, "images": case.images, "seed": seed,
        "compared_with": f"sequential, {case.reference_steps} steps",
        "drift": {"median": median(drifts), "p90": quantile(drifts, 0.9)},
        "psnr": {"median": median(apart), "p5": quantile(apart, 0.05)},
        "ssim": {"median": median([ssim(a, b) for a, b in pairs])},
    }  # fmt: skip


def read_back(images: Sequence[Image.Image], asked: Sequence[Scene]) -> dict[str, Any]:
    """`caption_accuracy` is the share of images that are right in every attribute."""
    wrong = [wrong_attributes(image, scene) for image, scene in zip(images, asked, strict=True)]
    return {
        "shapes": len(asked[0].shapes), "captions": "held-out combinations of colour, shape and place",
        "caption_accuracy": round(sum(not mistake for mistake in wrong) / len(wrong), 4),
        "wrong": dict(Counter(name for mistake in wrong for name in mistake).most_common()),
    }  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--full", action="store_true", help="of shapes: 100 captions, two shapes, other schedulers")
    parser.add_argument("--images", type=int, help="captions per row; default 24, or 100 with --full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, default=GUIDANCE, dest="guidance_scale")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=[], help="judges of real models' images")
    parser.add_argument("--weights", type=Path, help="folder with what the metrics need")
    parser.add_argument("--coco", type=Path, help="folder of MS-COCO: captions, and the images of FID")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    parser.add_argument("--contact-sheet", type=Path, help="of shapes: PNG with the first images of some modes")


def measure(
    model: str, build: Path, devices: str, images: int | None, seed: int, steps: int = STEPS,
    guidance_scale: float = GUIDANCE, metrics: Sequence[str] = (), weights: Path | None = None,
    coco: Path | None = None, prompts: Path | None = None, contact_sheet: Path | None = None, *, full: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per case; `contact_sheet` is one to write."""
    images = (100 if full else 24) if images is None else images
    for name, value in (("images", images), ("steps", steps)):
        if value < 1:
            raise ParameterError(name, f"{name} must be at least 1, not {value}")
    manifest = Bundle.open(model, build).manifest
    scenic = is_embedded(manifest) and coco is None and prompts is None and not metrics
    for option, given in (("full", full), ("contact-sheet", contact_sheet)):
        if given and not scenic:
            raise ParameterError(option, f"--{option} is of captions that the checker knows: shapes, its own captions")
    reference = Coco.read(coco, images, seed) if coco else None
    asked = None if scenic else list(reference.captions if reference else named(manifest, images, seed, prompts))
    gallery = Gallery(build, model, devices, seed, asked, Judges(metrics, weights, reference))
    try:
        wanted = cases(images, steps, guidance_scale, full=full)
        rows = [gallery.row_or_reason(case) for case in tqdm(wanted, desc="quality", unit="row")]
        if contact_sheet:
            sheet(gallery, contact_sheet)
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
    wrong = [[wrong_attributes(p, scene) for p, scene in zip(d.images, asked, strict=True)] for d in drawn]
    names = [
        f"{mode}{' (paper)' if kind == 'frozen' else ''}, {d.report['rounds']}"
        for (mode, kind), d in zip(wanted, drawn, strict=True)
    ]
    contact_sheet(path, names, [scene.caption() for scene in asked], [d.images for d in drawn], wrong)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    checked = any("caption_accuracy" in row for row in rows)
    names = list(rows[0].get("metrics", {}))
    heads = ["", "images", "rounds", "distance to sequential, median (p90)", "PSNR, median (p5)", "SSIM"]
    heads += ["LPIPS"] * any(row.get("lpips") for row in rows) + ["right in every attribute"] * checked
    heads += [text for name in names for text in (name, f"{name} − sequential")]
    heads += ["FID"] * any("fid" in row for row in rows)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if "reason" in row:
            lines.append(f"| {row['name']} | not possible here: {row['reason']} |{' |' * (len(heads) - 2)}")
            continue
        drifts = row["drift"]
        cells = [row["name"], str(row["images"]), f"{row['rounds']:g}"]
        cells += [f"{drifts['median']:.4f} ({drifts['p90']:.4f})", _decibels(row["psnr"])]
        cells.append(f"{row['ssim']['median']:.4f}")
        cells += [f"{row['lpips']['median']:.4f}"] if row.get("lpips") else []
        cells += [f"{100 * row['caption_accuracy']:.1f} %"] if checked else []
        for value in row.get("metrics", {}).values():
            change = value["minus_sequential"]
            cells.append(f"{value['mean']:.2f} ({value['low']:.2f}–{value['high']:.2f})")
            cells.append(f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})")
        cells += [f"{row['fid']:.2f}"] if "fid" in row else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _decibels(found: dict[str, float]) -> str:
    """The median, and where it was measured what 95 % of the images are above."""
    lowest = f" ({found['p5']:.1f})" if "p5" in found else ""
    return f"{found['median']:.1f}{lowest} dB"
