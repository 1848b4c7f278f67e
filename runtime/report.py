"""The report of an image, and the frame that every result file of the project has."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from engines.devices import cores
from runtime.timeline import Span

SCHEMA_VERSION = 1
_PACKAGES = ("onnxruntime", "numpy", "torch", "diffusers")


@dataclass(frozen=True)
class Report:
    """What one call of `Pipeline.generate` did. Seconds are wall time; `denoise` is the whole denoising loop.

    `critical_seconds` adds up the longest model call of every round: denoise minus that is this engine's overhead.
    Both are None on GPUs, where the host does not wait for rounds.
    `accepted` has quantiles of the relative distances that a sampler measured and accepted: per draft for `adaptive`,
    the last change for `srds`. It is a measurement per round, not a bound on the distance of the finished picture.
    `lanes_per_round` is on how many of the lanes its rounds ran, on average: other pictures may have had the rest. Of
    the seconds, `wait` is for lanes.
    `auto` is what mode auto chose and expected. `staged` names pairs of GPUs whose latents go through host memory,
    because direct copies between them failed their test. `timeline`, for who asks, is what each lane did when; on GPUs
    its spans have no times.
    """

    model: str
    mode: str
    scheduler: str
    steps: int
    k: int
    lanes: int
    devices: str
    guidance_scale: float
    guidance_split: bool
    drafts: str
    seed: int
    images: int
    width: int
    height: int
    rounds: int
    evaluations: int
    calls: int
    seconds: dict[str, float]
    critical_seconds: float | None
    overhead_us_per_round: float | None
    accepted: dict[str, float] | None = None
    auto: dict[str, Any] | None = None
    first_blocks: tuple[int, ...] = ()
    lanes_per_round: float = 0.0
    staged: tuple[str, ...] = ()
    timeline: tuple[Span, ...] | None = None
    warnings: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 90th percentile and largest; None of nothing."""
    if not values:
        return None
    return {"median": float(np.median(values)), "p90": float(np.quantile(values, 0.9)), "max": float(max(values))}


def result_file(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows in the frame that every result file has: schema version, commit, host and versions."""
    return {"schema_version": SCHEMA_VERSION, **_frame(), "rows": list(rows)}


@cache
def _frame() -> dict[str, Any]:
    return {"commit": _commit(), "host": _host(), "versions": _versions()}


def _commit() -> str | None:
    """The checkout's commit, `+` when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _host() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {"processor": name, "cores": cores(), "system": f"{platform.system()} {platform.machine()}", "gpus": _gpus()}


def _gpus() -> list[str]:
    """The NVIDIA GPUs by name."""
    from engines.trt import gpus

    return [gpu.name for gpu in gpus()]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def load_average() -> float:
    """How many processes wanted a core during the last minute: says how quiet the machine was."""
    return os.getloadavg()[0]
