"""`python -m bench run`: latency of the denoising loop: samplers, lanes, schedulers and steps, with baselines.

Everything in one cell (scheduler, steps, guidance) is interleaved image by image, so that other load on the machine
affects all rows alike, and speed-ups are medians of ratios measured side by side.

The baselines: sequential on one lane; one session with all cores, of ONNX Runtime and of OpenVINO, as each is used
by itself; `diffusers`' own pipeline, eager and compiled, in a process of its own. On GPUs, sequential on the first of
them is TensorRT replayed as CUDA graphs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.energy import Meter
from bench.floor import enqueued, replay
from bench.models import EMBEDDED, Checkpoint, checkpoint, model_arguments, one_lane, prompts
from bench.statistics import interval, median, middle, percentiles, quantile, ratio, scaled
from bench.torch_baseline import NotPossibleHereError, Setting, TorchBaseline, Wanted
from engines.base import Array, LaneCall
from engines.devices import parse_devices, precision
from engines.errors import DeviceError, ParameterError
from engines.host import HostBackend
from engines.load import build_missing
from engines.runtimes import RUNTIMES
from engines.store import Bundle
from runtime.calibrate import calibrate
from runtime.call import MODES, Call, add_options
from runtime.distances import drift, psnr
from runtime.pipeline import Pipeline, Result
from runtime.provenance import load_average
from runtime.sampling.noise import gaussian

PAUSE = 0.02  # seconds between measurements: threads of the last session stop spinning
PLAYED = [*(mode for mode in MODES[1:] if mode != "speculative"), "auto"]  # with any scheduler
PARTS = ("model", "combine", "copy", "wait", "python")
TORCH_LIMIT = 240.0  # seconds for torch.compile to be ready
IMAGES_TO_CALIBRATE = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.set_defaults(devices=["cpu*2"], model=[EMBEDDED])
    for action in parser._actions:
        if action.dest in ("devices", "model"):
            action.nargs, action.help = "+", f"one or several: {action.help}"
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        default=PLAYED,
        metavar="MODE",
    )
    add_options(parser, ["k", "tolerance"], {"tolerance": 0.01})
    parser.add_argument("--schedulers", nargs="+", default=[None], help="default: the model's own")
    parser.add_argument("--steps", type=int, nargs="+", default=[50])
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[4.0, 1.0], dest="guidance_scales", help="1 is without guidance"
    )
    parser.add_argument("--images", type=int, default=12, help="images per row")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    parser.add_argument("--no-torch", action="store_false", dest="torch", help="leave diffusers out")


class Clock:
    """Adds up a host backend's measurements: seconds by part since the latents were bound."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = 0.0

    def __call__(self, part: str) -> None:
        """The part that ends now."""
        now = time.perf_counter()
        if part == "before":
            self.parts = {}
        else:
            self.parts[part] = self.parts.get(part, 0.0) + now - self._last
        self._last = now

    def split(self, seconds: float, model: float) -> dict[str, float]:
        """All of the loop's seconds, in PARTS.

        model: the longest call of every round. combine: sums over latents, and distances. copy: latents to where calls
        and sums read them. wait: from the first hand-over to a lane to the end of the last one, beyond its call.
        python: what is left: the plan, binding calls to memory, counting.
        """
        known = {"model": model, "combine": self.parts.get("combine", 0.0), "copy": self.parts.get("copy", 0.0),
                 "wait": self.parts.get("lanes", 0.0) - model}  # fmt: skip
        return known | {"python": seconds - sum(known.values())}


