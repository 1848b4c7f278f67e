"""How far the device is: who is late, how far the host may run ahead, and lanes that hang."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.cuda.progress import MOST_AHEAD, Progress
from engines.errors import DeviceError
from runtime.sampling.operations import Options
from tests.engines.cuda.test_backend import model, open_cuda, run, schedule
from tests.libcuda.lanes import FunctionNetwork
from tests.libcuda.machine import KERNELS, Machine

pytestmark = pytest.mark.imaginary_gpus


class On:
    """A round on some lanes."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers


def test_the_lanes_that_a_round_waits_for_are_named() -> None:
    """Numbers begin anywhere, also just before they wrap."""
    words = np.array([2**32 - 1, 2**32 - 2, 7, 0], np.uint32)
    told = Progress(words)
    for one in (On(0, 1), On(0, 2), On(0, 1)):
        told.issue(one)
    assert (told.waiting, told.late()) == (3, [])
    words += np.array([2, 2, 1, 0], np.uint32)  # two rounds have begun; lane 2 is not done with the second
    assert (told.waiting, told.late()) == (1, [2])
    words[3] += 1
    assert told.late() == []
    words += np.array([1, 1, 0, 0], np.uint32)
    assert (told.waiting, told.late()) == (0, [1])
    told.restart()
    assert (told.waiting, told.late(), told.stalled()) == (0, [], 0.0)


def test_time_without_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("engines.cuda.progress.time.perf_counter", lambda: now[0])
    words = np.zeros(2, np.uint32)
    told = Progress(words)
    now[0] += 50  # nothing to do is no stall, however long
    told.issue(On(0))
    now[0] += 3
    assert told.stalled() == 3
    words[0] += 1
    assert told.stalled() == 0
    now[0] += 2
    assert told.stalled() == 2
    words[1] += 1
    now[0] += 5
    assert told.stalled() == 0, "all of it has ended"


@pytest.mark.parametrize(("seconds", "allowed"), [(0.1, 1), (0.007, 2), (0.001, MOST_AHEAD)])
def test_a_slow_device_is_asked_for_less_ahead(seconds: float, allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("engines.cuda.progress.time.perf_counter", lambda: now[0])
    words = np.zeros(2, np.uint32)
    told = Progress(words)
    for _ in range(6):
        told.issue(On(0))
        words[0] += 1
        now[0] += seconds
        found = told.allowed()
    assert found == allowed


def test_the_host_does_not_run_ahead_of_slow_rounds() -> None:
    """A lane is given back, at the latest, after the round under way and one more: not after eight."""

    def slow(*arguments: Any) -> Any:
        time.sleep(0.03)
        return model(*arguments)

    machine = Machine(1, seed=3, eager=0)
    backend = CudaBackend(Driver(), [FunctionNetwork(machine, 0, slow)], "float32", KERNELS)
    waiting: list[int] = []
    predict = backend.predict

    def watched(calls: Any) -> None:
        predict(calls)
        waiting.append(backend._progress.waiting)

    backend.predict = watched  # type: ignore[method-assign]
    run(backend, "sequential", Options(k=1), schedule(12), guidance=1.0)
    assert max(waiting[4:]) <= 2 and max(waiting) <= 3


@pytest.mark.parametrize("when", [0, 3])
def test_a_hang_is_found_once_named_and_never_waited_for_again(when: int) -> None:
    """One limit for all of it: neither closing nor asking who is dead waits again, or frees its memory."""
    machine, backend = open_cuda((0, 1, 0), seed=12, lane_timeout=0.3)
    sibling = CudaBackend(
        backend._driver, [lane.network for lane in backend._lanes], "float32", KERNELS, home=2, sibling_of=backend,
        lane_timeout=0.3,
    )  # fmt: skip
    run(backend, "aggressive", Options(k=3), schedule(12))
    start, count, predict = time.perf_counter(), [0], backend.predict

    def hanging(calls: Any) -> None:
        count[0] += 1
        if count[0] == when:
            machine.set("hangs", 1, device=1)
        predict(calls)

    backend.predict = hanging  # type: ignore[method-assign]
    if not when:  # in what is sent up before the first round
        machine.set("hangs", 1, device=1)
    with pytest.raises(DeviceError, match=r"did not end within 0\.3 s: lane 1 \(cuda:1\) hangs.*--lane-timeout"):
        run(backend, "aggressive", Options(k=3), schedule(12))
    assert backend.dead() == [1]
    assert backend.measurements.stalled() > 0.3 or not when
    freed = machine.calls("cuMemFree")
    sibling.close()
    backend.close()
    assert time.perf_counter() - start < 2, "the limit was waited for more than once"
    assert machine.calls("cuMemFree") == freed
    machine.forgive()
