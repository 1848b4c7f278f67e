"""What `--devices` means: `auto`, `cpu`, `cpu@1`, `cpu*2`, `cuda:0,cuda:1`, `cuda:0*4`, `cuda:0@bf16`."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engines.cuda.driver import available
from engines.errors import DeviceError

MAX_AUTO_LANES = 8
MAX_LANES = 64
FORMS = "use auto, cpu, cpu@THREADS, cpu*LANES, or GPUs like cuda:0,cuda:1, cuda:0*LANES or cuda:0@bf16"


@dataclass(frozen=True)
class LaneSpec:
    """One lane: its device, its number there, its processor threads, what runs its model, and in what type."""

    device: str
    index: int
    threads: int = 0
    runtime: str = "onnxruntime"
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.device}/{self.index}"

    @property
    def gpu(self) -> int | None:
        """The number of its GPU; None for processor cores."""
        return int(self.device.removeprefix("cuda:")) if self.device.startswith("cuda:") else None


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_devices(text: str) -> tuple[LaneSpec, ...]:
    """The lanes of a device string.

    `cpu` is one lane with all cores, `cpu@1` one lane with one thread, `cpu*2` two lanes that share the cores;
    `cuda:0,cuda:1` one lane on each of two GPUs, `cuda:0*4` four lanes on one. GPUs compute in fp16, or as `@bf16` and
    `@fp32` say; `cuda:0@onnxruntime` and `cuda:0@onnxruntime@fp32` run the model on ONNX Runtime, not TensorRT. All
    lanes run alike. `auto` is every GPU where there are some and TensorRT is installed, else one lane per core.
    DeviceError for anything else. Whether a GPU exists is found out when it is opened.
    """
    if text == "auto":
        text = _auto()
    return _gpus(text) if text.startswith("cuda") else _cpu(text)


def precision(lanes: Sequence[LaneSpec]) -> str:
    """What a model is exported in for these lanes."""
    return lanes[0].precision


def tensorrt_installed() -> bool:
    """Whether a TensorRT package is there, which is asked without importing it."""
    return any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx"))


def _auto() -> str:
    if not available() and tensorrt_installed():
        from engines.cuda.driver import Driver

        return ",".join(f"cuda:{n}" for n in range(min(Driver().count, MAX_AUTO_LANES)))
    return f"cpu*{min(cores(), MAX_AUTO_LANES)}"


def _cpu(text: str) -> tuple[LaneSpec, ...]:
    count = cores()
    match = re.fullmatch(r"cpu(?:@(\d+)|\*(\d+))?", text)
    if not match:
        raise DeviceError(f"unknown device {text!r}: {FORMS}")
    threads, lanes = (int(group) if group else None for group in match.groups())
    if threads == 0 or lanes == 0:
        raise DeviceError(f"{text}: at least one lane with one thread is needed")
    if (threads or 0) > count or (lanes or 0) > MAX_LANES:
        raise DeviceError(f"{text}: this process may use {count} cores; lanes end at {MAX_LANES}")
    if lanes is None:
        return (LaneSpec("cpu", 0, threads or count),)
    return tuple(LaneSpec("cpu", n, max(1, count // lanes)) for n in range(lanes))


def _gpus(text: str) -> tuple[LaneSpec, ...]:
    found: list[LaneSpec] = []
    used: Counter[str] = Counter()
    for part in text.split(","):
        match = re.fullmatch(r"(cuda:\d{1,3})(?:@(onnxruntime|tensorrt))?(?:@(fp16|bf16|fp32))?(?:\*(\d+))?", part)
        if not match:
            raise DeviceError(f"unknown device {part!r}: {FORMS}")
        device, runtime, kind, lanes = match[1], match[2] or "tensorrt", match[3] or "fp16", int(match[4] or 1)
        if not 0 < lanes <= MAX_LANES - len(found):
            raise DeviceError(f"{text}: between 1 and {MAX_LANES} lanes in all")
        found += [LaneSpec(device, used[device] + n, 0, runtime, kind) for n in range(lanes)]
        used[device] += lanes
    if len({(lane.runtime, lane.precision) for lane in found}) > 1:
        raise DeviceError(f"{text}: all GPU lanes run alike: name the same runtime and type for each of them, or none")
    return tuple(found)