@dataclass
class Contender:
    """One way to make the same image, with its measurements. `draw` returns seconds, latents and the result."""

    name: str
    baseline: str | None
    asked_mode: str | None
    draw: Callable[[str, int, Array], tuple[float, Array, Result | None]]
    pipeline: Pipeline | None = None
    meter: Meter | None = None
    seconds: list[float] = field(default_factory=list)
    floor_seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    reason: str | None = None

    def measure(self, prompt: str, seed: int, noise: Array, reference: tuple[Array, Result] | None) -> Any:
        """One image and one replay of its calls; the latents and the result."""
        time.sleep(PAUSE)
        backend = self.pipeline.backend if self.pipeline else None
        clock, rounds = Clock(), None
        if isinstance(backend, HostBackend):
            backend.mark = clock
        elif backend is not None:
            rounds = _recorded(backend)
        used, processor = self.meter.joules() if self.meter else None, time.process_time()
        try:
            seconds, latents, result = self.draw(prompt, seed, noise)
        finally:
            if isinstance(backend, HostBackend):
                backend.mark = lambda part: None
            elif backend is not None:
                vars(backend).pop("predict")
        self.seconds.append(seconds)
        if result is not None:
            self.processor_seconds.append(time.process_time() - processor)
            self.results.append(result)
        if self.meter and used is not None:
            self.joules.append((self.meter.joules() or 0.0) - used)
        time.sleep(PAUSE)
        if isinstance(backend, HostBackend):
            assert result is not None and result.report.critical_seconds is not None
            self.parts.append(clock.split(seconds, result.report.critical_seconds))
            self.floor_seconds.append(replay(backend))
        elif rounds is not None and backend is not None:
            self.floor_seconds.append(enqueued(backend, rounds))
        if reference is not None and latents.shape == reference[0].shape:
            self.drift.append(drift(latents, reference[0]))
            if result is not None:
                self.psnr.append(psnr(result.images, reference[1].images))
        return latents, result

    def forget(self) -> None:
        """Ends the warm-up."""
        for values in (self.seconds, self.floor_seconds, self.processor_seconds, self.joules, self.parts, self.results,
                       self.drift, self.psnr):  # fmt: skip
            values.clear()

    def row(self, cell: dict[str, Any], baselines: dict[str, Contender]) -> dict[str, Any]:
        """One row of the result file; every speed-up is against what was measured beside it."""
        row = {"name": self.name, "baseline": self.baseline, "asked_mode": self.asked_mode, **cell}
        if self.reason is not None:
            return row | {"status": "not possible here", "reason": self.reason}
        row |= {"images": len(self.seconds), "seconds": percentiles(self.seconds)}
        row["speedups"] = {
            name: ratio(other.seconds, self.seconds) if other.reason is None else None
            for name, other in baselines.items()
        }
        row["drift"] = {"median": median(self.drift), "p90": quantile(self.drift, 0.9)}
        row["psnr"] = {"median": median(self.psnr)}
        return row | self._of_engine(row) if self.results else row

    def _of_engine(self, row: dict[str, Any]) -> dict[str, Any]:
        """What only this engine's own rows know."""
        assert self.pipeline is not None
        reports = [result.report for result in self.results]
        typical = reports[middle([report.rounds for report in reports])]
        keep = ("mode", "k", "lanes", "devices", "guidance_split", "drafts", "rounds", "evaluations", "calls", "auto")
        of_rounds = typical.steps / typical.rounds
        held = {lane.device for lane in self.pipeline.devices} if self.pipeline.devices[0].gpu is not None else None
        count = len(held) if held else sum(lane.threads for lane in self.pipeline.devices)
        stages = {name: median([report.seconds[name] for report in reports]) for name in reports[0].seconds}
        more: dict[str, Any] = {key: typical.to_dict()[key] for key in keep} | {
            "stages": stages,
            "speedup_in_rounds": round(of_rounds, 4),
            "share_of_rounds": scaled(row["speedups"]["one lane"], 1 / of_rounds),
            "floor_seconds": percentiles(self.floor_seconds) if self.floor_seconds else None,
            "share_of_floor": ratio(self.floor_seconds, self.seconds) if self.floor_seconds else None,
            "device_seconds": round(count * float(np.median(self.seconds)), 5),
            "processor_seconds": median(self.processor_seconds),
            "joules": median(self.joules) if self.joules else None,
            "joules_reason": self.meter.reason if self.meter else None,
            "us_per_round": None, "overhead_us_per_round": None,
        }  # fmt: skip
        if self.parts:
            chosen = middle(self.seconds)
            rounds = reports[chosen].rounds
            split = {part: round(self.parts[chosen][part] / rounds * 1e6, 1) for part in PARTS}
            more["us_per_round"] = split | {"total": round(self.seconds[chosen] / rounds * 1e6, 1)}
            more["overhead_us_per_round"] = round(sum(split.values()) - split["model"], 1)
        return more


def _recorded(backend: Any) -> list[Sequence[LaneCall]]:
    """The rounds of the next image, as the backend is asked for them."""
    rounds: list[Sequence[LaneCall]] = []
    predict = backend.predict

    def recording(calls: Sequence[LaneCall]) -> None:
        rounds.append(calls)
        predict(calls)

    backend.predict = recording
    return rounds


@dataclass
class Machine:
    """What all cells share: pipelines by lanes, and the processes with diffusers."""

    model: str
    build: Path
    pipelines: dict[str, Pipeline] = field(default_factory=dict)
    torches: dict[bool, TorchBaseline | str] = field(default_factory=dict)

    def pipeline(self, devices: str) -> Pipeline:
        """The model on some lanes."""
        if devices not in self.pipelines:
            self.pipelines[devices] = Pipeline.load(self.model, devices, self.build)
        return self.pipelines[devices]

    def compile(self, devices: str) -> str | None:
        """Compiles the model for lanes where that is missing; the reason why they are not possible here, or None."""
        lanes = parse_devices(devices)
        try:
            build_missing(Bundle.open(self.model, self.build, precision(lanes)), lanes)
        except DeviceError as error:
            return str(error)
        return None

    def diffusers(self, checkpoint: Checkpoint, device: str, *, compiled: bool) -> TorchBaseline | str:
        """The process with diffusers, or the reason why there is none."""
        if compiled not in self.torches:
            try:
                wanted = Wanted(checkpoint.folder, compiled, device, checkpoint.loras)
                self.torches[compiled] = TorchBaseline(wanted, TORCH_LIMIT)
            except NotPossibleHereError as error:
                self.torches[compiled] = str(error)
        return self.torches[compiled]

    def close(self) -> None:
        """Stops everything."""
        for pipeline in self.pipelines.values():
            pipeline.close()
        for process in self.torches.values():
            if isinstance(process, TorchBaseline):
                process.close()


