"""The kernel's parts on imaginary GPUs, where the project's source runs compiled for the processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.gpu.device import DeviceBench
from bench.gpu.kernel import ODD, SHAPES
from bench.kernel import _gpu_row
from engines.cuda.driver import Driver
from tests.libcuda.machine import KERNELS, Machine

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


def test_every_type_on_every_gpu(play: Play) -> None:
    rows = play("kernel-correctness")
    assert [(row["gpu"], row["dtype"]) for row in rows] == [
        (gpu, dtype) for gpu in (0, 1) for dtype in ("float16", "bfloat16", "float32")
    ]
    assert all(0.1 < row["error_over_bound"] <= 1 and row["combinations"] >= 21 for row in rows)


COMBINATIONS = 3 * sum(size[0] < 1000 for size in ODD)  # of one type; then one more, three counts, three distances


@pytest.mark.parametrize(
    ("launch", "found"),
    [(1, "the kernel is wrong"), (COMBINATIONS + 2, "counted up"), (COMBINATIONS + 7, "distances are wrong")],
)
def test_a_kernel_that_does_nothing_fails(play: Play, machine: Machine, launch: int, found: str) -> None:
    machine.skip("cuLaunchKernel", launch)
    with pytest.raises(AssertionError, match=found):
        play("kernel-correctness")
    machine.forgive()


def test_two_units_in_the_last_place_are_found(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    to_host = DeviceBench.to_host

    def off(self: DeviceBench, pointer: int, size: int) -> Any:
        raw = to_host(self, pointer, size)
        if self.dtype == "float16" and size == 2 * 257:
            raw.view(np.uint16)[256] += 2
        return raw

    monkeypatch.setattr(DeviceBench, "to_host", off)
    with pytest.raises(AssertionError, match="the kernel is wrong by"):
        play("kernel-correctness")


def test_rates_beside_a_copy(play: Play) -> None:
    rows = play("kernel-bandwidth")
    assert len(rows) == 2 * len(SHAPES)
    assert all(row["of_copy"] > 0 and row["us_empty_launch"] > 0 for row in rows)


def test_one_combination_beside_a_copy(machine: Machine) -> None:
    """`bench kernel` on a GPU: this PyTorch has none, so that only the kernel and the copy are timed."""
    bench = DeviceBench(Driver(), KERNELS, "float16")
    row = _gpu_row(bench, "SD 1.5", 1 << 10, 3, 2)
    bench.close()
    assert (row["inputs"], row["outputs"], row["device"]) == (7, 4, "cuda:0")
    assert row["error"] < 2e-3
    assert {"combine", "copy"} <= set(row["us"])
    assert row["of_copy"]["median"] > 0
