"""The CUDA backend against the driver's rules: every wait is needed, lanes overlap, nothing is left, calls are few."""

# covers: engines/cuda/backend.py
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engines.base import Branch, LaneCall
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.cuda.rounds import RoundGraph
from engines.errors import DeviceError, NonFiniteError
from runtime.sampling.operations import Options
from runtime.sampling.place import place
from tests.engines.cuda.test_backend import distance, left, model, reference, run, schedule
from tests.libcuda.lanes import FunctionNetwork
from tests.libcuda.machine import KERNELS, Machine

pytestmark = pytest.mark.imaginary_gpus
AGGRESSIVE = Options(k=4)
MACHINES = [((0, 1, 2, 3), True), ((0, 1, 2, 3), False), ((0, 0, 0, 0), True), ((1, 0, 0), True)]
NAMES = ["peers", "no peers", "one GPU", "uneven"]


@pytest.fixture(autouse=True)
def _few_copies_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.cuda.peers.PAIR_BYTES", (64,))


def opened(
    devices: Sequence[int], *, peers: bool = True, graphs: bool = True, eager: int = 0
) -> tuple[Machine, CudaBackend]:
    machine = Machine(max(devices) + 1, seed=len(devices), eager=eager, peers=peers)
    networks = [FunctionNetwork(machine, device, model) for device in devices]
    return machine, CudaBackend(Driver(), networks, "float32", KERNELS, graphs=graphs)


def image(backend: CudaBackend, steps: int = 9) -> Any:
    return run(backend, "aggressive", AGGRESSIVE, schedule(steps))


def rounds(backend: CudaBackend) -> Callable[[], int]:
    """How many rounds a backend has played from now on."""
    count = [0]
    predict = backend.predict

    def counted(calls: Any) -> None:
        count[0] += 1
        predict(calls)

    backend.predict = counted  # type: ignore[method-assign]
    return lambda: count[0]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "streams"])
@pytest.mark.parametrize(("devices", "peers"), MACHINES, ids=NAMES)
def test_every_wait_is_needed(devices: tuple[int, ...], peers: bool, graphs: bool) -> None:
    """Any one of them that is left out is found in that image, whatever order it happened to run in.

    Only conditioning that goes up to another device before more of it is covered by the wait for what follows.
    """
    missed, number, asked = [], 0, 1
    while number < asked:
        number, asked = number + 1, 0
        machine, backend = opened(devices, peers=peers, graphs=graphs)

        def nth(stream: int, event: int, number: int = number) -> bool:
            nonlocal asked
            asked += 1
            return asked == number

        machine.ignore_waits(nth)
        try:
            image(backend, 5)
        except (DeviceError, NonFiniteError):
            machine.forgive()
            asked = max(asked, number + 1)
            continue
        if not machine.forgive() and number <= asked:
            missed.append(number)
    assert number > 8
    assert len(missed) <= (devices == (1, 0, 0)), missed


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "streams"])
@pytest.mark.parametrize(("devices", "peers"), MACHINES, ids=NAMES)
def test_lanes_overlap(devices: tuple[int, ...], peers: bool, graphs: bool) -> None:
    """In no round does a model call wait for another one."""
    machine, backend = opened(devices, peers=peers, graphs=graphs)
    for _ in range(3):
        machine.chain(again=True)
        played = rounds(backend)
        image(backend)
        assert machine.chain() == played()


