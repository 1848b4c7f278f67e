"""Sums over latents: the kernels write one partial sum per thread, the host adds them up in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Rows
from engines.cuda.driver import Device, Driver
from engines.cuda.kernels import DISTANCE_BLOCK, DISTANCE_GRID, PARTIALS, PRODUCT_PARTIALS, Kernels, product
from engines.cuda.memory import Memory

AT_ONCE = 16  # distances or inner products that the host waits for together


class Reductions:
    """Distances and inner products on the home device's stream; `settle` waits for it."""

    def __init__(
        self, driver: Driver, memory: Memory, home: Device, kernels: Kernels, stream: Any, settle: Callable[[], None]
    ) -> None:
        self._driver, self._memory, self._home, self._stream = driver, memory, home, stream
        self._kernels, self._settle = kernels, settle
        self._partials = memory.allocate(home, 4 * PRODUCT_PARTIALS * AT_ONCE)
        self._pinned = memory.pinned(4 * PRODUCT_PARTIALS * AT_ONCE).view(np.float32)

    def distances(self, pairs: Sequence[tuple[int, int]], elements: int) -> list[float]:
        """‖a − b‖ / ‖b‖ of pairs of latents, given as device pointers."""
        launches = [
            [
                ctypes.c_void_p(a),
                ctypes.c_void_p(b),
                ctypes.c_ulonglong(elements),
                ctypes.c_void_p(self._at(n, PARTIALS)),
            ]
            for n, (a, b) in enumerate(pairs)
        ]
        return [float(np.sqrt(difference / norm)) for difference, norm in self._totals("distance", launches, 2)]

    def inner_products(self, products: Sequence[tuple[Sequence[int], Rows]], elements: int) -> list[float]:
        """⟨a, b⟩, ‖a‖² and ‖b‖² of pairs of combinations of latents, given as device pointers and two rows."""
        launches = [
            [product(inputs, rows, elements, self._at(n, PRODUCT_PARTIALS))]
            for n, (inputs, rows) in enumerate(products)
        ]
        return [float(total) for sums in self._totals("inner_product", launches, 3) for total in sums]

    def _at(self, n: int, size: int) -> int:
        """Where launch n writes its partial sums."""
        return self._partials + 4 * size * (n % AT_ONCE)

    def _totals(self, kernel: str, launches: Sequence[list[Any]], sums: int) -> Iterator[NDArray[np.float64]]:
        """What a kernel that makes so many sums gives for the parameters of each launch."""
        function, size = self._kernels.function(kernel), sums * DISTANCE_GRID * DISTANCE_BLOCK
        for start in range(0, len(launches), AT_ONCE):
            part = launches[start : start + AT_ONCE]
            with self._memory.on(self._home):
                for parameters in part:
                    self._driver.launch(function, DISTANCE_GRID, DISTANCE_BLOCK, self._stream, parameters)
                copied = self._pinned.ctypes.data, self._partials, 4 * size * len(part)
                self._driver("cuMemcpyDtoHAsync", *copied, self._stream)
            self._settle()
            yield from self._pinned[: size * len(part)].reshape(len(part), sums, -1).sum(2, dtype=np.float64)
