"""What is measured: a bundle, the prompts it is asked for, and where its checkpoint lies for other software."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.devices import parse_devices
from engines.errors import ParameterError
from engines.manifest import Manifest
from engines.store import BUILD
from export.shapes.data import Scene, random_scene
from runtime.pipeline import Pipeline

EMBEDDED = "shapes"
EMBEDDED_FOLDER = Path(__file__).resolve().parent.parent / "export" / "shapes" / "model"


def model_arguments(parser: argparse.ArgumentParser, devices: str = "cpu*2") -> None:
    """The options that every measurement of a model has."""
    parser.add_argument("--model", default=EMBEDDED, help="an exported model, by name or by folder")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument(
        "--devices", type=named_devices, default=devices, help="lanes, as everywhere: auto, cpu*2, cuda:0,cuda:1, …"
    )


def named_devices(devices: str) -> str:
    """What `auto` stands for here; any other text itself."""
    if devices != "auto":
        return devices
    lanes = parse_devices(devices)
    return f"cpu*{len(lanes)}" if lanes[0].gpu is None else ",".join(lane.device for lane in lanes)


def one_lane(devices: str) -> str:
    """The first of some lanes: one core with one thread, or the first GPU."""
    return devices.split(",")[0].split("*")[0] if devices.startswith("cuda") else "cpu@1"


def lane_names(pipeline: Pipeline) -> str:
    """The lanes, as reports name them."""
    return ",".join(map(str, pipeline.devices))


def scenes(shapes: int, count: int, seed: int) -> list[Scene]:
    """Random held-out scenes with one or two shapes each, for the embedded model."""
    rng = np.random.default_rng((seed, shapes))
    return [random_scene(rng, shapes, held_out=True) for _ in range(count)]


def is_embedded(manifest: Manifest) -> bool:
    """Whether this is `shapes`, whose images a checker can read back."""
    return manifest.model == EMBEDDED


def prompts(manifest: Manifest, count: int, seed: int = 0, file: Path | None = None) -> list[str]:
    """As many prompts as wanted: lines of a file, else held-out captions of `shapes`, else the model's examples.

    Files and examples begin again where they are short.
    """
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ParameterError("prompts", f"{file} has no lines: one prompt on each is expected")
    elif is_embedded(manifest):
        return [scene.caption() for scene in scenes(1, count, seed)]
    else:
        lines = list(manifest.examples) or [""]
    return [lines[n % len(lines)] for n in range(count)]


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder or hub name, and the LoRA files that are to be fused into it, with their scales."""

    folder: str
    loras: tuple[tuple[str, float], ...] = ()


def checkpoint(manifest: Manifest) -> Checkpoint:
    """What a model was exported from, for other software: the origin without the words of `make engines`."""
    words = re.fullmatch(r"(.+?)(?: LORA=(.+?))?(?: SIZES=\d+-\d+)?(?: CACHE=1)?", manifest.origin)
    assert words is not None
    files = re.findall(r"\s*(.+?\.safetensors):(\S+)", (words[2] or "").strip('"'))
    folder = str(EMBEDDED_FOLDER) if words[1] == EMBEDDED else words[1]
    return Checkpoint(folder, tuple((file, float(scale)) for file, scale in files))
