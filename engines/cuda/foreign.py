"""Memory on a GPU that another process allocated and handed over (CUDA IPC), read and written through the host."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from engines.cuda.driver import Driver, release
from engines.cuda.memory import STAGING_BYTES, pinned
from engines.errors import ParameterError

HANDLE_BYTES = 64  # of CUipcMemHandle


class ForeignMemory:
    """What the handle of `cuIpcGetMemHandle` stands for, from its first byte on.

    Everything goes over a stream and a pinned buffer of its own, so that no call waits for ever and work of lanes on
    the same GPU goes on. The calling thread's context is what it was afterwards. ParameterError for a handle or a
    device that does not fit, DeviceError when the GPU fails.
    """

    def __init__(self, handle: bytes, ordinal: int) -> None:
        self._driver, self._lock = Driver(), threading.Lock()
        self._freed: list[Callable[[], None]] = []
        driver = self._driver
        try:
            if not 0 <= ordinal < driver.count:
                raise ParameterError(
                    "device_id", f"there is no GPU {ordinal}: this machine has 0 to {driver.count - 1}"
                )
            self._device = driver.device(ordinal)
            with self._current():
                try:
                    self._open(handle, ordinal)
                except BaseException:
                    release(self._freed)
                    raise
        except BaseException:
            driver.close()
            raise

    def _open(self, handle: bytes, ordinal: int) -> None:
        driver = self._driver
        self._pointer = self._opened(handle)
        self._freed.append(lambda: driver("cuIpcCloseMemHandle", self._pointer))
        which = driver.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        there = int(driver("cuPointerGetAttribute", which, self._pointer))
        if there != ordinal:
            raise ParameterError("device_id", f"the memory is on GPU {there}, not on GPU {ordinal}")
        base, size = driver("cuMemGetAddressRange", self._pointer)
        self.size = int(base) + int(size) - self._pointer
        # a context gives memory that is opened again the same address
        self.identity: Hashable = ("cuda", ordinal, self._pointer)
        self._stream = driver.stream()
        self._freed.append(lambda: driver("cuStreamDestroy", self._stream))
        self._done = driver.event()
        self._freed.append(lambda: driver("cuEventDestroy", self._done))
        self._staging, free = pinned(driver, min(self.size, STAGING_BYTES))
        self._freed.append(free)

    def _opened(self, handle: bytes) -> int:
        api = self._driver.api
        if len(handle) != HANDLE_BYTES:
            raise ParameterError("raw_handle", f"a handle of CUDA memory has {HANDLE_BYTES} bytes, not {len(handle)}")
        copied = api.CUipcMemHandle()
        ctypes.memmove(copied.getPtr(), handle, HANDLE_BYTES)
        flags = api.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        status, pointer = self._driver.function("cuIpcOpenMemHandle")(copied, int(flags))
        if status:
            hint = "send what cudaIpcGetMemHandle gives for memory that another process on this machine still has"
            raise ParameterError("raw_handle", f"the handle cannot be opened ({status.name}): {hint}")
        return int(pointer)

    def read(self, start: int, size: int) -> bytes:
        """Bytes from `start` on; all of them lie within `size`."""
        made = bytearray(size)
        with self._lock, self._current():
            for place, count in self._chunks(size):
                self._driver("cuMemcpyDtoHAsync", self._staging.ctypes.data, self._pointer + start + place, count,
                             self._stream)  # fmt: skip
                self._wait()
                made[place : place + count] = self._staging[:count].data
        return bytes(made)

    def write(self, start: int, data: memoryview) -> None:
        """Bytes from `start` on; they are there when this returns."""
        with self._lock, self._current():
            for place, count in self._chunks(data.nbytes):
                self._staging[:count].data[:] = data[place : place + count]
                self._driver("cuMemcpyHtoDAsync", self._pointer + start + place, self._staging.ctypes.data, count,
                             self._stream)  # fmt: skip
                self._wait()

    def close(self) -> None:
        """Lets go of it."""
        with self._lock, self._current():
            release(self._freed)
        self._driver.close()

    def _chunks(self, size: int) -> Iterator[tuple[int, int]]:
        most = len(self._staging)
        return ((place, min(most, size - place)) for place in range(0, size, most))

    def _wait(self) -> None:
        self._driver("cuEventRecord", self._done, self._stream)
        self._driver.wait(self._done, f"a copy of a client's memory on {self._device.name}")

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context, for this thread, meanwhile."""
        before: Any = self._driver("cuCtxGetCurrent")
        self._driver("cuCtxSetCurrent", self._device.context)
        try:
            yield
        finally:
            self._driver("cuCtxSetCurrent", before)
