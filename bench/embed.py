"""`python -m bench embed`: `libdriffusion` without Python against the Python engine, side by side in one run.

Images of 50 steps with guidance on two lanes, in turns: seconds each, overhead per round with a model that does
nothing, four threads at once, start-up to the first image, resident memory. Needs `make embed`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.models import model_arguments
from bench.statistics import bootstrap, interval, ratio
from engines.devices import parse_devices
from engines.errors import BundleError
from engines.load import build_missing
from engines.manifest import DENOISER, File
from engines.store import BUILD, Bundle
from runtime.pipeline import Pipeline

PROMPT = "a large red star at the left on blue background"
MEASURE = BUILD / "embed" / "release" / "example" / "measure"
STARTED = """
import time
from runtime import Pipeline
begun = time.perf_counter()
pipeline = Pipeline.load({bundle!r}, devices={devices!r})
opened = time.perf_counter()
pipeline.generate({prompt!r}, mode={mode!r}, k=2, num_inference_steps={steps})
first = time.perf_counter()
status = open("/proc/self/status").read().split()
print(opened - begun, first - opened, status[status.index("VmRSS:") + 1], flush=True)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench embed`."""
    model_arguments(parser)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=12, help="images of each, in turns")
    parser.add_argument("--starts", type=int, default=5, help="processes of each that are started")


class Player:
    """A process that plays a program; see runtime/embed/example/measure.cc."""

    def __init__(self, bundle: Path, program: Path, devices: str) -> None:
        begun = time.perf_counter()
        words = [str(MEASURE), str(bundle), str(program), devices]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.start = self._answer()
        self.start["process"] = time.perf_counter() - begun

    def ask(self, line: str) -> dict[str, float]:
        """One command and its answer."""
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise BundleError(f"{MEASURE} ended with {self._process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


@contextmanager
def null_bundle(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle with a denoiser that gives back its state: what is left of a round is the engine's own."""
    import onnx
    from onnx import helper

    network = bundle.manifest.networks[DENOISER]
    output, sample = network.outputs[0], network.inputs[0]
    inputs = [helper.make_tensor_value_info(one.name, onnx.TensorProto.FLOAT, one.shape) for one in network.inputs]
    outputs = [helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, output.shape)]
    nodes = [helper.make_node("Identity", [sample.name], [output.name])]
    graph = helper.make_graph(nodes, "null", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=bundle.folder.parent) as scratch:
        folder = Path(scratch) / "null"
        shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("plans", network.file.name))
        onnx.save(model, folder / network.file.name)
        changed = network.model_copy(update={"file": File.of(folder / network.file.name)})
        networks = dict(bundle.manifest.networks) | {DENOISER: changed}
        manifest = bundle.manifest.model_copy(update={"model": "null", "networks": networks})
        manifest.write(folder)
        made = Bundle(folder, manifest)
        build_missing(made, parse_devices("cpu*2"))
        yield made


def started(bundle: Path, devices: str, mode: str, steps: int) -> dict[str, float]:
    """A fresh Python process up to its first image."""
    code = STARTED.format(bundle=str(bundle), devices=devices, prompt=PROMPT, mode=mode, steps=steps)
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        seconds = time.perf_counter() - begun
    opened, first, resident = map(float, line.split())
    return {"open": opened, "first": first, "resident_kib": resident, "process": seconds}


def side_by_side(
    pipeline: Pipeline, player: Player, mode: str, steps: int, turns: int
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Images in turns, after one of each that is not counted."""
    own, other = [], []
    for turn in range(turns + 1):
        report = pipeline.generate(PROMPT, mode=mode, k=2, num_inference_steps=steps, seed=turn).report
        own.append({
            "total": report.seconds["total"], "denoise": report.seconds["denoise"],
            "critical": report.critical_seconds or 0.0, "rounds": float(report.rounds),
        })  # fmt: skip
        other.append(player.ask(f"image {turn}"))
    return own[1:], other[1:]


def overhead(images: list[dict[str, float]]) -> dict[str, float]:
    """Microseconds of a round beside its longest call, per image."""
    return bootstrap([(one["denoise"] - one["critical"]) / one["rounds"] * 1e6 for one in images])


def threads(pipeline: Pipeline, player: Player, mode: str, steps: int, images: int) -> dict[str, Any]:
    """Four threads at once, in turns, seconds for all images of a turn."""
    own, other, shared = [], [], []
    for _ in range(4):
        begun = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            made = [
                pool.submit(pipeline.generate, PROMPT, mode=mode, k=2, num_inference_steps=steps, seed=seed)
                for seed in range(4 * images)
            ]
        own.append(time.perf_counter() - begun)
        found = player.ask(f"threads 4 {images}")
        other.append(found["seconds"])
        lanes = float(np.mean([one.result().report.lanes_per_round for one in made]))
        shared.append((lanes, found["lanes_per_round"]))
    return {
        "python_images_per_second": bootstrap([4 * images / one for one in own]),
        "library_images_per_second": bootstrap([4 * images / one for one in other]),
        "speedup": ratio(own, other),
        "lanes_per_round": [round(value, 2) for value in np.mean(shared, axis=0).tolist()],
    }


def measure(model: str, build: Path, devices: str, steps: int, turns: int, starts: int) -> list[dict[str, Any]]:
    """Rows of the result file."""
    if not MEASURE.is_file():
        raise BundleError(f"{MEASURE} is missing: build the library with `make embed`")
    bundle, rows = Bundle.open(model, build), list[dict[str, Any]]()
    with null_bundle(bundle) as null, tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "program"
        for mode in ("sequential", "aggressive"):
            row: dict[str, Any] = {"model": model, "mode": mode, "steps": steps, "devices": devices, "k": 2}
            for opened in (bundle, null):
                pipeline = Pipeline(opened, devices)
                pipeline.program(program, mode=mode, k=2, num_inference_steps=steps)
                player = Player(opened.folder, program, devices)
                own, other = side_by_side(pipeline, player, mode, steps, turns if opened is bundle else 10 * turns)
                if opened is bundle:
                    row["python_seconds"] = bootstrap([one["total"] for one in own])
                    row["library_seconds"] = bootstrap([one["total"] for one in other])
                    row["speedup"] = ratio([one["total"] for one in own], [one["total"] for one in other])
                    row["threads"] = threads(pipeline, player, mode, steps, 2)
                else:
                    row["python_overhead_us_per_round"] = overhead(own)
                    row["library_overhead_us_per_round"] = overhead(other)
                    row["python_null_us_per_round"] = bootstrap([o["denoise"] / o["rounds"] * 1e6 for o in own])
                    row["library_null_us_per_round"] = bootstrap([o["denoise"] / o["rounds"] * 1e6 for o in other])
                player.close()
                pipeline.close()
            rows.append(row)
        Pipeline(bundle, devices).program(program, mode="aggressive", k=2, num_inference_steps=steps)
        rows.append(starting(bundle, program, devices, steps, starts))
    return rows


def starting(bundle: Bundle, program: Path, devices: str, steps: int, starts: int) -> dict[str, Any]:
    """Processes in turns: seconds from starting them to their first image, and their resident memory then."""
    own, other = [], []
    for _ in range(starts):
        own.append(started(bundle.folder, devices, "aggressive", steps))
        player = Player(bundle.folder, program, devices)
        other.append(player.start)
        player.close()
    row: dict[str, Any] = {"name": "start", "mode": "aggressive", "steps": steps, "devices": devices}
    for name, several in (("python", own), ("library", other)):
        row[f"{name}_open_seconds"] = bootstrap([one["open"] for one in several])
        row[f"{name}_process_to_first_image_seconds"] = bootstrap([one["process"] for one in several])
        row[f"{name}_resident_mib"] = round(float(np.median([one["resident_kib"] for one in several])) / 1024)
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    lines = []
    for row in rows:
        if row.get("name") == "start":
            lines.append(
                f"start to first image: Python {interval(row['python_process_to_first_image_seconds'])} s, library "
                f"{interval(row['library_process_to_first_image_seconds'])} s; resident {row['python_resident_mib']} "
                f"and {row['library_resident_mib']} MiB"
            )
            continue
        lines.append(
            f"{row['mode']}: Python {interval(row['python_seconds'], 3)} s, library "
            f"{interval(row['library_seconds'], 3)} s, ratio {interval(row['speedup'], 3)}; overhead per round "
            f"{interval(row['python_overhead_us_per_round'], 1)} and "
            f"{interval(row['library_overhead_us_per_round'], 1)} µs; four threads "
            f"{interval(row['threads']['speedup'])}×"
        )
    return "\n".join(lines)