@pytest.mark.parametrize("images", [0, 3], ids=["its first wait", "an image"])
@pytest.mark.parametrize("peers", [True, False], ids=["peers", "no peers"])
def test_a_capture_is_left_alone_by_images_on_other_lanes(
    images: int, peers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph is captured on lanes 0 and 2 for as long as another thread works on lanes 1 and 3 of the same GPUs."""
    machine = Machine(2, seed=1, peers=peers)
    networks = [FunctionNetwork(machine, device, model) for device in (0, 1, 0, 1)]
    first = CudaBackend(Driver(), networks, "float32", KERNELS)
    second = CudaBackend(first._driver, networks, "float32", KERNELS, home=1, sibling_of=first)
    capturing, finished = threading.Event(), threading.Event()
    enqueue = first._rounds.enqueue

    def slowly(one: RoundGraph) -> None:
        enqueue(one)
        if int(first._driver("cuStreamIsCapturing", first._main)):
            capturing.set()
            assert finished.wait(30), "the other image waits for the capture"

    def play(backend: CudaBackend, held: tuple[int, ...]) -> float:
        def on_held(branches: Sequence[Branch]) -> Sequence[LaneCall]:
            calls = place(tuple(branches), held, len(networks))
            backend.predict(calls)
            return calls

        got = run(backend, "aggressive", AGGRESSIVE, schedule(9), play=on_held)
        return distance(got, reference("aggressive", AGGRESSIVE, schedule(9)))

    play(first, (0, 2))  # rounds that come again are captured
    for _ in range(images):  # what comes again needs neither memory nor captures, for which threads take turns
        play(second, (1, 3))
    monkeypatch.setattr(first._rounds, "enqueue", slowly)
    with ThreadPoolExecutor(1) as pool:
        captured = pool.submit(play, first, (0, 2))
        try:
            assert capturing.wait(10) or captured.result()
            assert not images or play(second, (1, 3)) < 1e-5
            second.settle()
        finally:
            finished.set()
        assert captured.result() < 1e-5
    for backend in (second, first):
        backend.close()


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "streams"])
@pytest.mark.parametrize(("devices", "peers"), MACHINES, ids=NAMES)
def test_close_leaves_nothing(devices: tuple[int, ...], peers: bool, graphs: bool) -> None:
    machine, backend = opened(devices, peers=peers, graphs=graphs)
    for _ in range(3):
        image(backend)
    backend.close()
    left(machine)


def functions(machine: Machine) -> Iterator[str]:
    """Whose calls an image makes; not `cuStreamEndCapture`, which ends a capture also where it fails."""
    for name in ("cuMemAlloc", "cuMemHostAlloc", "cuStreamWaitEvent", "cuEventRecord", "cuMemcpyAsync",
                 "cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuLaunchKernel", "cuGraphLaunch", "cuGraphInstantiate",
                 "cuStreamBeginCapture", "cuEventQuery", "cuMemsetD32Async",
                 "cuModuleGetFunction", "cuModuleLoadData"):  # fmt: skip
        if machine.calls(name):
            yield name


def test_any_call_may_fail_and_the_next_image_is_right() -> None:
    """The n-th call of every function that an image makes: an error that names it, or an image that is right."""
    wanted = reference("aggressive", AGGRESSIVE, schedule(9))
    machine, backend = opened((0, 1))
    start = {name: machine.calls(name) for name in functions(machine)}
    image(backend)
    image(backend)
    counts = {name: machine.calls(name) - start.get(name, 0) for name in functions(machine)}
    for name, count in counts.items():
        for number in {1, count // 2, count} - {0}:
            machine, backend = opened((0, 1))
            machine.fail(name, number)
            found = []
            for _ in range(3):
                try:
                    found.append(distance(image(backend), wanted) < 1e-5)
                except DeviceError as error:
                    assert "CUDA_ERROR_LAUNCH_FAILED" in str(error), (name, number)
            assert len(found) >= 2 and all(found), (name, number, found)
            backend.close()
            # a capture that an error ended may leave lanes behind, and is given up
            broken = [one for one in machine.forgive() if not one.startswith("cuStreamEndCapture: a stream was given")]
            assert broken == [], (name, number)
            left(machine)


# the context, numbers up, recorded, waited for, launch; and at the end of half a table recorded, or waited for
CALLS_PER_ROUND = 6


@pytest.mark.parametrize(
    ("devices", "mode", "options"),
    [
        ((0,), "sequential", Options(k=1)),
        ((0, 1, 2, 3), "aggressive", AGGRESSIVE),
        ((0,) * 8, "aggressive", AGGRESSIVE),
    ],
    ids=["sequential on one lane", "aggressive on four GPUs", "aggressive on eight lanes of one"],
)
def test_driver_calls_per_round(devices: tuple[int, ...], mode: str, options: Options) -> None:
    """Once rounds are graphs, on GPUs that are so fast that the host never waits."""
    machine, backend = opened(devices, eager=400)

    found = []
    for steps in (21, 21, 21, 41, 41, 41):
        played, before = rounds(backend), machine.calls()
        run(backend, mode, options, schedule(steps))
        found.append((played(), machine.calls() - before))
    (few, less), (many, more) = found[2], found[5]
    assert (more - less) / (many - few) <= CALLS_PER_ROUND, found
