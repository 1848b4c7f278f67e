"""What `--devices` means: `auto`, `cpu`, `cpu@1`, `cpu*2@openvino`, `cuda:0,cuda:1`, `cuda:0*4`, `cuda:0@bf16`, …"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.cuda.driver import available
from engines.errors import DeviceError
from engines.runtimes import PRECISIONS, RUNTIMES, default_runtime

MAX_AUTO_LANES = 8
MAX_LANES = 64
FORMS = "use auto, cpu, cpu@THREADS, cpu*LANES, or GPUs like cuda:0,cuda:1, cuda:0*LANES or cuda:0@bf16"
_PART = re.compile(
    r"(?P<device>(?P<kind>[a-z]+)(?::\d{1,3})?)(?P<options>(?:[@+]\w+)*)(?:\*(?P<lanes>\d+))?(?P<more>(?:[@+]\w+)*)"
)


@dataclass(frozen=True)
class LaneSpec:
    """One lane: its device, its number there, its processor threads, a key of `RUNTIMES`, and in what it computes."""

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


def machine() -> str:
    """The processor as far as compiled kernels depend on it: its name and a digest of its instruction sets."""
    name, flags = platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        name, flags = facts.get("model name", name), facts.get("flags", facts.get("Features", ""))
    digest = hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()[:8]
    return f"{platform.system()} {name} ({digest})"


def parse_devices(text: str) -> tuple[LaneSpec, ...]:
    """The lanes of a device string.

    `cpu` is one lane with all cores, `cpu@1` one lane with one thread, `cpu*2` two lanes that share the cores;
    `cuda:0,cuda:1` one lane on each of two GPUs, `cuda:0*4` four lanes on one. `@` names a runtime by its option in
    `RUNTIMES` or a precision, or both: `cpu*2@openvino+bf16`. `auto` is every GPU where there are some and a
    runtime for them is installed, else one lane per core. `null*4` is four lanes that compute nothing. All lanes run
    alike. DeviceError for anything else; whether a GPU exists is found out when it is opened.
    """
    parts = (_auto() if text == "auto" else text).split(",")
    found: list[LaneSpec] = []
    used: Counter[str] = Counter()
    for part in parts:
        found += _part(part, text, used, MAX_LANES - len(found))
        if len(parts) > 1 and found[-1].gpu is None:
            raise DeviceError(f"unknown device {text!r}: {FORMS}")
    if len({(lane.runtime, lane.precision) for lane in found}) > 1:
        raise DeviceError(f"{text}: all GPU lanes run alike: name the same runtime and type for each of them, or none")
    return tuple(found)


def precision(lanes: Sequence[LaneSpec]) -> str:
    """What a model is exported in for these lanes."""
    return RUNTIMES[lanes[0].runtime].exported or lanes[0].precision


def _auto() -> str:
    if not available() and RUNTIMES[default_runtime("cuda")].installed:
        from engines.cuda.driver import Driver

        return ",".join(f"cuda:{n}" for n in range(min(Driver().count, MAX_AUTO_LANES)))
    return f"cpu*{min(cores(), MAX_AUTO_LANES)}"


def _part(part: str, text: str, used: Counter[str], room: int) -> list[LaneSpec]:
    """The lanes of one device; `used` counts those that it has already."""
    unknown = DeviceError(f"unknown device {part!r}: {FORMS}")
    match = _PART.fullmatch(part)
    kind = match["kind"] if match else ""
    of_kind = {one.option: name for name, one in RUNTIMES.items() if one.device == kind}
    if not match or not of_kind or (kind == "cuda") != (match["device"] != kind):
        raise unknown
    name, precision, threads = default_runtime(kind), None, None
    elsewhere: dict[str, list[str]] = {}
    for one in RUNTIMES.values():
        elsewhere.setdefault(one.option, []).append(one.device)
    options = re.split("[@+]", match["options"] + match["more"])[1:]
    for option in sorted(options, key=lambda one: one not in of_kind):  # the runtime first: it says what else there is
        if option in of_kind:
            name = of_kind[option]
        elif option in RUNTIMES[name].precisions and precision is None:
            precision = option
        elif option.isdecimal() and RUNTIMES[name].threads and threads is None and match["lanes"] is None:
            threads = int(option)
        elif option in PRECISIONS and precision is None:
            able = " or ".join(RUNTIMES[name].precisions)
            raise DeviceError(f"{part}: {RUNTIMES[name].option} takes {able} on {kind} devices, not {option}")
        elif option in elsewhere and name == default_runtime(kind):
            raise DeviceError(f"{part}: {option} runs on {' and '.join(elsewhere[option])} devices, not on {kind}")
        else:
            raise unknown
    runtime, lanes = RUNTIMES[name], int(match["lanes"] or 1)
    if runtime.threads:
        _check_cores(text, threads, lanes)
    elif not 0 < lanes <= room:
        raise DeviceError(f"{text}: between 1 and {MAX_LANES} lanes in all")
    share = threads or max(1, cores() // lanes) if runtime.threads else 0
    device, first = match["device"], used[match["device"]]
    used[device] += lanes
    kinds = precision or runtime.precisions[0]
    return [LaneSpec(device, first + n, share, name, kinds) for n in range(lanes)]


def _check_cores(text: str, threads: int | None, lanes: int) -> None:
    if threads == 0 or lanes == 0:
        raise DeviceError(f"{text}: at least one lane with one thread is needed")
    if (threads or 0) > cores() or lanes > MAX_LANES:
        raise DeviceError(f"{text}: this process may use {cores()} cores; lanes end at {MAX_LANES}")
