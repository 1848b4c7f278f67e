"""An imaginary machine with two GPUs for the parts, in this process."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.parts import PARTS, Row, Settings
from engines.cuda.driver import Driver
from tests.fake_cuda import OK, FakeCuda, Stream


class TimedCuda(FakeCuda):
    """What only benchmarks call; their copies outside of captures may use memory that is not pinned."""

    def _copy(self, target: int, source: int, size: int, stream: Stream, devices: Any) -> Any:
        known = [any(a <= p < a + m.size for a, (_, m) in self.memory.items()) for p in (target, source)]
        if all(known):
            return super()._copy(target, source, size, stream, devices)
        assert stream.graph is None, "memory that is not pinned in a capture"

        def copy() -> None:
            ctypes.memmove(target, source, size)

        self.submit(stream, copy)
        return (OK,)

    def _cuEventElapsedTime(self, start: Any, end: Any) -> Any:
        return OK, 0.01

    def _cuMemcpyPeerAsync(self, to: int, _to: Any, of: int, _of: Any, size: int, stream: Stream) -> Any:
        return self._cuMemcpyAsync(to, of, size, stream)

    def _cuDeviceGetAttribute(self, which: Any, device: Any) -> Any:
        known = super()._cuDeviceGetAttribute
        try:
            return known(which, device)
        except KeyError:
            return OK, 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> TimedCuda:
    """The imaginary driver that every part of this process gets."""
    fake = TimedCuda(2, seed=1)
    monkeypatch.setattr(
        "engines.cuda.kernels.machine_code", lambda variant, arch, cache: json.dumps(variant.__dict__).encode()
    )
    monkeypatch.setattr("engines.cuda.backend.PAIR_BYTES", (64,))
    monkeypatch.setattr("engines.cuda.driver.available", lambda: None)
    monkeypatch.setattr("engines.cuda.driver.Driver", lambda: Driver(fake))
    return fake


@pytest.fixture
def play(cuda: TimedCuda, tmp_path: Path) -> Callable[..., list[Row]]:
    """Runs a part by its slug on the imaginary machine: all its figures."""

    def run(slug: str, lanes: tuple[int, ...] = (1, 3)) -> list[Row]:
        (part,) = (part for part in PARTS if part.slug == slug)
        return list(part.load()(Settings(lanes, rehearsal=True, cache=tmp_path)))

    return run
