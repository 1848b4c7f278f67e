"""`python -m bench calls`: one call of the denoiser, by runtime, shapes and precision, and what low precision costs.

All ways run in one process on one thread, in turns, for each number of rows. ONNX Runtime with dynamic shapes is what
lanes use; with static ones it is told all sizes when a session is made. OpenVINO's lanes use static shapes. Low
precision also draws images, sequentially and from the same noise as fp32.

int8 is an experiment that no lane uses: NNCF quantizes weights and activations of the exported graph, calibrated on
noisy latents of captions that are not measured. NNCF is not among this project's packages (`pip install nncf`).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bench.models import EMBEDDED, scenes
from bench.quality import read_back
from bench.statistics import bootstrap, median, ratio
from engines import openvino as ov
from engines.base import Array
from engines.errors import EngineError, ParameterError
from engines.manifest import DENOISER, File
from engines.ort import Session, build_missing
from engines.store import BUILD, Bundle
from runtime.call import Call
from runtime.distances import drift
from runtime.pipeline import Pipeline
from runtime.tokenizer import PromptTokenizer

INT8 = "int8"
BASE = "onnxruntime"
CALIBRATED = 64  # captions for int8, one noisy latent each
WARM_UP = 3
Inputs = Mapping[str, Array]
Way = Callable[[Inputs], Array]


@dataclass(frozen=True)
class Model:
    """A bundle, and the inputs that its denoiser gets for some captions: one row each."""

    bundle: Bundle
    inputs: Inputs

    def rows(self, count: int) -> Inputs:
        """The first rows."""
        return {name: np.ascontiguousarray(value[:count]) for name, value in self.inputs.items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--rows", type=int, nargs="+", default=ov.BATCHES, help="of a call")
    parser.add_argument("--repeats", type=int, default=60, help="calls per way and number of rows")
    parser.add_argument("--images", type=int, default=100, help="captions that low precision draws; 0 draws none")


def measure(build: Path, rows: Sequence[int], repeats: int, images: int) -> list[dict[str, Any]]:
    """A row per way, with milliseconds per row of a call; then one per precision that has drawn images."""
    if min(rows) < 1 or repeats < 1 or images < 0:
        raise ParameterError("rows", "rows and repeats must be at least 1, images 0 or more")
    bundle = Bundle.open(EMBEDDED, build)
    with tempfile.TemporaryDirectory(prefix="calls-") as folder:
        quantized = quantize(bundle, Path(folder)) if find_spec("nncf") else None
        found = timed(Model(bundle, noisy_inputs(bundle, max(rows), seed=0)), quantized, rows, repeats)
        found += drawn(bundle, quantized, images) if images else []
    if quantized is None:
        found.append({"way": INT8, "status": "not possible here", "reason": "NNCF is not installed: pip install nncf"})
    return found


def noisy_inputs(bundle: Bundle, count: int, seed: int) -> Inputs:
    """What the denoiser gets on its way: finished latents of captions with noise of random timesteps; a row each."""
    captions = [scene.caption() for scene in scenes(1, count, seed)]
    with Pipeline.load(str(bundle.folder), "cpu") as pipeline:
        result = pipeline.run(Call(captions, mode="sequential", num_inference_steps=20, guidance_scale=4.0, seed=seed))
        ids, _ = PromptTokenizer(bundle)(captions)
        encoder = Session(bundle, "text_encoder", 1)
        hidden = encoder.run(**ids, clip_skip=np.zeros(count, np.int64))
        encoder.close()
    rng = np.random.default_rng(seed)
    alphas = np.asarray(bundle.manifest.alphas_cumprod)
    timesteps = rng.integers(0, len(alphas), count)
    signal = np.sqrt(alphas[timesteps])[:, None, None, None]
    noise = rng.standard_normal(result.latents.shape)
    sample = signal * result.latents + np.sqrt(1 - signal**2) * noise
    return {"sample": sample.astype(np.float32), "timestep": timesteps.astype(np.float32), **hidden}


def quantize(bundle: Bundle, build: Path) -> Bundle:
    """A copy of the bundle whose denoiser NNCF has made int8, compiled for ONNX Runtime."""
    import nncf
    import onnx

    folder = build / bundle.folder.name
    shutil.copytree(bundle.folder, folder, ignore=shutil.ignore_patterns("plans", ".*"))
    inputs = noisy_inputs(bundle, CALIBRATED, seed=500)
    rows = [{name: value[n : n + 1] for name, value in inputs.items()} for n in range(len(inputs["sample"]))]
    model = nncf.quantize(
        onnx.load(bundle.onnx(DENOISER)), nncf.Dataset(rows), subset_size=len(rows),
        model_type=nncf.ModelType.TRANSFORMER, preset=nncf.QuantizationPreset.MIXED,
    )  # fmt: skip
    path = folder / f"{DENOISER}.onnx"
    onnx.save(model, path)
    networks = dict(bundle.manifest.networks)
    networks[DENOISER] = networks[DENOISER].model_copy(update={"file": File.of(path), "data": None})
    changed = bundle.manifest.model_copy(update={"networks": networks})
    changed.write(folder)
    made = Bundle(folder, changed)
    build_missing(made)
    return made


def onnxruntime_way(path: Path, rows: int | None, model: Model) -> Way:
    """A session on one thread; with `rows` all its sizes are fixed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if rows is not None:
        probe = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for one in probe.get_inputs():
            for axis, size in zip(one.shape, (rows, *model.inputs[one.name].shape[1:]), strict=True):
                if isinstance(axis, str):
                    options.add_free_dimension_override_by_name(axis, size)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Array:
        output: Array = session.run(None, dict(inputs))[0]
        return output

    return run