def baseline_devices(devices: str) -> dict[str, str]:
    """The lanes of the baselines beside some lanes: one lane, and one session on everything per runtime."""
    first = one_lane(devices)
    if devices.startswith("cuda"):
        return {"one lane": first}
    return {"one lane": first, "one session": "cpu", "openvino": "cpu@openvino"}


NAMES = {
    "cpu@1": "sequential, one lane, one thread", "cpu": "sequential, one session, all cores",
    "cpu@openvino": "sequential, OpenVINO, one stream, all cores",
    "torch": "diffusers, eager", "compiled": "diffusers, torch.compile",
}  # fmt: skip


def contenders(
    machine: Machine, devices: Sequence[str], modes: Sequence[str], k: int | None, tolerance: float,
    cell: dict[str, Any], *, torch: bool,
) -> Iterator[Contender]:  # fmt: skip
    """The baselines of a cell, then every mode on every set of lanes."""

    def engine(name: str, baseline: str | None, lanes: str, mode: str) -> Contender:
        pipeline = machine.pipeline(lanes)
        options: dict[str, Any] = {"mode": mode, "num_inference_steps": cell["steps"], "scheduler": cell["scheduler"],
                                   "guidance_scale": cell["guidance_scale"]}  # fmt: skip
        options |= {"k": k} if mode != "auto" and k is not None else {}
        options |= {"tolerance": tolerance} if mode in ("srds", "adaptive") else {}
        call = Call(**options)

        def draw(prompt: str, seed: int, noise: Array) -> tuple[float, Array, Result | None]:
            result = pipeline.run(replace(call, prompt=prompt, seed=seed, latents=noise))
            return result.report.seconds["denoise"], result.latents, result

        return Contender(name, baseline, mode, draw, pipeline, Meter(pipeline.devices))

    for name, lanes in baseline_devices(devices[0]).items():
        missing = machine.compile(lanes) if name == "openvino" else None
        if missing is not None:
            yield _impossible(NAMES[lanes], name, missing)
            continue
        how = RUNTIMES[machine.pipeline(lanes).devices[0].runtime].title
        yield engine(NAMES.get(lanes, f"sequential, {lanes}, {how}"), name, lanes, "sequential")
    for lanes, mode in product(devices, modes):
        count = len(machine.pipeline(lanes).devices)
        suffix = f", tolerance {tolerance:g}" if mode in ("srds", "adaptive") else ""
        where = f"{count} lanes" if len(devices) == 1 else lanes
        yield engine(f"{mode}, {where}{suffix}", None, lanes, mode)
    if torch:
        yield from _of_torch(machine, "cuda" if devices[0].startswith("cuda") else "cpu", cell)


def _of_torch(machine: Machine, device: str, cell: dict[str, Any]) -> Iterator[Contender]:
    manifest = next(iter(machine.pipelines.values())).manifest
    setting = Setting(cell["scheduler"], cell["steps"], cell["guidance_scale"])

    def draw(
        process: TorchBaseline, prompt: str, seed: int, noise: Array
    ) -> tuple[float, Array, Result | None]:  # fmt: skip
        seconds, latents = process.image(prompt, noise, setting)
        return seconds, latents, None

    for compiled, name in ((False, "torch"), (True, "compiled")):
        process = machine.diffusers(checkpoint(manifest), device, compiled=compiled)
        key = "diffusers compiled" if compiled else "diffusers"
        if isinstance(process, str):
            yield _impossible(NAMES[name], key, process)
        else:
            yield Contender(NAMES[name], key, None, partial(draw, process))


def _impossible(name: str, baseline: str, reason: str) -> Contender:
    return Contender(name, baseline, None, lambda *_: (0.0, np.zeros(0, np.float32), None), reason=reason)


