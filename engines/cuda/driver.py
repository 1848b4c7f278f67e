"""The CUDA driver through cuda-python: every call checked, every wait limited, every message with its repair.

`cuda.bindings.driver` is used as it is: functions return a status and their results. Tests put a machine of their own
in its place.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import DeviceError

log = logging.getLogger(__name__)
MINIMUM_DRIVER = 13000  # the CUDA version that cuda-python and our machine code are of
WAIT_SECONDS = 120.0
SPIN_SECONDS = 0.002
_REPAIRS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "use fewer lanes, a smaller image or a smaller batch, or free the device's memory",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "this GPU is older than compute capability 7.5 or newer than this version knows",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "this model lane cannot be captured: set graphs=False",
}


_LOST = range(700, 800), "the device was lost: start the program again, and look at the system's log for Xid messages"


@dataclass(frozen=True)
class Device:
    """One GPU: its number, its context, and what kernels are compiled for."""

    ordinal: int
    context: Any
    name: str
    capability: tuple[int, int]

    @property
    def arch(self) -> str:
        """The architecture as compilers name it, 90 for 9.0."""
        return f"{self.capability[0]}{self.capability[1]}"


class Driver:
    """`driver("cuMemAlloc", n)` returns what the call returns after its status, or raises DeviceError."""

    def __init__(self, api: Any = None) -> None:
        self.api = api or _load()
        self._calls: dict[str, Callable[..., Any]] = {}
        self("cuInit", 0)
        version = self("cuDriverGetVersion")
        if version < MINIMUM_DRIVER:
            raise DeviceError(
                f"the NVIDIA driver is for CUDA {version // 1000}.{version % 1000 // 10}, this program needs "
                f"{MINIMUM_DRIVER // 1000}.0 or newer: install driver 580 or newer, or use --devices cpu"
            )
        self.count: int = self("cuDeviceGetCount")

    def __call__(self, name: str, *arguments: Any) -> Any:
        """One driver call."""
        call = self._calls.get(name) or self._calls.setdefault(name, getattr(self.api, name))
        status, *values = call(*arguments)
        if status:
            raise self.error(name, status)
        return values[0] if len(values) == 1 else values

    def error(self, name: str, status: Any) -> DeviceError:
        """What a failed call means."""
        label = getattr(status, "name", str(int(status)))
        _, text = self.api.cuGetErrorString(status)
        lost, advice = _LOST
        repair = _REPAIRS.get(label, advice if int(status) in lost else "see the system's log")
        return DeviceError(f"{name} failed with {label} ({(text or b'').decode()}): {repair}")

    def describe(self, ordinal: int) -> tuple[str, tuple[int, int]]:
        """The name and the compute capability of a GPU by number; opens no context."""
        if not 0 <= ordinal < self.count:
            there = f"this machine has cuda:0 … cuda:{self.count - 1}" if self.count else "this machine has no GPU"
            raise DeviceError(f"there is no cuda:{ordinal}: {there}")
        handle = self("cuDeviceGet", ordinal)
        attribute = self.api.CUdevice_attribute
        capability = tuple(
            self("cuDeviceGetAttribute", which, handle)
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self("cuDeviceGetName", 256, handle).split(b"\0", 1)[0].decode()
        return name, (capability[0], capability[1])

    def device(self, ordinal: int) -> Device:
        """A GPU by number, with its primary context, which other libraries in this process share."""
        name, capability = self.describe(ordinal)
        return Device(ordinal, self("cuDevicePrimaryCtxRetain", self("cuDeviceGet", ordinal)), name, capability)

    def stream(self) -> Any:
        """A stream of the current context that does not wait for the default stream."""
        return self("cuStreamCreate", self.api.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def event(self, *, timing: bool = False) -> Any:
        """An event of the current context."""
        return self("cuEventCreate", 0 if timing else self.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """A graph that is ready to launch, of what `enqueue` puts on a stream and on those that it forks and joins."""
        collected = gc.isenabled()
        gc.disable()  # what a collection frees meanwhile may be a CUDA object, and freeing ends a capture
        self("cuStreamBeginCapture", stream, self.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            _, graph = self.api.cuStreamEndCapture(stream)  # leaves no stream capturing; the first error counts
            if graph:
                self.api.cuGraphDestroy(graph)
            raise
        finally:
            if collected:
                gc.enable()
        graph = self("cuStreamEndCapture", stream)
        try:
            return self("cuGraphInstantiate", graph, 0)
        finally:
            self("cuGraphDestroy", graph)

    def wait(self, event: Any, what: str, seconds: float = WAIT_SECONDS) -> None:
        """Waits for an event on the host: first without giving up the processor, and never for ever."""
        start = time.perf_counter()
        query, busy = self.api.cuEventQuery, self.api.CUresult.CUDA_ERROR_NOT_READY
        while (status := query(event)[0]) == busy:
            waited = time.perf_counter() - start
            if waited > seconds:
                raise DeviceError(f"{what} did not end within {seconds:g} s: the device hangs or is far too slow")
            if waited > SPIN_SECONDS:
                time.sleep(0.0001)
        if status:
            raise self.error("cuEventQuery", status)

    def launch(self, function: Any, grid: int, block: int, stream: Any, parameters: Sequence[Any]) -> None:
        """A kernel on a stream; the parameters are ctypes objects and are copied before this returns."""
        pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(one) for one in parameters))
        self("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, 0, stream, ctypes.addressof(pointers), 0)


def release(todo: list[Callable[[], None]]) -> None:
    """Frees everything in reverse order, also what stands behind something that a lost device cannot free any more."""
    while todo:
        try:
            todo.pop()()
        except DeviceError as error:
            log.warning("%s", error)


def available() -> str | None:
    """Why no GPU can be used here, or None. Asks without cuda-python, whose failed loading cannot be undone."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver on this machine"
    count = ctypes.c_int()
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"the NVIDIA driver found no usable GPU (status {status})"
    return None


def _load() -> Any:
    reason = available()
    if reason:
        raise DeviceError(f"{reason}: use --devices cpu, or install NVIDIA's driver 580 or newer")
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"cuda-python is missing ({error}): pip install --editable '.[cuda]'") from error
    return driver