def openvino_way(path: Path, rows: int | None, model: Model, precision: str = "fp32") -> Way:
    """A compiled model with one stream of one thread; with `rows` all its sizes are fixed."""
    static = None if rows is None else {name: (rows, *value.shape[1:]) for name, value in model.inputs.items()}
    request = ov.compile_network(path, static, precision, 1).create_infer_request()

    def run(inputs: Inputs) -> Array:
        output: Array = request.infer(dict(inputs))[0]
        return output

    return run


def ways(model: Model, quantized: Bundle | None, rows: int) -> dict[tuple[str, str, str], Way]:
    """By runtime, shapes and precision: those that this machine has."""
    path = model.bundle.onnx(DENOISER)
    found = {
        (BASE, "dynamic", "fp32"): onnxruntime_way(path, None, model),
        (BASE, "static", "fp32"): onnxruntime_way(path, rows, model),
    }
    small = None if quantized is None else quantized.onnx(DENOISER)
    if small is not None:
        found[BASE, "dynamic", INT8] = onnxruntime_way(small, None, model)
    if ov.trouble() is None:
        found["openvino", "dynamic", "fp32"] = openvino_way(path, None, model)
        found["openvino", "static", "fp32"] = openvino_way(path, rows, model)
        if ov.computes("bf16"):
            found["openvino", "static", "bf16"] = openvino_way(path, rows, model, "bf16")
        if small is not None:
            found["openvino", "static", INT8] = openvino_way(small, rows, model)
    return found


def timed(model: Model, quantized: Bundle | None, rows: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """A row per way: milliseconds per row, how many times faster than the first way, and how far its outputs are."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for count in rows:
        inputs, built = model.rows(count), ways(model, quantized, count)
        seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in built}
        outputs = {key: run(inputs) for key, run in built.items()}
        first = next(iter(outputs.values()))
        for turn in range(repeats + WARM_UP):
            for key, run in built.items():
                start = time.perf_counter()
                run(inputs)
                if turn >= WARM_UP:
                    seconds[key].append(time.perf_counter() - start)
        base = next(iter(seconds.values()))
        for key, taken in seconds.items():
            names = dict(zip(("runtime", "shapes", "precision"), key, strict=True))
            row = found.setdefault(key, {"way": "call", **names, "repeats": repeats, "batches": {}})
            row["batches"][str(count)] = {
                "ms_per_row": bootstrap([1e3 * one / count for one in taken]), "speedup": ratio(base, taken),
                "error": float(f"{np.abs(outputs[key] - first).max() / np.abs(first).max():.2g}"),
            }  # fmt: skip
    return list(found.values())


def drawn(bundle: Bundle, quantized: Bundle | None, images: int) -> list[dict[str, Any]]:
    """A row per precision: captions that are right, and the distance from the images of fp32."""
    asked = scenes(1, images, 0)
    places = {"fp32": (bundle, "cpu*2@onnxruntime"), "bf16": (bundle, "cpu*2@openvino+bf16")}
    if quantized is not None:
        places[INT8] = (quantized, "cpu*2@onnxruntime")
    if ov.trouble() is not None or not ov.computes("bf16"):
        del places["bf16"]
    rows, reference = list[dict[str, Any]](), None
    for precision, (one, devices) in places.items():
        try:
            pipeline = Pipeline.load(str(one.folder), devices)
        except EngineError as error:
            rows.append({"way": precision, "status": "not possible here", "reason": str(error)})
            continue
        with pipeline:
            call = Call([scene.caption() for scene in asked], mode="sequential", guidance_scale=4.0, seed=0)
            result = pipeline.run(call)
        reference = result.latents if reference is None else reference
        apart = [drift(a, b) for a, b in zip(result.latents, reference, strict=True)]
        rows.append({
            "way": "images", "precision": precision, "devices": devices, "images": images, "steps": result.report.steps,
            "drift": {"median": median(apart), "largest": max(apart)}, **read_back(result.images, asked),
        })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds per row of a call, and how many times faster than ONNX Runtime's dynamic shapes; then images."""
    calls, pictures = ([row for row in rows if row["way"] == way] for way in ("call", "images"))
    counts = list(calls[0]["batches"])
    lines = [f"| runtime | shapes | precision | {' | '.join(f'{n} rows' for n in counts)} | error |"]
    lines += ["|---" * (4 + len(counts)) + "|"]
    for row in calls:
        cells = [row["runtime"], row["shapes"], row["precision"]]
        for one in row["batches"].values():
            cells.append(f"{one['ms_per_row']['median']:.2f} ms, {one['speedup']['median']:.2f}×")
        cells.append(f"{max(one['error'] for one in row['batches'].values()):.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    if pictures:
        lines += ["", "| precision | captions right | drift from fp32, median | largest |", "|---|---|---|---|"]
    for row in pictures:
        right, apart = f"{100 * row['caption_accuracy']:.0f} % of {row['images']}", row["drift"]
        lines.append(f"| {row['precision']} | {right} | {apart['median']:.2g} | {apart['largest']:.2g} |")
    lines += [f"\n{row['way']}: {row['reason']}" for row in rows if row.get("status") == "not possible here"]
    return "\n".join(lines)