def measure_cell(cell: dict[str, Any], found: Sequence[Contender], asked: Sequence[str], warmup: int) -> None:
    """All contenders, interleaved; one that fails in the warm-up keeps the reason."""
    first = found[0]
    assert first.pipeline is not None
    shape = first.pipeline.latent_shape
    label = f"{cell['scheduler']}, {cell['steps']} steps, guidance {cell['guidance_scale']:g}"
    for number, prompt in enumerate(tqdm(asked, desc=label, unit="image")):
        if number == warmup:
            for contender in found:
                contender.forget()
        noise = gaussian(number, 0, 0, shape)[None]
        reference = first.measure(prompt, number, noise, None)
        for contender in found[1:]:
            if contender.reason is not None:
                continue
            try:
                contender.measure(prompt, number, noise, reference)
            except (NotPossibleHereError, ParameterError) as error:  # also a sampler that cannot play this scheduler
                contender.reason = str(error)


def measure(
    model: Sequence[str], build: Path, devices: Sequence[str], modes: Sequence[str], k: int | None, tolerance: float,
    schedulers: Sequence[str | None], steps: Sequence[int], guidance_scales: Sequence[float], images: int, warmup: int,
    prompts: Path | None, *, torch: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the result file, cell by cell."""
    for name, value, low in (("images", images, 1), ("warmup", warmup, 0)):
        if value < low:
            raise ParameterError(name, f"{name} must be at least {low}, not {value}")
    rows: list[dict[str, Any]] = []
    for name in model:
        machine = Machine(name, build)
        try:
            for scheduler, count, guidance in product(schedulers, steps, guidance_scales):
                pipeline = machine.pipeline(devices[0])
                known = pipeline.setting(scheduler, count, guidance).scheduler
                cell = {"model": pipeline.manifest.model, "scheduler": known, "steps": count,
                        "guidance_scale": guidance}  # fmt: skip
                if "auto" in modes:
                    for lanes in devices:
                        wanted = ([count], guidance, scheduler, IMAGES_TO_CALIBRATE, math.inf)
                        calibrate(name, build, lanes, *wanted, again=False)
                rows += rows_of(machine, devices, modes, k, tolerance, cell, images, warmup, prompts, torch=torch)
        finally:
            machine.close()
    return rows


def rows_of(
    machine: Machine, devices: Sequence[str], modes: Sequence[str], k: int | None, tolerance: float,
    cell: dict[str, Any], images: int, warmup: int, file: Path | None, *, torch: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """One cell."""
    found = list(contenders(machine, devices, modes, k, tolerance, cell, torch=torch))
    pipeline = machine.pipeline(devices[0])
    before = load_average()
    measure_cell(cell, found, prompts(pipeline.manifest, warmup + images, file=file), warmup)
    baselines = {contender.baseline: contender for contender in found if contender.baseline}
    loads = {"load_average": round(max(before, load_average()), 2)}
    return [contender.row(cell, baselines) | loads for contender in found]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Per cell, a table of speed and one of where a round goes."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        guided = f"guidance {row['guidance_scale']:g}" if row["guidance_scale"] > 1 else "without guidance"
        cells.setdefault(f"`{row['model']}`, {row['scheduler']}, {row['steps']} steps, {guided}", []).append(row)
    return "\n\n".join(f"**{name}**\n\n{_speed(several)}\n\n{_rounds(several)}" for name, several in cells.items())


def _speed(rows: Sequence[dict[str, Any]]) -> str:
    against = list(dict.fromkeys(row["baseline"] for row in rows if row["baseline"]))
    ratios = [f"× {name}" for name in against]
    heads = ["", "rounds", "seconds (p20–p80)", "p99", *ratios, "of N/rounds", "of the floor", "drift"]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in rows:
        if "reason" in row:
            lines.append(_line([row["name"], "", f"not possible here: {row['reason']}", *[""] * (len(heads) - 3)]))
            continue
        s, drifted = row["seconds"], row["drift"]["median"]
        played = f": {row['mode']}, k = {row['k']}" if row["asked_mode"] == "auto" else ""
        cells = [row["name"] + played, str(row.get("rounds", "")), f"{s['p50']:.3f} ({s['p20']:.3f}–{s['p80']:.3f})"]
        cells += [f"{s['p99']:.3f}", *(interval(row["speedups"].get(name)) for name in against)]
        cells += [interval(row.get("share_of_rounds")), interval(row.get("share_of_floor"), 3)]
        lines.append(_line([*cells, "" if drifted is None else f"{drifted:.1e}"]))
    return "\n".join(lines)


def _rounds(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["µs per round", "model calls", "combine", "copy", "wait", "Python", "in all", "device-seconds per image",
             "joules per image"]  # fmt: skip
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for row in rows:
        if "rounds" not in row:
            continue
        split = row["us_per_round"] or {}
        joules = "not measurable here" if row["joules"] is None else f"{row['joules']:.2f}"
        cells = [f"{split[part]:.0f}" if split else "" for part in (*PARTS, "total")]
        lines.append(_line([row["name"], *cells, f"{row['device_seconds']:.3f}", joules]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
