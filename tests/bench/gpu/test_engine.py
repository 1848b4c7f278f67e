"""The engine's parts on imaginary GPUs, each made to fail by what it is there to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.gpu.engine import FASTEST, SCHEDULERS, distance, wrong
from engines.cuda.backend import CudaBackend
from runtime.sampling.samplers import SAMPLERS

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_sampler_is_compared(play: Play) -> None:
    rows = play("samplers-on-copies")
    assert {row["mode"] for row in rows} == {*SAMPLERS}
    assert {row["scheduler"] for row in rows} == {*SCHEDULERS}
    assert {row["images"] for row in rows} == {3 * 4 * 2}
    assert 0 < max(row["largest_distance"] for row in rows) < 1e-5


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("timesteps", lambda self, key: setattr(self, "_timesteps", [t + 1 for t in self._timesteps])),
        ("conditioning", lambda self, key: self._conditioning.reverse()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_number_that_takes_a_wrong_way_fails(
    play: Play, monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[..., None]
) -> None:
    bind = CudaBackend.bind

    def wrongly(self: CudaBackend, *arguments: Any) -> None:
        bind(self, *arguments)
        fault(self, name)

    monkeypatch.setattr(CudaBackend, "bind", wrongly)
    with pytest.raises(AssertionError, match=r"sequential with ddim on cuda:\[0\]"):
        play("samplers-on-copies", (1,))


def test_a_small_difference_in_one_number_is_found() -> None:
    good = np.ones((2, 4, 9, 7), np.float32)
    bad = good.copy()
    good[:, 0, 0, 0] = 1e6  # as large as a timestep's may become
    bad[:, 0, 0, 0] = 1e6
    bad[1, 0, 0, 1] = 1.01
    assert wrong(good, good, 1e-4) is None
    assert "conditioning's" in (wrong(bad, good, 1e-3) or "")
    bad[1, 0, 0, 1] = 1
    bad[1, 3, 8, 6] = 1.1
    assert "latents'" in (wrong(bad, good, 1e-3) or "")
    bad[0, 0, 0, 5] = np.nan
    assert distance(bad, good) == float("inf")
    assert wrong(bad, good, 1e-3)


def test_overhead_of_rounds(play: Play) -> None:
    rows = play("engine-overhead")
    assert len(rows) == 2 * 2 * 2 * len(FASTEST)
    assert all(row["us_per_round"] > 0 and row["distance_to_cpu"] < 1e-4 for row in rows)


def test_graphs_are_used_where_they_are_asked_for(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    init = CudaBackend.__init__

    def noted(self: CudaBackend, *arguments: Any, graphs: bool, **more: Any) -> None:
        asked.append(graphs)
        init(self, *arguments, graphs=graphs, **more)

    monkeypatch.setattr(CudaBackend, "__init__", noted)
    play("engine-overhead", (1,))
    assert asked == [True, False, True, False]
