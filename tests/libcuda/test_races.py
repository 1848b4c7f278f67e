"""Order: what may overlap does, and two that meet in memory without an order between them are found, in every run."""

# covers: tests/libcuda/races.cc, tests/libcuda/modules.cc
from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from engines.cuda.kernels import Combination, combination
from tests.libcuda.conftest import OK, Cuda, broken
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus


def fill(cuda: Cuda, memory: int, value: int, stream: Any) -> None:
    cuda("cuMemsetD8Async", memory, value, 256, stream)


def wait(cuda: Cuda, waiting: Any, other: Any) -> None:
    event = cuda.event()
    cuda("cuEventRecord", event, other)
    cuda("cuStreamWaitEvent", waiting, event, 0)


def test_streams_run_in_every_order_that_events_allow() -> None:
    ends = set()
    for seed in range(20):
        cuda = Cuda(Machine(1, seed=seed, eager=seed % 3))
        memory, streams = cuda.alloc(), [cuda.stream() for _ in range(3)]
        for value, stream in enumerate(streams):
            fill(cuda, memory, value, stream)
        cuda("cuCtxSynchronize")
        ends.add(int(cuda.machine.view(memory, 1)[0]))
        assert any("race" in one for one in cuda.machine.forgive()), "whatever the order was"
    assert ends == {0, 1, 2}


def test_the_same_seed_is_the_same_order() -> None:
    ends = []
    for _ in range(2):
        cuda = Cuda(Machine(1, seed=5, eager=1))
        memory, streams = [cuda.alloc() for _ in range(9)], [cuda.stream() for _ in range(3)]
        for n in range(90):
            fill(cuda, memory[n % 9], n, streams[n * n % 3])
        cuda("cuCtxSynchronize")
        ends.append([int(cuda.machine.view(one, 1)[0]) for one in memory])
        cuda.machine.forgive()
    assert ends[0] == ends[1]


