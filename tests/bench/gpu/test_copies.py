"""Copies between imaginary GPUs, and to and from the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.gpu.copies import LATENTS
from bench.gpu.parts import NotPossibleError
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


def test_pairs(play: Play) -> None:
    assert {(row["from"], row["to"], row["copies"]) for row in play("peer-copies")} == {(0, 1, "peer"), (1, 0, "peer")}


def test_pairs_that_lie_are_staged(play: Play, machine: Machine) -> None:
    machine.set("peer_zeros", 1)
    assert {row["copies"] for row in play("peer-copies")} == {"staged"}


def test_one_gpu_has_no_pairs(play: Play, machine: Machine) -> None:
    Machine(1)
    with pytest.raises(NotPossibleError, match="one GPU"):
        play("peer-copies")


def test_rates_of_every_way(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu.copies.LATENTS", {"small": 1000})
    rows = play("copies")
    assert [row["way"] for row in rows] == ["host to device", "device to host", "on one device", "cuda:0 to cuda:1"]
    assert all(row["us"] > 0 for row in rows)
    assert LATENTS["SD 1.5"] == 4 * 64 * 64 * 2
