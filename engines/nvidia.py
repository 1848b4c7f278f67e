"""The NVIDIA GPUs of this machine, by NVML: for plans, reports and devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.cuda.driver import Driver, available
from engines.devices import LaneSpec
from engines.errors import DeviceError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as far as plans depend on it."""

    name: str
    capability: tuple[int, int]
    driver: str

    def __str__(self) -> str:
        return f"{self.name} ({self.capability[0]}.{self.capability[1]})"


def gpus() -> list[Gpu]:
    """The GPUs of this machine in NVML's order, which is not CUDA's; empty where there is no driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [
            Gpu(pynvml.nvmlDeviceGetName(h), tuple(pynvml.nvmlDeviceGetCudaComputeCapability(h)), version)
            for h in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def visible_gpus() -> list[Gpu]:
    """The GPUs by their CUDA numbers, which are not NVML's: CUDA puts the fastest first, and may be told to hide some.

    The driver tells names and capabilities without opening a context; only its version is NVML's to tell.
    """
    found = gpus()
    if not found or available():
        return []
    driver = Driver()
    return [Gpu(*driver.describe(number), found[0].driver) for number in range(driver.count)]


def gpus_of(lanes: Sequence[LaneSpec]) -> list[Gpu]:
    """The distinct kinds of GPU that lanes run on; DeviceError for a GPU that is not there."""
    there = visible_gpus()
    for lane in lanes:
        if lane.gpu is None or lane.gpu >= len(there):
            number = len(there)
            has = f"this machine has cuda:0 … cuda:{number - 1}" if number else "this machine has no usable NVIDIA GPU"
            raise DeviceError(f"there is no {lane.device}: {has}; without one, use --devices cpu")
    return list(dict.fromkeys(there[lane.gpu] for lane in lanes if lane.gpu is not None))
