"""Where a result comes from: commit, host and versions, in the frame that every result file has."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engines.devices import cores
from engines.runtimes import RUNTIMES

SCHEMA_VERSION = 2
_PACKAGES = ("numpy", "torch", "diffusers")


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
    from engines.nvidia import gpus

    return [gpu.name for gpu in gpus()]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in dict.fromkeys((*(one.package for one in RUNTIMES.values() if one.package), *_PACKAGES)):
        try:
            found[package] = version(package.replace("_", "-"))
        except PackageNotFoundError:
            continue
    return found


def engine_version() -> str:
    """This project's version: the checkout's own, which an older installation may not know; else the installed one.

    "unknown" where only the packages were copied, as into a container.
    """
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if project.is_file():
        return str(tomllib.loads(project.read_text())["project"]["version"])
    try:
        return version("driffusion-engine")
    except PackageNotFoundError:
        return "unknown"


def load_average() -> float:
    """How many processes wanted a core during the last minute: says how quiet the machine was."""
    return os.getloadavg()[0]