@pytest.mark.parametrize("first", ["read", "write"])
@pytest.mark.parametrize("second", ["read", "write"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("captured", [False, True], ids=["streams", "graph"])
def test_two_streams(cuda: Cuda, captured: bool, ordered: bool, first: str, second: str) -> None:
    """Reads may overlap; a read and a write, or two writes, must be ordered, on streams and in a graph."""
    memory, main, streams = cuda.alloc(), cuda.stream(), [cuda.stream() for _ in range(2)]
    buffers = [cuda.alloc() for _ in range(2)]
    if captured:
        cuda.capture(main)
    for one in streams:
        wait(cuda, one, main)
    for kind, stream, buffer in zip((first, second), streams, buffers, strict=True):
        target, source = (memory, buffer) if kind == "write" else (buffer, memory)
        cuda("cuMemcpyDtoDAsync", target, source, 256, stream)
        if ordered and stream is streams[0]:
            wait(cuda, streams[1], stream)
    for one in streams:
        wait(cuda, main, one)
    if captured:
        graph = cuda.graph(main)
        for _ in range(3):
            cuda("cuGraphLaunch", graph, main)
    cuda("cuStreamSynchronize", main)
    found = cuda.machine.forgive()
    assert bool(found) == (not ordered and "write" in (first, second)), found
    assert all(one.startswith("race: cuMemcpyDtoDAsync") for one in found)


def test_only_bytes_that_meet_count(cuda: Cuda) -> None:
    memory, streams = cuda.alloc(512), [cuda.stream() for _ in range(2)]
    cuda("cuMemsetD8Async", memory, 0, 256, streams[0])
    cuda("cuMemsetD8Async", memory + 256, 0, 256, streams[1])
    assert cuda.machine.forgive() == []
    cuda("cuMemsetD8Async", memory + 255, 0, 2, streams[0])
    assert "race" in cuda.machine.forgive()[0]


@pytest.mark.parametrize("how", ["cuEventSynchronize", "cuEventQuery", "cuStreamSynchronize", "cuStreamQuery"])
def test_a_host_that_waits_is_an_order(cuda: Cuda, how: str) -> None:
    memory, streams, event = cuda.alloc(), [cuda.stream() for _ in range(2)], cuda.event()
    fill(cuda, memory, 1, streams[0])
    cuda("cuEventRecord", event, streams[0])
    handle = event if "Event" in how else streams[0]
    while cuda.status(how, handle) != OK:
        pass
    fill(cuda, memory, 2, streams[1])
    assert cuda.machine.forgive() == []


def test_an_older_record_of_an_event_is_no_order(cuda: Cuda) -> None:
    """A wait is for what the event meant when the wait was asked for."""
    memory, first, second, event = cuda.alloc(), cuda.stream(), cuda.stream(), cuda.event()
    cuda("cuEventRecord", event, first)
    cuda("cuStreamWaitEvent", second, event, 0)
    fill(cuda, memory, 1, first)
    cuda("cuEventRecord", event, first)
    fill(cuda, memory, 2, second)
    broken(cuda.machine, "race")


def test_a_wait_for_an_event_that_was_never_recorded_waits_for_nothing(cuda: Cuda) -> None:
    memory, first, second, event = cuda.alloc(), cuda.stream(), cuda.stream(), cuda.event()
    fill(cuda, memory, 1, first)
    cuda("cuStreamWaitEvent", second, event, 0)
    fill(cuda, memory, 2, second)
    broken(cuda.machine, "race")


def test_launches_of_one_graph_follow_each_other(cuda: Cuda) -> None:
    memory, main, other = cuda.alloc(), cuda.stream(), cuda.stream()
    cuda.capture(main)
    fill(cuda, memory, 1, main)
    graph = cuda.graph(main)
    cuda("cuGraphLaunch", graph, main)
    cuda("cuGraphLaunch", graph, other)
    assert cuda.machine.forgive() == []


# --- kernels ---------------------------------------------------------------------------------------------------------


class Table:
    """A combination of one latent into another, with its block of numbers in a table of three."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.stream = cuda, cuda.stream()
        self.numbers, self.round, self.flag = cuda.alloc(3 * 64), cuda.alloc(), cuda.alloc()
        self.latents = [cuda.alloc(64) for _ in range(3)]
        for memory in (self.numbers, self.round, self.flag, *self.latents):
            cuda("cuMemsetD32Async", memory, 0, 16, self.stream)
        cuda("cuMemsetD32Async", self.numbers, 0, 48, self.stream)
        self.function = cuda.kernel("combine_latents", "float32", 1, 1)
        cuda("cuStreamSynchronize", self.stream)

    def combine(self, stream: Any, target: int, source: int, elements: int = 16, stride: int = 16) -> str:
        parameters: Combination = combination([source], [[target]], elements)
        parameters.data, parameters.stride, parameters.rows = self.numbers, stride, 3
        parameters.round, parameters.not_finite = self.round, self.flag
        return self.cuda.launch_status(self.function, stream, [parameters], block=32)


@pytest.mark.parametrize(("block", "meets"), [(0, False), (1, True), (2, False)])
def test_the_block_of_the_table_that_a_kernel_reads(cuda: Cuda, block: int, meets: bool) -> None:
    """Which one is known only when it runs, from a number in memory."""
    table, uploads = Table(cuda), cuda.stream()
    cuda("cuMemsetD32Async", table.round, 1, 1, table.stream)
    cuda("cuMemsetD32Async", table.numbers + 64 * block, 0, 16, uploads)
    assert table.combine(table.stream, table.latents[0], table.latents[1]) == OK
    found = cuda.machine.forgive()
    assert [one.split(",")[0] for one in found] == [
        "race: combine_latents reads what cuMemsetD32Async writes",
    ][:meets] or [one.split(",")[0] for one in found] == ["race: cuMemsetD32Async writes what combine_latents reads"]
    assert bool(found) == meets


def test_a_block_outside_the_table(cuda: Cuda) -> None:
    table = Table(cuda)
    cuda("cuMemsetD32Async", table.round, 3, 1, table.stream)
    assert table.combine(table.stream, table.latents[0], table.latents[1]) == OK
    broken(cuda.machine, "combine_latents touches 4 bytes")
    assert cuda.status("cuStreamQuery", table.stream) == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_latents_outside_their_memory(cuda: Cuda) -> None:
    table = Table(cuda)
    assert table.combine(table.stream, table.latents[0], table.latents[1], elements=17) == OK
    broken(cuda.machine, "combine_latents touches 68 bytes")


def test_threads_of_one_launch_are_in_no_order(cuda: Cuda) -> None:
    table = Table(cuda)
    memory = cuda.alloc(128)
    cuda("cuMemsetD32Async", memory, 0, 32, table.stream)
    assert table.combine(table.stream, memory, memory) == OK
    assert cuda.machine.forgive() == [], "in place every thread reads before it writes"
    assert table.combine(table.stream, memory + 4, memory) == OK
    broken(cuda.machine, "its threads are in no order")


def test_an_address_that_does_not_fit_the_width(cuda: Cuda) -> None:
    table = Table(cuda)
    table.function = cuda.kernel("combine_latents", "float32", 1, 4)
    memory = cuda.alloc(128)
    assert table.combine(table.stream, table.latents[0], memory + 4) == "CUDA_ERROR_MISALIGNED_ADDRESS"
    broken(cuda.machine, "not aligned to the 4 elements")
    assert table.combine(table.stream, table.latents[0], memory, elements=15) == "CUDA_ERROR_MISALIGNED_ADDRESS"
    broken(cuda.machine, "not aligned")


def test_the_kernel_is_the_projects_own(cuda: Cuda) -> None:
    table = Table(cuda)
    source = cuda.machine.view(table.latents[1], 64).view(np.float32)
    source[:] = np.arange(16)
    cuda.machine.view(table.numbers, 64).view(np.float32)[3] = 2.5
    assert table.combine(table.stream, table.latents[0], table.latents[1]) == OK
    cuda("cuStreamSynchronize", table.stream)
    assert np.array_equal(cuda.machine.view(table.latents[0], 64).view(np.float32), 2.5 * np.arange(16))


@pytest.mark.parametrize("grid", [(0, 1), (1, 0), (1, 1025)])
def test_grids_that_no_gpu_has(cuda: Cuda, grid: tuple[int, int]) -> None:
    memory = ctypes.c_void_p(cuda.alloc())
    status = cuda.launch_status(cuda.kernel(), cuda.stream(), [memory, ctypes.c_uint(8), memory], *grid)
    assert status == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "a grid of")


# --- model calls -----------------------------------------------------------------------------------------------------


def model(cuda: Cuda, stream: Any, reads: int, writes: int) -> None:
    assert cuda.machine.work(stream, None, [(reads, 256)], [(writes, 256)])() == 0


def test_the_longest_chain_of_model_calls(cuda: Cuda) -> None:
    memory, streams = [cuda.alloc() for _ in range(8)], [cuda.stream() for _ in range(3)]
    model(cuda, streams[0], memory[0], memory[1])
    model(cuda, streams[1], memory[2], memory[3])
    assert cuda.machine.chain() == 1, "they may overlap"
    wait(cuda, streams[2], streams[0])
    model(cuda, streams[2], memory[4], memory[5])
    assert cuda.machine.chain(again=True) == 2
    model(cuda, streams[2], memory[4], memory[5])
    assert cuda.machine.chain(again=True) == 1
    cuda("cuStreamSynchronize", streams[1])
    model(cuda, streams[0], memory[0], memory[1])
    assert cuda.machine.chain() == 1
    cuda("cuStreamSynchronize", streams[0])
    model(cuda, streams[1], memory[2], memory[3])
    assert cuda.machine.chain() == 2, "the host waited for one before it asked for the other"


@pytest.mark.parametrize("parallel", [False, True])
def test_chains_in_a_graph(cuda: Cuda, parallel: bool) -> None:
    memory, streams = [cuda.alloc() for _ in range(4)], [cuda.stream() for _ in range(2)]
    cuda.capture(streams[0])
    if parallel:
        wait(cuda, streams[1], streams[0])
    model(cuda, streams[0], memory[0], memory[1])
    if not parallel:
        wait(cuda, streams[1], streams[0])
    model(cuda, streams[1], memory[2], memory[3])
    wait(cuda, streams[0], streams[1])
    graph = cuda.graph(streams[0])
    for _ in range(5):
        cuda("cuGraphLaunch", graph, streams[0])
    assert cuda.machine.chain() == (5 if parallel else 10)


def test_model_calls_with_the_same_scratch_memory(cuda: Cuda) -> None:
    scratch, streams = cuda.alloc(), [cuda.stream() for _ in range(2)]
    for stream in streams:
        assert cuda.machine.work(stream, None, [], [(cuda.alloc(), 8), (scratch, 8)])() == 0
    broken(cuda.machine, "race: a model call writes what a model call writes")


def test_a_model_call_calls_no_driver(cuda: Cuda) -> None:
    stream, statuses = cuda.stream(), []
    cuda.machine.work(stream, lambda: statuses.append(cuda.status("cuMemAlloc", 8)), [], [])()
    cuda("cuStreamSynchronize", stream)
    assert statuses == ["CUDA_ERROR_NOT_PERMITTED"]
    broken(cuda.machine, "cuMemAlloc is called from within work on a stream")


def test_an_error_in_a_model_call_reaches_the_test(cuda: Cuda) -> None:
    def run() -> None:
        raise RuntimeError("the model is wrong")

    cuda.machine.work(cuda.stream(), run, [], [])()
    with pytest.raises(RuntimeError, match="the model is wrong"):
        cuda.machine.check()
