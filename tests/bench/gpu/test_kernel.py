"""The kernel's parts on imaginary GPUs, where the project's source runs compiled for the processor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu.device import DeviceBench
from bench.gpu.kernel import SHAPES
from bench.kernel import _gpu_row
from engines.cuda.driver import Driver
from tests.bench.gpu.conftest import TimedCuda
from tests.host_kernel import HostKernel

Play = Callable[..., list[dict[str, Any]]]


def test_every_type_on_every_gpu(play: Play) -> None:
    rows = play("kernel-correctness")
    assert [(row["gpu"], row["dtype"]) for row in rows] == [
        (gpu, dtype) for gpu in (0, 1) for dtype in ("float16", "bfloat16", "float32")
    ]
    assert all(0.1 < row["error_over_bound"] <= 1 and row["combinations"] >= 21 for row in rows)


@pytest.mark.parametrize(
    ("name", "fault", "found"),
    [
        ("combine", lambda self, parameters, outputs, width, grid, block: None, "the kernel is wrong"),
        ("advance", lambda self, pointer, blocks: None, "was not counted up"),
        ("distance", lambda self, a, b, elements, partial, grid, block: None, "distances are wrong"),
    ],
)
def test_a_kernel_that_does_nothing_fails(
    play: Play, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., None], found: str
) -> None:
    monkeypatch.setattr(HostKernel, name, fault)
    with pytest.raises(AssertionError, match=found):
        play("kernel-correctness")


def test_one_bit_too_many_fails(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that is wrong by one unit in the last place, twice what rounding explains, is found."""
    combine = HostKernel.combine

    def off(self: HostKernel, parameters: Any, outputs: int, width: int, grid: int, block: int) -> None:
        combine(self, parameters, outputs, width, grid, block)
        if parameters.elements == 257:
            raw = (parameters.target[0] or 0) + 2 * 256
            memory = np.ctypeslib.as_array((ctypes.c_uint16 * 1).from_address(raw))
            memory += 4

    monkeypatch.setattr(HostKernel, "combine", off)
    with pytest.raises(AssertionError, match="the kernel is wrong by"):
        play("kernel-correctness")


def test_rates_beside_a_copy(play: Play) -> None:
    rows = play("kernel-bandwidth")
    assert len(rows) == 2 * len(SHAPES)
    assert all(row["of_copy"] > 0 and row["us_empty_launch"] > 0 for row in rows)


def test_one_combination_beside_a_copy(cuda: TimedCuda, tmp_path: Path) -> None:
    """`bench kernel` on a GPU: this PyTorch has none, so that only the kernel and the copy are timed."""
    bench = DeviceBench(Driver(cuda), tmp_path, "float16")
    row = _gpu_row(bench, "SD 1.5", 1 << 10, 3, 2)
    bench.close()
    assert (row["inputs"], row["outputs"], row["device"]) == (7, 4, "cuda:0")
    assert row["error"] < 2e-3
    assert {"combine", "copy"} <= set(row["us"])
    assert row["of_copy"]["median"] > 0
