"""An imaginary machine with two GPUs for the parts, in this process. Files that use it are marked `imaginary_gpus`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.gpu.parts import PARTS, Row, Settings
from tests.libcuda.machine import KERNELS, Machine


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """What the parts of this process run on."""
    monkeypatch.setattr("engines.cuda.peers.PAIR_BYTES", (64,))
    return Machine(2, seed=1)


@pytest.fixture
def play(machine: Machine) -> Callable[..., list[Row]]:
    """Runs a part by its slug on the imaginary machine: all its figures."""

    def run(slug: str, lanes: tuple[int, ...] = (1, 3)) -> list[Row]:
        (part,) = (part for part in PARTS if part.slug == slug)
        return list(part.load()(Settings(lanes, rehearsal=True, cache=KERNELS)))

    return run
