"""What `--devices` means: `auto`, `cpu`, `cpu@1`, `cpu*2`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from engines.errors import DeviceError

MAX_AUTO_LANES = 8


@dataclass(frozen=True)
class LaneSpec:
    """One lane: its device, its number on that device, and the threads it may use."""

    device: str
    index: int
    threads: int

    def __str__(self) -> str:
        return f"{self.device}/{self.index}"


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_devices(text: str) -> tuple[LaneSpec, ...]:
    """The lanes of a device string.

    `cpu` is one lane with all cores, `cpu@1` one lane with one thread, `cpu*2` two lanes that share the cores,
    `auto` one lane per core. DeviceError for anything else.
    """
    available = cores()
    if text == "auto":
        text = f"cpu*{min(available, MAX_AUTO_LANES)}"
    if text.startswith("cuda"):
        raise DeviceError(f"{text}: CUDA lanes are not part of this version: use auto, cpu, cpu@THREADS or cpu*LANES")
    match = re.fullmatch(r"cpu(?:@(\d+)|\*(\d+))?", text)
    if not match:
        raise DeviceError(f"unknown device {text!r}: use auto, cpu, cpu@THREADS or cpu*LANES")
    threads, lanes = (int(group) if group else None for group in match.groups())
    if threads == 0 or lanes == 0:
        raise DeviceError(f"{text}: at least one lane with one thread is needed")
    if (threads or 0) > available or (lanes or 0) > 64:
        raise DeviceError(f"{text}: this process may use {available} cores; lanes end at 64")
    if lanes is None:
        return (LaneSpec("cpu", 0, threads or available),)
    return tuple(LaneSpec("cpu", n, max(1, available // lanes)) for n in range(lanes))
