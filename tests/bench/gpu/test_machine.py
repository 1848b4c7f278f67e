"""What is said of a machine, with imaginary GPUs and with none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.gpu.machine import ATTRIBUTES
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


def test_facts_of_every_gpu(play: Play) -> None:
    rows = play("device")
    assert rows[0] == {"cuda": 13000, "gpus": 2}
    assert [row["gpu"] for row in rows[1:]] == [0, 0, 1, 1]
    assert {name.lower() for name in ATTRIBUTES} < set(rows[1])
    assert rows[2]["bytes_come_back"]


def test_a_device_that_changes_bytes_fails(play: Play, machine: Machine) -> None:
    machine.skip("cuMemcpyDtoDAsync")
    with pytest.raises(AssertionError, match="cuda:0 gave other bytes back"):
        play("device")
    machine.forgive()
