"""`python -m bench simulate`: latency on machines that are not here, predicted on the null backend's virtual clock.

A sampler's real plan is played with the seconds of model calls, copies, sums and launches as a table gives them.

- For the paper's machines the seconds of a model call come from its sequential row alone, and the other rows are
  predicted; nothing is fitted to them.
- The prediction is validated where lanes are at hand: the table is measured on them, in between the images whose
  seconds it must predict.
- What nobody measured is marked as assumed: links are typical of their kind, and one branch of a guided evaluation
  costs `--branch-share` of both together.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from bench import moves
from bench.gpu.engine import schedule as stable_diffusion
from bench.models import lane_names, model_arguments, one_lane, prompts
from bench.moves import Link
from bench.plots import colour, drawing, png
from bench.statistics import ratio
from engines.base import Backend, Branch, Call
from engines.errors import ParameterError
from engines.host import HostBackend
from engines.null import NullBackend
from runtime.auto import call_seconds, rehearse
from runtime.pipeline import Pipeline
from runtime.sampling.execute import Counts
from runtime.sampling.operations import STATE, Options
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINKS = (moves.NVLINK, moves.PCIE, moves.ETHERNET)
DEVICES = (1, 2, 3, 4, 6, 8, 12, 16)
BATCHES = (1, 2, 3, 4, 6, 8)
LAUNCH = 10e-6  # seconds to start a round as a graph; assumed
REPEATS = 3
MEASURED = "measured here"  # where a table of costs comes from
MODES = ("sequential", "conservative", "aggressive", "srds", "adaptive")


# --- costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinkCosts:
    """Devices that each run a call in `call(branches)` seconds; the first holds the latents of `size` bytes."""

    call: Callable[[int], float]
    size: int
    link: Link
    combine_seconds: float = moves.COMBINE
    launch: float = LAUNCH

    def round(self, calls: Sequence[Call]) -> float:
        """See engines.null.Costs."""
        branches = [len(call) for call in calls]
        seconds = [self.call(count) if count else 0.0 for count in branches]
        return self.launch + moves.gathered(seconds, branches, self.size, self.link)

    def combine(self, sources: int, targets: int) -> float:
        """See engines.null.Costs."""
        return self.combine_seconds

    def distances(self, pairs: int) -> float:
        """See engines.null.Costs: a small kernel, and the host hears of it."""
        return self.combine_seconds + self.launch


@dataclass
class MeasuredCosts:
    """Seconds as measured on lanes here: calls by lanes at work and batch, starting a round, sums by their shape.

    All of it is measured after a model call, which leaves the caches as a real round does.
    """

    calls: dict[int, dict[int, float]] = field(default_factory=dict)
    launch: dict[int, float] = field(default_factory=dict)
    sums: dict[tuple[int, int], float] = field(default_factory=dict)
    distance: float = 0.0

    def round(self, calls: Sequence[Call]) -> float:
        """See engines.null.Costs."""
        branches = [len(call) for call in calls if call]
        seconds = call_seconds(self.calls[len(branches)])
        return self.launch[len(branches)] + max(map(seconds, branches))

    def combine(self, sources: int, targets: int) -> float:
        """See engines.null.Costs."""
        return self.sums.get((sources, targets), 0.0)

    def distances(self, pairs: int) -> float:
        """See engines.null.Costs."""
        return pairs * self.distance

    def mean(self, other: MeasuredCosts) -> MeasuredCosts:
        """Between two tables of the same lanes."""

        def each(one: dict[Any, float], two: dict[Any, float]) -> dict[Any, float]:
            return {key: (value + two[key]) / 2 for key, value in one.items()}

        calls = {busy: each(batches, other.calls[busy]) for busy, batches in self.calls.items()}
        launch, sums = each(self.launch, other.launch), each(self.sums, other.sums)
        return MeasuredCosts(calls, launch, sums, (self.distance + other.distance) / 2)


def measured_costs(backend: Backend, shapes: Iterable[tuple[int, int]]) -> MeasuredCosts:
    """Measures a bound backend; `shapes` are the (sources, targets) of the sums that will be asked for.

    On lanes that order themselves a call's seconds include what a round costs beside it, and sums are not told apart.
    """
    found, waits = MeasuredCosts(), isinstance(backend, HostBackend)
    for busy in range(1, backend.lanes + 1):
        beside = []
        found.calls[busy] = {}
        for batch in BATCHES:
            calls = _calls(backend.lanes, busy, batch)
            taken = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                taken.append(backend.timed(calls))
                beside.append(time.perf_counter() - start - taken[-1])
            found.calls[busy][batch] = float(np.median(taken))
        found.launch[busy] = float(np.median(beside)) if waits else 0.0
    if waits:
        once = _calls(backend.lanes, backend.lanes, 1)
        for sources, targets in shapes:
            found.sums[sources, targets] = _after_a_call(backend, once, partial_sum(backend, sources, targets))
        found.distance = _after_a_call(backend, once, lambda: backend.distances([("timed 0/0", STATE)]))
    return found


def _calls(lanes: int, busy: int, batch: int) -> list[list[Branch]]:
    return [[Branch(STATE, 0, f"timed {n}/{b}", 1) for b in range(batch)] if n < busy else [] for n in range(lanes)]


def partial_sum(backend: Backend, sources: int, targets: int) -> Callable[[], None]:
    """A sum of this shape over slots of a bound backend."""
    latent, shape = backend.read(STATE), (targets, sources)
    names = [f"summed {n}" for n in range(max(sources, targets))]
    for name in names:
        backend.write(name, latent)
    rows = np.full(shape, 1 / sources, np.float32)
    return lambda: backend.combine(names[:sources], rows, names[:targets])


def _after_a_call(backend: Backend, calls: Sequence[Call], work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        backend.predict(calls)
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


# --- the paper -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """One row of the paper: seconds on one device, and the speed-up per mode and number of devices."""

    model: str
    latent_bytes: int
    steps: int
    sequential_seconds: float | None
    speedups: dict[tuple[str, int], float]


def _of_seconds(one: float, seconds: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {point: one / several for point, several in seconds.items()}


CONSERVATIVE, AGGRESSIVE = "conservative", "aggressive"
PAPER = (
    Published("SD 1.5", 32 << 10, 50, 2.68, _of_seconds(2.68, {
        (CONSERVATIVE, 2): 2.07, (CONSERVATIVE, 3): 1.43, (CONSERVATIVE, 4): 1.10,
        (AGGRESSIVE, 2): 1.41, (AGGRESSIVE, 3): 1.00, (AGGRESSIVE, 4): 0.80,
    })),
    Published("SD 2.1-base", 32 << 10, 50, 2.48, _of_seconds(2.48, {
        (CONSERVATIVE, 2): 1.74, (CONSERVATIVE, 3): 1.32, (CONSERVATIVE, 4): 1.04,
        (AGGRESSIVE, 2): 1.35, (AGGRESSIVE, 3): 0.92, (AGGRESSIVE, 4): 0.72,
    })),
    Published("SD 2.1", 72 << 10, 50, 5.96, _of_seconds(5.96, {(CONSERVATIVE, 4): 2.42, (AGGRESSIVE, 4): 1.66})),
    Published("SDXL", 128 << 10, 50, None, {(CONSERVATIVE, 2): 1.5, (AGGRESSIVE, 4): 3.6}),
    Published("SD 3", 512 << 10, 28, 11.25, _of_seconds(11.25, {(AGGRESSIVE, 3): 3.81, (AGGRESSIVE, 4): 3.00})),
)  # fmt: skip


# --- predictions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Where the seconds of an evaluation come from; `evaluation` is that of one with guidance, alone on a device."""

    name: str
    source: str
    evaluation: float
    latent_bytes: int
    steps: int = 50
    branch_share: float = 0.56

    def call(self, *, split: bool) -> Callable[[int], float]:
        """Seconds of a call: of so many whole evaluations, or of so many branches where they are dealt over devices."""
        if not split:
            return lambda evaluations: evaluations * self.evaluation
        return lambda branches: (branches // 2 + branches % 2 * self.branch_share) * self.evaluation


def options(mode: str, devices: int, *, split: bool, iterations: int = 1, tolerance: float = 0.01) -> Options:
    """What a sampler is played with: one draft per device, or one per two where guidance is split."""
    k = max(1, devices // 2) if split else devices
    kind = {"drafts": "corrected", "iterations": iterations if mode == "srds" else None}
    return Options(k, tolerance=tolerance if mode == "adaptive" else 0.0, **kind)  # type: ignore[arg-type]


def predict(
    mode: str, schedule: Schedule, devices: int, table: Table, link: Link, *, split: bool,
    distances: Sequence[float] | None = None, free: bool = False,
) -> tuple[float, Counts]:  # fmt: skip
    """Seconds of the denoising loop and what it takes; `free` leaves sums and launches out."""
    costs = LinkCosts(table.call(split=split), table.latent_bytes, link)
    if free:
        costs = LinkCosts(costs.call, 0, Link("none", 0.0, np.inf, 0.0), 0.0, 0.0)
    backend = NullBackend(devices, costs, None if distances is None else iter(distances))
    chosen = options(mode, devices, split=split)
    # an evaluation that is not split is one unit, so that it is dealt like an unguided one
    counts = rehearse(mode, chosen, schedule, 2.0 if split else 1.0, backend)
    return backend.seconds, counts


def predictions(
    tables: Sequence[Table], recorded: dict[tuple[int, int], list[float]], devices: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Every table, link, number of devices, sampler, and guidance split or not.

    `recorded` has the distances that `adaptive` measured on a real model for (steps, k); without them it is left out.
    """
    rows = []
    for table in tables:
        schedule = stable_diffusion(table.steps)
        one, _ = predict("sequential", schedule, 1, table, moves.NVLINK, split=False)
        for link in LINKS:
            for count in devices or DEVICES:
                for split in (False, True):
                    for mode in MODES:
                        k = options(mode, count, split=split).k
                        distances = recorded.get((table.steps, k)) if mode == "adaptive" else None
                        if mode == "adaptive" and distances is None:
                            continue
                        seconds, counts = predict(mode, schedule, count, table, link, split=split, distances=distances)
                        rows.append({
                            "kind": "prediction", "table": table.name, "link": link.name, "devices": count,
                            "guidance_split": split, "mode": mode, "k": k, "steps": table.steps,
                            "rounds": counts.rounds, "evaluations": counts.evaluations,
                            "seconds": float(f"{seconds:.5g}"), "speedup": round(one / seconds, 4),
                        })  # fmt: skip
    return rows


def of_the_paper() -> list[dict[str, Any]]:
    """The paper's points, each beside its prediction from the model's sequential row."""
    rows = []
    for published in PAPER:
        schedule = stable_diffusion(published.steps)
        # SDXL's seconds are not known: speed-ups hardly depend on them
        table = Table("", "", (published.sequential_seconds or 8.0) / published.steps, published.latent_bytes)
        one, _ = predict("sequential", schedule, 1, table, moves.NVLINK, split=False)
        for (mode, count), measured in published.speedups.items():
            seconds, counts = predict(mode, schedule, count, table, moves.NVLINK, split=False)
            rows.append({
                "kind": "paper", "model": published.model, "mode": mode, "devices": count, "steps": published.steps,
                "published_speedup": round(measured, 3), "speedup_in_rounds": round(published.steps / counts.rounds, 3),
                "speedup": round(one / seconds, 3), "error": round(one / seconds / measured - 1, 4),
            })  # fmt: skip
    return rows


# --- validation ------------------------------------------------------------------------------------------------------


@cache
def _shapes(mode: str, schedule: Schedule, chosen: Options, lanes: int, guidance_scale: float) -> frozenset[Any]:
    """The sums of a plan."""
    seen = set()

    class Noting(MeasuredCosts):
        def round(self, calls: Sequence[Call]) -> float:
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
        pipeline.generate(asked[0], mode="sequential", num_inference_steps=1)  # binds an image
        return measured_costs(pipeline.backend, shapes)

    asked = prompts(pipeline.manifest, passes + 1)
    for number in tqdm(range(passes + 1), desc=f"validation on {lane_names(pipeline)}", unit="pass"):
        costs, images = costs_now(), []
        for mode, scale in cases:
            option = chosen[mode]
            with Recorder(pipeline.backend) as recorder:
                report = pipeline.generate(
                    asked[number], mode=mode, k=option.k, drafts=option.drafts, tolerance=option.tolerance,
                    iterations=option.iterations, num_inference_steps=steps, guidance_scale=scale, seed=number,
                ).report  # fmt: skip
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
                pipeline.generate(
                    prompt, mode="adaptive", k=k, tolerance=option.tolerance, drafts=option.drafts,
                    num_inference_steps=count,
                )  # fmt: skip
            found[count, k] = recorder.answers
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--passes", type=int, default=6, help="measured images per sampler")
    parser.add_argument("--steps", type=int, default=50, help="of the validation")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0, 1.0], dest="guidance_scales")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of adaptive")
    parser.add_argument("--branch-share", type=float, default=0.56, help="of an evaluation, for one of its branches")
    parser.add_argument("--evaluation-seconds", type=float, default=0.005, help="of a fast device, assumed")
    parser.add_argument("--no-validation", action="store_false", dest="validation", help="predictions only: no model")
    parser.add_argument("--plot", type=Path, help="PNG of the predictions")


def measure(
    model: str, build: Path, devices: str, passes: int, steps: int, guidance_scales: Sequence[float], tolerance: float,
    branch_share: float, evaluation_seconds: float, plot: Path | None, *, validation: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Predictions, the paper's points, and the validation on one lane and on the lanes that were asked for."""
    for name, value, low in (("passes", passes, 1), ("branch_share", branch_share, 0.5), ("steps", steps, 1)):
        if value < low:
            raise ParameterError(name, f"{name} must be at least {low:g}, not {value:g}")
    tables = [
        Table("SD 1.5 on V100", "the paper's 2.68 s for 50 steps on one V100", 2.68 / 50, 32 << 10),
        Table("SDXL on a fast device", f"{evaluation_seconds * 1e3:g} ms, assumed", evaluation_seconds, 128 << 10),
    ]
    recorded: dict[tuple[int, int], list[float]] = {}
    rows: list[dict[str, Any]] = []
    if validation:
        for lanes in dict.fromkeys((one_lane(devices), devices)):
            pipeline = Pipeline.load(model, lanes, build)
            try:
                rows += validate(pipeline, steps, guidance_scales, passes, tolerance)
                if lanes == devices:
                    ks = {options("adaptive", n, split=split).k for n in DEVICES for split in (False, True)}
                    recorded = record(pipeline, [table.steps for table in tables], ks)
            finally:
                pipeline.close()
        last = [row for row in rows if row["kind"] == "costs"][-1]
        lane = last["call_seconds"][max(last["call_seconds"])]
        name = f"{model}, one lane of this machine each"
        tables.append(Table(name, MEASURED, lane[2], last["latent_bytes"], branch_share=lane[1] / lane[2]))
    tables[:2] = [Table(t.name, t.source, t.evaluation, t.latent_bytes, t.steps, branch_share) for t in tables[:2]]
    rows += [{"kind": "table", **vars(table)} for table in tables]
    rows += [{"kind": "link", **vars(link)} for link in LINKS]
    rows += of_the_paper() + predictions(tables, recorded)
    if plot:
        with figure(rows) as drawn:
            png(drawn, plot)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The validation where there is one, the paper's points, and the predictions for one link."""
    return "\n\n".join(filter(None, (validation_table(rows), paper_table(rows), prediction_table(rows))))


def assumptions(rows: Sequence[dict[str, Any]]) -> str:
    """What predictions are made with, one line per model and device."""
    return "\n".join(
        f"- {row['name']}: {1e3 * row['evaluation']:.1f} ms an evaluation ({row['source']}), a branch of it "
        f"{100 * row['branch_share']:.0f} % of that{' (assumed)' if row['source'] != MEASURED else ''}."
        for row in rows
        if row["kind"] == "table"
    )


def validation_table(rows: Sequence[dict[str, Any]]) -> str:
    """Measured seconds beside what was predicted of them: median times the median of the ratios image by image."""
    checked = [row for row in rows if row["kind"] == "validation"]
    lines = ["| lanes | mode | guidance | rounds | images | measured | predicted | error (95 % interval) |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['lanes']} | {r['mode']} | {r['guidance_scale']:g} | {r['rounds']:g} | {r['images']} "
        f"| {r['measured_seconds']:.3f} s | {r['measured_seconds'] * (1 + r['error']['median']):.3f} s "
        f"| {_percent(r['error'])} |"
        for r in checked
    ]
    return "\n".join(lines) if checked else ""


def paper_table(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's speed-ups beside the predicted ones."""
    lines = ["| model | mode | devices | published | predicted | N/rounds | error |", "|---|---|---|---|---|---|---|"]
    lines += [
        f"| {r['model']} | {r['mode']} | {r['devices']} | {r['published_speedup']:.2f}× | {r['speedup']:.2f}× "
        f"| {r['speedup_in_rounds']:.2f}× | {100 * r['error']:+.1f} % |"
        for r in rows
        if r["kind"] == "paper"
    ]
    return "\n".join(lines)


def in_short(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How far predictions are off: what is typical, and the worst row."""
    said = []
    checked = [row for row in rows if row["kind"] == "validation"]
    if checked:
        worst = max(checked, key=lambda row: abs(row["error"]["median"]))
        reach = max(abs(row["error"][end]) for row in checked for end in ("low", "high"))
        usual = _typical([row["error"]["median"] for row in checked])
        said.append(
            f"The cost model's seconds are {usual} off the measured ones (median of {len(checked)} rows), at most "
            f"{100 * worst['error']['median']:+.1f} % ({_named(worst)}); the rows' 95 % intervals, of "
            f"{worst['images']} images each, reach {100 * reach:.1f} %."
        )
    published = [row for row in rows if row["kind"] == "paper"]
    if published:
        worst = max(published, key=lambda row: abs(row["error"]))
        said.append(
            f"Round counts alone are {_typical([row['error'] for row in published])} off the paper's {len(published)} "
            f"published speed-ups (median), at most {100 * worst['error']:+.1f} % ({worst['model']}, {worst['mode']}, "
            f"{worst['devices']} devices)."
        )
    return said


def _typical(errors: Sequence[float]) -> str:
    return f"{100 * float(np.median(np.abs(errors))):.1f} %"


def prediction_table(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted speed-ups over NVLink on 2, 4, 8 and 16 devices."""
    several = [r for r in rows if r["kind"] == "prediction" and r["link"] == "NVLink" and r["devices"] in (2, 4, 8, 16)]
    counts = list(dict.fromkeys(r["devices"] for r in several))
    lines = [f"| model and device | guidance | mode | {' | '.join(f'{n} devices' for n in counts)} |",
             "|---" * (3 + len(counts)) + "|"]  # fmt: skip
    for key in dict.fromkeys((r["table"], r["guidance_split"], r["mode"]) for r in several):
        found = [r["speedup"] for r in several if (r["table"], r["guidance_split"], r["mode"]) == key]
        name, split, mode = key
        lines.append(
            f"| {name} | {'split' if split else 'together'} | {mode} | {' | '.join(f'{x:.2f}×' for x in found)} |"
        )
    return "\n".join(lines)


def _percent(error: dict[str, float]) -> str:
    median, low, high = (f"{100 * error[name]:+.1f}" for name in ("median", "low", "high"))
    return f"{median} % ({low} to {high} %)"


@contextmanager
def figure(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Two plots of predictions: guidance split or not, and links."""
    predicted = [row for row in rows if row["kind"] == "prediction"]
    tables = [row["name"] for row in rows if row["kind"] == "table"]
    with drawing(10.5, 5.4, ncols=2) as (whole, (split, links)):
        _split_plot(split, predicted, tables[0])
        _link_plot(links, predicted, tables[1])
        yield whole


@contextmanager
def validation_figure(rows: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    """Errors of the predicted seconds, with their intervals."""
    checked = [row for row in reversed(rows) if row["kind"] == "validation"]
    with drawing(10.5, 0.24 * len(checked) + 0.8) as (whole, axes):
        axes.axvline(0, color=colour("ink"), linewidth=0.8)
        for at, row in enumerate(checked):
            error = {key: 100 * value for key, value in row["error"].items()}
            spread = [[error["median"] - error["low"]], [error["high"] - error["median"]]]
            axes.errorbar(error["median"], at, xerr=spread, fmt="o", color=colour(row["mode"]), capsize=2)
        axes.set_yticks(range(len(checked)), map(_named, checked), fontsize=8.5)
        axes.set_xlabel("error of the predicted seconds, %: median of images, and its 95 % interval")
        axes.grid(visible=False, axis="y")
        yield whole


def _named(row: dict[str, Any]) -> str:
    guided = "with guidance" if row["guidance_scale"] > 1 else "without guidance"
    return f"{row['mode']}, {guided}, {row['lanes']} lane{'s'[: row['lanes'] - 1]}"


def _line(
    predicted: Sequence[dict[str, Any]], **wanted: Any
) -> tuple[list[int], list[float]]:  # fmt: skip
    found = [row for row in predicted if all(row[key] == value for key, value in wanted.items())]
    return [row["devices"] for row in found], [row["speedup"] for row in found]


def _axes(axes: Any, title: str) -> None:
    axes.set(title=title, xlabel="devices for one image", ylabel="speed-up over one device")
    axes.set_xticks(DEVICES)
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _split_plot(axes: Any, predicted: Sequence[dict[str, Any]], name: str) -> None:
    for mode in MODES:
        for split in (False, True):
            x, y = _line(predicted, table=name, link="NVLink", mode=mode, guidance_split=split)
            if x and not (mode == "sequential" and not split):
                label = f"{mode}{', guidance split' if split else ''}"
                axes.plot(x, y, "-" if split else "--", color=colour(mode), label=label)
    _axes(axes, f"All modes over NVLink, {name}")


def _link_plot(axes: Any, predicted: Sequence[dict[str, Any]], name: str) -> None:
    for link, style in zip(LINKS, ("-", "--", ":"), strict=True):
        for mode in (CONSERVATIVE, AGGRESSIVE):
            x, y = _line(predicted, table=name, link=link.name, mode=mode, guidance_split=False)
            axes.plot(x, y, style, color=colour(mode), label=f"{mode}, {link.name}")
    _axes(axes, f"Links, {name}")
