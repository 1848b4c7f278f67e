"""Memory, a stream and the kernels of one type on one GPU, for what is measured below the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines.cuda.driver import Driver
from engines.cuda.kernels import BLOCK, Combination, Kernels, combination
from engines.cuda.memory import pinned

IN_A_ROW = 20
TABLE_BYTES = 1 << 16


class DeviceBench:
    """`table` holds coefficients; `small` the number of the round, the flag for what is not finite, a spare word."""

    def __init__(self, driver: Driver, cache: Path, dtype: str, ordinal: int = 0) -> None:
        self.driver, self.dtype, self.device = driver, dtype, driver.device(ordinal)
        driver("cuCtxSetCurrent", self.device.context)
        self.kernels = Kernels(driver, self.device, dtype, cache)
        self.stream = driver.stream()
        self.started, self.ended = driver.event(timing=True), driver.event(timing=True)
        self.allocated: list[int] = []
        word, self._free_word = pinned(driver, 4)
        self.seen = word.view(np.uint32)
        self.seen[0] = 0
        self.table, self.small = self.allocate(TABLE_BYTES), self.allocate(256)
        self.driver("cuMemsetD32Async", self.small, 0, 64, self.stream)

    def allocate(self, size: int) -> int:
        """Device memory that `close` frees."""
        self.allocated.append(int(self.driver("cuMemAlloc", size)))
        return self.allocated[-1]

    def free(self, pointers: Sequence[int]) -> None:
        """Frees some of it before."""
        self.settle()
        for pointer in pointers:
            self.driver("cuMemFree", pointer)
            self.allocated.remove(pointer)

    def close(self) -> None:
        """Frees everything."""
        self.free(list(self.allocated))
        for event in (self.started, self.ended):
            self.driver("cuEventDestroy", event)
        self._free_word()
        self.kernels.close()
        self.driver("cuStreamDestroy", self.stream)

    def settle(self) -> None:
        """Waits for the stream."""
        self.driver("cuEventRecord", self.ended, self.stream)
        self.driver.wait(self.ended, "the benchmark")

    def to_device(self, pointer: int, value: Any) -> None:
        """Copies an array there."""
        self.driver("cuMemcpyHtoDAsync", pointer, value.ctypes.data, value.nbytes, self.stream)
        self.settle()

    def to_host(self, pointer: int, size: int) -> Any:
        """Copies bytes back."""
        value = np.empty(size, np.uint8)
        self.driver("cuMemcpyDtoHAsync", value.ctypes.data, pointer, size, self.stream)
        self.settle()
        return value

    def prepared(
        self, inputs: Sequence[int], outputs: Sequence[int | Sequence[int]], elements: int
    ) -> tuple[Any, int, Combination]:
        """What `launch` takes for a combination of pointers, with the coefficients that are in `table`."""
        targets = [[one] if isinstance(one, int) else list(one) for one in outputs]
        parameters = combination(inputs, targets, elements)
        parameters.data, parameters.round, parameters.not_finite = self.table, self.small, self.small + 4
        return (*self.kernels.combination(parameters, len(outputs)), parameters)

    def launch(self, function: Any, grid: int, parameters: Combination) -> None:
        """One combination."""
        self.driver.launch(function, grid, BLOCK, self.stream, [parameters])

    def copy(self, target: int, source: int, size: int) -> None:
        """Bytes from pointer to pointer."""
        self.driver("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def empty(self) -> None:
        """The smallest kernel that there is."""
        self.advance(1)

    def advance(self, blocks: int) -> None:
        """Counts: the block of the next round, and all rounds, which the host finds in `seen`."""
        self.kernels.advance(self.stream, self.small + 8, blocks, self.seen.ctypes.data)

    def seconds(self, work: Callable[..., None], *arguments: Any, repeats: int = 20) -> float:
        """Median device seconds of a piece of work, between two events around a graph with many of it.

        Between events alone a small launch would be as long as the host takes to ask for it.
        """
        found = []
        work(*arguments)  # loads what is loaded late
        self.settle()

        def many() -> None:
            for _ in range(IN_A_ROW):
                work(*arguments)

        graph = self.driver.capture(self.stream, many)
        for _ in range(repeats + 2):
            self.driver("cuEventRecord", self.started, self.stream)
            self.driver("cuGraphLaunch", graph, self.stream)
            self.settle()
            found.append(self.driver("cuEventElapsedTime", self.started, self.ended) / 1e3 / IN_A_ROW)
        self.driver("cuGraphExecDestroy", graph)
        return float(np.median(found[2:]))
