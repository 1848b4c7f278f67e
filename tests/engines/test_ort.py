"""ONNX Runtime's lanes: what they share, and that calls at the same time do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines import ort
from engines.base import Array, Branch
from engines.devices import LaneSpec
from engines.manifest import DENOISER
from engines.ort import Engines, Session
from engines.store import Bundle


@pytest.mark.parametrize(("threads", "sessions"), [(1, 1), (2, 3)])
def test_lanes_of_one_thread_hold_the_weights_once(
    threads: int, sessions: int, shapes: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Counted(Session):
        def __init__(self, bundle: Bundle, network: str, threads: int, *, spin: bool = False) -> None:
            super().__init__(bundle, network, threads, spin=spin)
            opened.append(network)

    monkeypatch.setattr(ort, "Session", Counted)
    engines = Engines(shapes, [LaneSpec("cpu", n, threads) for n in range(3)])
    engines.close()
    assert opened.count(DENOISER) == sessions and engines.backend.lanes == 3


def test_calls_at_the_same_time_on_shared_weights_are_those_made_one_by_one(
    shapes: Bundle, rng: np.random.Generator
) -> None:
    engines = Engines(shapes, [LaneSpec("cpu", n, 1) for n in range(3)])
    samples = rng.standard_normal((3, 1, 4, 16, 16)).astype(np.float32)
    conditioning = [{"encoder_hidden_states": rng.standard_normal((1, 32, 128)).astype(np.float32)} for _ in range(2)]

    def played(lane: int) -> Array:
        """Twenty calls of one to three rows, on a backend and a thread of its own."""
        backend = engines.backend if lane == 0 else engines.sibling(lane)
        backend.bind((1, 4, 16, 16), [700.0, 30.0], conditioning)
        backend.write("x", samples[lane])
        found = []
        for number in range(20):
            rows = 1 + number % 3
            calls: list[list[Branch]] = [[], [], []]
            calls[lane] = [Branch("x", row % 2, f"y{row}", (row + number) % 2) for row in range(rows)]
            backend.predict(calls)
            found += [backend.read(f"y{row}") for row in range(rows)]
        return np.concatenate(found)

    expected = [played(lane) for lane in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(played, range(3)))
    engines.close()
    for one, other in zip(together, expected, strict=True):
        np.testing.assert_array_equal(one, other)
