"""Memory of GPUs and of the host beside them: allocation, staging, and what lanes and slots have of one shape."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Array
from engines.cuda.driver import Device, Driver, release
from engines.cuda.kernels import BYTES

STAGING_BYTES = 1 << 22
SLOTS_PER_BLOCK = 32


@dataclass(frozen=True)
class Tensor:
    """Memory on one device."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str


class Memory:
    """Allocations that are freed together. `home` is the device that is current between calls."""

    def __init__(self, driver: Driver, home: Device) -> None:
        self.driver, self.home = driver, home
        self.freed: list[Callable[[], None]] = []
        self.bytes = 0

    @contextmanager
    def on(self, device: Device) -> Iterator[None]:
        """Makes a device current, which is a property of the calling thread, and afterwards home again."""
        self.driver("cuCtxSetCurrent", device.context)
        try:
            yield
        finally:
            if device is not self.home:
                self.driver("cuCtxSetCurrent", self.home.context)

    def allocate(self, device: Device, size: int) -> int:
        """Plain device memory: pooled memory breaks peer copies on some systems."""
        driver, size = self.driver, max(size, 256)
        with self.on(device):
            pointer = int(driver("cuMemAlloc", size))

        def free() -> None:
            with self.on(device):
                driver("cuMemFree", pointer)

        self.freed.append(free)
        self.bytes += size
        return pointer

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Host memory that every device copies to and from without waiting."""
        with self.on(self.home):
            memory, free = pinned(self.driver, size)

        def free_at_home() -> None:
            with self.on(self.home):  # a lost device may be current, and would refuse it
                free()

        self.freed.append(free_at_home)
        return memory

    def stream(self, device: Device) -> Any:
        """A stream."""
        with self.on(device):
            stream = self.driver.stream()
        self._destroy("cuStreamDestroy", device, stream)
        return stream

    def event(self, device: Device) -> Any:
        """An event without timing."""
        with self.on(device):
            event = self.driver.event()
        self._destroy("cuEventDestroy", device, event)
        return event

    def _destroy(self, name: str, device: Device, handle: Any) -> None:
        def free() -> None:
            with self.on(device):
                self.driver(name, handle)

        self.freed.append(free)

    def close(self) -> None:
        """Frees all of it; nothing may run on it any more."""
        release(self.freed)


@dataclass(frozen=True)
class Inputs:
    """What one lane reads for one composition of branches. At home it is combined into; elsewhere it is copied to.

    `block` holds the timesteps and then the samples, so that one copy moves both. `staging` is its image at home.
    """

    block: int
    staging: int
    size: int
    sample_offset: int
    tensors: Mapping[str, Tensor]


@dataclass
class ShapeMemory:
    """All memory that depends on the shapes of a latent and of its conditioning, and where slots are in it.

    A name keeps its slot for as long as the memory lives, so that a round has the same addresses in every image.
    `planned` is what backend.Planned is kept by: for a sequence of timesteps, by the operations of a round.
    """

    shape: tuple[int, ...]
    dtype: str
    conditioning_shapes: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    memory: Memory
    index: dict[str, int] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    inputs: dict[tuple[int, tuple[int, ...]], Inputs] = field(default_factory=dict)
    outputs: dict[tuple[int, int], int] = field(default_factory=dict)
    staging: dict[tuple[int, str, int], int] = field(default_factory=dict)
    shared: dict[tuple[int, tuple[int, ...]], dict[str, Tensor]] = field(default_factory=dict)
    planned: OrderedDict[tuple[float, ...], dict[Any, Any]] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.elements = int(np.prod(self.shape))
        self.bytes = self.elements * BYTES[self.dtype]

    def row(self, slot: str) -> int:
        """The number of a slot, which is made room for."""
        row = self.index.setdefault(slot, len(self.index))
        if row >= len(self.blocks) * SLOTS_PER_BLOCK:
            self.blocks.append(self.memory.allocate(self.memory.home, SLOTS_PER_BLOCK * self.bytes))
        return row

    def slot(self, row: int) -> int:
        """The address of a slot; slots of one block are neighbours."""
        return self.blocks[row // SLOTS_PER_BLOCK] + row % SLOTS_PER_BLOCK * self.bytes

    def lane_inputs(self, lane: int, device: Device, branches: tuple[int, ...], fill: Callable[..., None]) -> Inputs:
        """What a lane reads; `fill(device, branches, tensors)` sets conditioning that no lane there had yet."""
        found = self.inputs.get((lane, branches))
        if found is None:
            batch, home, allocate = len(branches) * self.shape[0], self.memory.home, self.memory.allocate
            offset = -(-4 * batch // 256) * 256
            size = offset + len(branches) * self.bytes
            block = allocate(device, size)
            staging = block if device is home else allocate(home, size)
            key = (device.ordinal, branches)
            if key not in self.shared:
                self.shared[key] = {
                    name: Tensor(allocate(device, batch * int(np.prod(one[1:])) * BYTES[self.dtype]),
                                 (batch, *one[1:]), self.dtype)
                    for name, one in self.conditioning_shapes[branches[0]]
                }  # fmt: skip
                fill(device, branches, self.shared[key])
            tensors = {
                "sample": Tensor(block + offset, (batch, *self.shape[1:]), self.dtype),
                "timestep": Tensor(block, (batch,), "float32"),
                **self.shared[key],
            }
            found = self.inputs[lane, branches] = Inputs(block, staging, size, offset, tensors)
        return found

    def output(self, lane: int, device: Device, size: int) -> int:
        """Where a lane writes what is copied to slots afterwards."""
        if (lane, size) not in self.outputs:
            self.outputs[lane, size] = self.memory.allocate(device, size)
        return self.outputs[lane, size]

    def lane_staging(self, lane: int, way: str, size: int) -> int:
        """Host memory between a lane and home, one way."""
        if (lane, way, size) not in self.staging:
            self.staging[lane, way, size] = self.memory.pinned(size).ctypes.data
        return self.staging[lane, way, size]


def shapes_of(conditioning: Sequence[Mapping[str, Array]]) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]:
    """What memory for conditioning depends on."""
    return tuple(tuple((name, np.shape(value)) for name, value in one.items()) for one in conditioning)


class Staging:
    """Copies between the host's arrays and home, in order with a stream there; other devices' go by their own streams.

    `settle()` waits until everything that was asked for is done, `carriers` are stream and event by device.
    """

    def __init__(
        self, memory: Memory, main: Any, carriers: Mapping[int, tuple[Any, Any]], settle: Callable[[], None]
    ) -> None:
        self._memory, self._driver, self._main, self._carriers = memory, memory.driver, main, carriers
        self._buffer, self._settle, self.used = memory.pinned(STAGING_BYTES), settle, 0

    def upload(self, device: Device, pointer: int, value: NDArray[Any]) -> None:
        """Host memory to a device, in order with what home does; the value may change after this returns."""
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        for start in range(0, raw.size, STAGING_BYTES):
            part = raw[start : start + STAGING_BYTES]
            if self.used + part.size > STAGING_BYTES:
                self._settle()
            at = self.used
            self._buffer[at : at + part.size] = part
            self.used = -(-(at + part.size) // 256) * 256
            source = self._buffer.ctypes.data + at
            stream, sent = self._carriers.get(device.ordinal, (self._main, None))
            with self._memory.on(device):
                self._driver("cuMemcpyHtoDAsync", pointer + start, source, part.size, stream)
                if sent is not None:
                    self._driver("cuEventRecord", sent, stream)
                    self._driver("cuStreamWaitEvent", self._main, sent, 0)

    def download(self, pointer: int, size: int) -> NDArray[np.uint8]:
        """Bytes of home, after everything that home was asked for."""
        self._settle()
        parts = []
        for start in range(0, size, STAGING_BYTES):
            count = min(size - start, STAGING_BYTES)
            with self._memory.on(self._memory.home):
                self._driver("cuMemcpyDtoHAsync", self._buffer.ctypes.data, pointer + start, count, self._main)
            self._settle()
            parts.append(self._buffer[:count].copy())
        return np.concatenate(parts)


def pinned(driver: Driver, size: int) -> tuple[NDArray[np.uint8], Callable[[], None]]:
    """Host memory that every device copies to and from without waiting, and what frees it."""
    pointer = int(driver("cuMemHostAlloc", size, driver.api.CU_MEMHOSTALLOC_PORTABLE))
    memory: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    return memory, lambda: driver("cuMemFreeHost", pointer)


def narrow(value: Array, dtype: str) -> NDArray[Any]:
    """float32 as it is stored, to nearest, ties to even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(value, dtype)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def widen(raw: NDArray[np.uint8], dtype: str) -> Array:
    """Stored values as float32."""
    if dtype != "bfloat16":
        return raw.view(dtype).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
