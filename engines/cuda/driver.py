"""The CUDA driver through cuda-python: every call checked, every wait limited, every message with its repair.

`cuda.bindings.driver` is used as it is: functions return a status and their results.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engines.errors import DeviceError, DeviceMemoryError

log = logging.getLogger(__name__)
MINIMUM_DRIVER = 13000  # the CUDA version that cuda-python and our machine code are of
LANE_TIMEOUT = 120.0  # seconds without progress after which a lane counts as hanging
SPIN_SECONDS = 0.002
_REPAIRS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "use fewer lanes, a smaller image or a smaller batch, or free the device's memory",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "this GPU is older than compute capability 7.5 or newer than this version knows",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "this model lane cannot be captured: set graphs=False",
}
_LOST = range(700, 800), "the device was lost: start the program again, and look at the system's log for Xid messages"

# A capture in one thread fails, or takes in what is not its own, when another thread allocates, frees, loads a module
# or makes an execution context meanwhile (NVIDIA/TensorRT issue 2888). All of that takes turns in this process.
SERIAL = threading.RLock()
_SERIAL_CALLS = frozenset({
    "cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuModuleLoadData", "cuModuleUnload",
    "cuStreamCreate", "cuStreamDestroy", "cuEventCreate", "cuEventDestroy", "cuGraphExecDestroy",
    "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxReset", "cuCtxEnablePeerAccess",
    "cuIpcOpenMemHandle", "cuIpcCloseMemHandle",
})  # fmt: skip
_abandoned: list[object] = []


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
        more_connections()
        self.api = api or _load()
        self._calls: dict[str, Callable[..., Any]] = {}
        self._retained: list[Device] = []
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
        call = self._calls.get(name) or self._calls.setdefault(name, self.function(name))
        status, *values = call(*arguments)
        if status:
            raise self.error(name, status)
        return values[0] if len(values) == 1 else values

    def function(self, name: str) -> Callable[..., Any]:
        """A driver call as cuda-python has it; a status code that it does not know ends as DeviceError."""
        function = getattr(self.api, name)
        serial = name in _SERIAL_CALLS

        def call(*arguments: Any) -> Any:
            try:
                if serial:
                    with SERIAL:
                        return function(*arguments)
                return function(*arguments)
            except ValueError as error:  # of the enumeration, which has no such number
                raise DeviceError(f"{name} failed with a status that cuda-python does not know ({error})") from error

        return call

    def error(self, name: str, status: Any) -> DeviceError:
        """What a failed call means."""
        label = getattr(status, "name", str(int(status)))
        _, text = self.api.cuGetErrorString(status)
        lost, advice = _LOST
        repair = _REPAIRS.get(label, advice if int(status) in lost else "see the system's log")
        kind = DeviceMemoryError if label == "CUDA_ERROR_OUT_OF_MEMORY" else DeviceError
        return kind(f"{name} failed with {label} ({(text or b'').decode()}): {repair}")

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
        context = self("cuDevicePrimaryCtxRetain", self("cuDeviceGet", ordinal))
        self._retained.append(Device(ordinal, context, name, capability))
        return self._retained[-1]

    def failed(self, device: Device) -> bool:
        """Whether a device gives an error with every call, as it does after one that cannot be overcome."""
        try:
            self("cuCtxSetCurrent", device.context)
            self("cuMemGetInfo")
        except DeviceError:
            return True
        return False

    def close(self) -> None:
        """Lets go of the devices' contexts; that of a device that failed is reset, so that it may be opened again."""
        while self._retained:
            device = self._retained.pop()
            again = all(other.ordinal != device.ordinal for other in self._retained)
            name = "cuDevicePrimaryCtxReset" if again and self.failed(device) else "cuDevicePrimaryCtxRelease"
            try:
                self("cuDevicePrimaryCtxRelease", self("cuDeviceGet", device.ordinal))
                if name == "cuDevicePrimaryCtxReset":
                    self(name, self("cuDeviceGet", device.ordinal))
            except DeviceError as error:
                log.warning("cuda:%d: %s", device.ordinal, error)

    def stream(self) -> Any:
        """A stream of the current context that does not wait for the default stream."""
        return self("cuStreamCreate", self.api.CUstream_flags.CU_STREAM_NON_BLOCKING)

    def event(self, *, timing: bool = False) -> Any:
        """An event of the current context."""
        return self("cuEventCreate", 0 if timing else self.api.CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """A graph that is ready to launch, of what `enqueue` puts on a stream and on those that it forks and joins."""
        with SERIAL:
            collected = gc.isenabled()
            gc.disable()  # what a collection frees meanwhile may be a CUDA object, and freeing ends a capture
            try:
                return self._capture(stream, enqueue)
            finally:
                if collected:
                    gc.enable()

    def _capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        self("cuStreamBeginCapture", stream, self.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            _, graph = self.api.cuStreamEndCapture(stream)  # leaves no stream capturing; the first error counts
            if graph:
                self.api.cuGraphDestroy(graph)
            raise
        graph = self("cuStreamEndCapture", stream)
        try:
            return self("cuGraphInstantiate", graph, 0)
        finally:
            self("cuGraphDestroy", graph)

    def wait(self, event: Any, what: str, seconds: float = LANE_TIMEOUT) -> None:
        """Waits for an event on the host: first without giving up the processor, and never for ever."""
        query, busy = self.function("cuEventQuery"), self.api.CUresult.CUDA_ERROR_NOT_READY
        start = time.perf_counter()
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


def abandon(*kept: object) -> None:
    """Keeps what a hanging device uses until the process ends: to free any of it could wait for ever."""
    _abandoned.extend(kept)


def more_connections() -> None:
    """Before the first `cuInit`: by default work of more than eight streams shares queues, and lanes would wait."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def available() -> str | None:
    """Why no GPU can be used here, or None. Asks without cuda-python, whose failed loading cannot be undone."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver on this machine"
    more_connections()
    count = ctypes.c_int()
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        return f"the NVIDIA driver found no usable GPU (status {status})"
    return None


def _load() -> Any:
    reason = available()
    if reason:
        raise DeviceError(f"{reason}: use --devices cpu, or install NVIDIA's driver 580 or newer")
    return bindings()


def bindings() -> Any:
    """cuda-python's functions and types, which are there without a driver, too."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"cuda-python is missing ({error}): pip install --editable '.[cuda]'") from error
    return driver
