"""Energy of the GPUs that lanes use, from the GPUs' own counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engines.cuda.driver import Driver
from engines.devices import LaneSpec
from engines.errors import DeviceError


def bus_id(number: int) -> bytes:
    """The PCI bus id of a CUDA device number: NVML numbers GPUs in another order."""
    driver = Driver()
    place: bytes = driver("cuDeviceGetPCIBusId", 32, driver("cuDeviceGet", number))
    return place.split(b"\0", 1)[0]


class Meter:
    """Joules used by the GPUs of some lanes since their driver was loaded; `reason` where that is unknown."""

    def __init__(self, lanes: Sequence[LaneSpec], place: Callable[[int], bytes] = bus_id) -> None:
        self.reason: str | None = None
        self._handles: list[Any] = []
        numbers = sorted({lane.gpu for lane in lanes if lane.gpu is not None})
        if not numbers:
            self.reason = "processor lanes have no energy counter that may be read"
            return
        try:
            import pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is missing"
            return
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByPciBusId(place(number)) for number in numbers]
            self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
            self.joules()
        except (pynvml.NVMLError, DeviceError) as error:
            self.reason = f"the driver says: {error}"

    def joules(self) -> float | None:
        """None where it cannot be measured."""
        return None if self.reason else sum(self._read(handle) for handle in self._handles) / 1e3
