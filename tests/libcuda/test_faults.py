"""Faults on request: failing calls, lost and hanging devices, forgotten waits; and what the machine counts."""

# covers: tests/libcuda/control.cc
from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.libcuda.conftest import OK, Cuda, broken
from tests.libcuda.exporter import Exported, exported
from tests.libcuda.library import DRIVER_API
from tests.libcuda.machine import Machine
from tests.libcuda.test_processes import handle

pytestmark = pytest.mark.imaginary_gpus
HEADER = DRIVER_API.read_text()
FUNCTIONS = re.findall(r"^    X\((cu\w+),", HEADER, re.MULTILINE)
NEVER_COUNTED = {
    "cuGetProcAddress", "cuGetExportTable", "cuGetErrorString", "cuGetErrorName", "cuThreadExchangeStreamCaptureMode",
}  # fmt: skip
BETWEEN_PROCESSES = {"cuIpcOpenMemHandle", "cuIpcCloseMemHandle"}


@pytest.fixture(scope="module")
def theirs() -> Iterator[Exported]:
    """Memory of another process."""
    with exported(8) as memory:
        yield memory


def _between_processes(cuda: Cuda, name: str, theirs: Exported) -> dict[str, tuple[Any, ...]]:
    if name not in BETWEEN_PROCESSES:
        return {}
    given = (handle(cuda, theirs.handle), 1)
    return {name: given if name == "cuIpcOpenMemHandle" else (int(cuda("cuIpcOpenMemHandle", *given)),)}


def arguments(cuda: Cuda, name: str, theirs: Exported) -> dict[str, tuple[Any, ...]]:
    """Of a good call of every function, with things of its own, or memory of another process."""
    stream, event, device, host = cuda.stream(), cuda.event(), cuda.alloc(), cuda.pinned()
    timed = [cuda("cuEventCreate", 0) for _ in range(2)]
    for one in timed:
        cuda("cuEventRecord", one, stream)
    cuda("cuStreamSynchronize", stream)
    capturing, mode = cuda.stream(), cuda.api.CUstreamCaptureMode(2)
    if name == "cuStreamEndCapture":
        cuda("cuStreamBeginCapture", capturing, mode)
    graphs, executables = [], []
    for _ in range(3):
        once = cuda.stream()
        cuda("cuStreamBeginCapture", once, mode)
        graphs.append(cuda("cuStreamEndCapture", once))
        executables.append(cuda("cuGraphInstantiate", graphs[-1], 0))
    from engines.cuda import kernels
    from tests.libcuda.machine import KERNELS

    code = kernels.machine_code(kernels.Variant("float32"), "90", KERNELS)
    modules = [cuda("cuModuleLoadData", code) for _ in range(2)]
    attribute = cuda.api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    kind = cuda.api.CUpointer_attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE
    copies = {
        "cuMemcpyAsync": (device, host),
        "cuMemcpyHtoDAsync": (device, host),
        "cuMemcpyDtoHAsync": (host, device),
        "cuMemcpyDtoDAsync": (device, device),
    }
    there = cuda.contexts[0]  # fmt: skip
    return {
        "cuInit": (0,), "cuDeviceGet": (0,), "cuDeviceGetName": (64, 0), "cuDeviceGetPCIBusId": (64, 0),
        "cuDeviceGetAttribute": (attribute, 0), "cuDeviceCanAccessPeer": (0, 1), "cuDevicePrimaryCtxRetain": (1,),
        "cuDevicePrimaryCtxRelease": (1,), "cuDevicePrimaryCtxReset": (1,), "cuDevicePrimaryCtxGetState": (0,),
        "cuCtxSetCurrent": (cuda.contexts[0],), "cuCtxEnablePeerAccess": (cuda.contexts[1], 0),
        "cuCtxDisablePeerAccess": (cuda.contexts[1],), "cuMemAlloc": (8,), "cuMemFree": (cuda.alloc(),),
        "cuMemHostAlloc": (8, 1), "cuMemFreeHost": (cuda.pinned(),), "cuMemsetD8Async": (device, 0, 8, stream),
        "cuMemsetD32Async": (device, 0, 2, stream), "cuStreamCreate": (1,), "cuStreamCreateWithPriority": (1, 0),
        "cuStreamDestroy": (cuda.stream(),), "cuStreamQuery": (cuda.stream(),), "cuStreamSynchronize": (stream,),
        "cuStreamWaitEvent": (stream, event, 0), "cuStreamBeginCapture": (cuda.stream(), mode),
        "cuStreamEndCapture": (capturing,), "cuStreamIsCapturing": (stream,), "cuEventCreate": (2,),
        "cuEventDestroy": (cuda.event(),), "cuEventRecord": (event, stream), "cuEventQuery": (timed[0],),
        "cuEventSynchronize": (event,), "cuEventElapsedTime": tuple(timed), "cuGraphInstantiate": (graphs[0], 0),
        "cuGraphLaunch": (executables[0], stream), "cuGraphDestroy": (graphs[1],),
        "cuGraphExecDestroy": (executables[1],), "cuModuleLoadData": (code,), "cuModuleUnload": (modules[0],),
        "cuModuleGetFunction": (modules[1], b"advance"), "cuPointerGetAttribute": (kind, device),
        "cuMemcpyPeerAsync": (device, there, device, there, 8, stream), "cuMemGetAddressRange": (device,),
        "cuIpcGetMemHandle": (device,), **_between_processes(cuda, name, theirs),
        **{name: (*two, 8, stream) for name, two in copies.items()},
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NEVER_COUNTED])
def test_the_nth_call_of_any_function_fails(name: str, theirs: Exported) -> None:
    """It does nothing then; the call before it and the call after it are as they are without a fault."""
    cuda = Cuda(Machine(2, eager=0))
    given = arguments(cuda, name, theirs).get(name, ())
    before, live = cuda.machine.calls(name), cuda.machine.live()
    cuda.machine.fail(name, 1, "CUDA_ERROR_LAUNCH_FAILED")
    if name == "cuLaunchKernel":
        given = (cuda.kernel(), 1, 1, 1, 1, 1, 1, 0, cuda.stream(), 0, 0)
        live = cuda.machine.live()
    assert cuda.status(name, *given) == "CUDA_ERROR_LAUNCH_FAILED"
    assert cuda.machine.calls(name) == before + 1
    assert cuda.machine.live() == live, "a call that fails does nothing"
    cuda.machine.forgive()
    if name not in ("cuLaunchKernel", "cuCtxDisablePeerAccess"):
        assert cuda.status(name, *given) == OK


def test_the_third_from_now(cuda: Cuda) -> None:
    cuda.machine.fail("cuMemAlloc", 3, "CUDA_ERROR_OUT_OF_MEMORY")
    assert [cuda.status("cuMemAlloc", 8) for _ in range(4)] == [OK, OK, "CUDA_ERROR_OUT_OF_MEMORY", OK]


def test_a_skipped_call(cuda: Cuda) -> None:
    memory, stream = cuda.alloc(), cuda.stream()
    cuda.machine.skip("cuMemsetD8Async", 2)
    for value in (1, 2):
        assert cuda.status("cuMemsetD8Async", memory, value, 8, stream) == OK
    cuda("cuStreamSynchronize", stream)
    assert (cuda.machine.view(memory, 8) == 1).all()


@pytest.mark.parametrize("end", ["cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxReset"])
def test_errors_stick_to_a_context_until_it_is_destroyed(cuda: Cuda, end: str) -> None:
    stream, event, lost = cuda.stream(), cuda.event(), "CUDA_ERROR_ILLEGAL_ADDRESS"
    cuda.machine.fail("cuEventRecord", 1, lost, sticky=True)
    assert cuda.status("cuEventRecord", event, stream) == lost
    for name, given in {
        "cuMemAlloc": (8,), "cuStreamQuery": (stream,), "cuEventQuery": (event,), "cuEventRecord": (event, stream),
        "cuCtxSynchronize": (), "cuStreamCreate": (1,), "cuStreamDestroy": (stream,),
    }.items():  # fmt: skip
        assert cuda.status(name, *given) == lost, name
    cuda.on(1)
    cuda.alloc()  # the other device goes on
    assert cuda.status("cuStreamQuery", stream) == lost, "a stream of the lost context, from wherever"
    assert cuda.status(end, 0) == OK
    if end.endswith("Reset"):
        cuda("cuDevicePrimaryCtxRelease", 0)
    cuda("cuCtxSetCurrent", cuda("cuDevicePrimaryCtxRetain", 0))
    cuda.alloc()
    assert cuda.status("cuStreamQuery", stream) == "CUDA_ERROR_INVALID_HANDLE"
    broken(cuda.machine, "this stream was destroyed before")


def test_a_device_that_is_lost_and_one_that_does_not_come_back(cuda: Cuda) -> None:
    memory, stream = cuda.alloc(), cuda.stream()
    cuda.machine.set("lost_after", 2, device=0)
    cuda.machine.set("gone", 1, device=0)
    for value in range(4):
        cuda("cuMemsetD8Async", memory, value, 8, stream)
    assert cuda.status("cuStreamSynchronize", stream) == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert (cuda.machine.view(memory, 8) == 1).all(), "two operations ran"
    cuda("cuDevicePrimaryCtxRelease", 0)
    assert cuda.status("cuDevicePrimaryCtxRetain", 0) == "CUDA_ERROR_DEVICE_UNAVAILABLE"


def test_waiting_for_a_lost_device_ends(cuda: Cuda) -> None:
    """Another device that waits for it goes on, with what lay there before."""
    memory, stream, event = cuda.alloc(), cuda.stream(), cuda.event()
    cuda.machine.set("lost_after", 0, device=0)
    cuda("cuMemsetD8Async", memory, 1, 8, stream)
    cuda("cuEventRecord", event, stream)
    cuda.on(1)
    other, there = cuda.stream(), cuda.alloc()
    cuda("cuStreamWaitEvent", other, event, 0)
    cuda("cuMemsetD8Async", there, 2, 8, other)
    cuda("cuStreamSynchronize", other)
    assert (cuda.machine.view(there, 8) == 2).all()


@pytest.mark.parametrize("name", ["cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuMemFree"])
def test_a_device_that_hangs(cuda: Cuda, name: str) -> None:
    """Queries say that it is not ready; what would wait for ever says so in place of that."""
    memory, stream, event = cuda.alloc(), cuda.stream(), cuda.event()
    cuda("cuMemsetD8Async", memory, 1, 8, stream)
    cuda("cuEventRecord", event, stream)
    cuda.machine.set("hangs", 1)
    for _ in range(5):
        assert cuda.status("cuStreamQuery", stream) == cuda.status("cuEventQuery", event) == "CUDA_ERROR_NOT_READY"
    assert cuda.machine.forgive() == []
    handle = {"cuStreamSynchronize": (stream,), "cuEventSynchronize": (event,), "cuMemFree": (memory,)}
    status = cuda.status(name, *handle.get(name, ()))
    assert status == (OK if name == "cuMemFree" else "CUDA_ERROR_LAUNCH_TIMEOUT")
    assert "for ever" in cuda.machine.forgive()[0]
    cuda.machine.set("hangs", 0)
    cuda.machine.forgive()  # of what runs now, and finds its memory freed


def test_waits_that_are_ignored(cuda: Cuda) -> None:
    memory, streams, events = cuda.alloc(), [cuda.stream() for _ in range(2)], [cuda.event() for _ in range(2)]
    asked: list[tuple[int, int]] = []

    def ignored(stream: int, event: int) -> bool:
        asked.append((stream, event))
        return event == int(events[1])

    cuda.machine.ignore_waits(ignored)
    for event, races in zip(events, (False, True), strict=True):
        cuda("cuMemsetD8Async", memory, 1, 8, streams[0])
        cuda("cuEventRecord", event, streams[0])
        cuda("cuStreamWaitEvent", streams[1], event, 0)
        cuda("cuMemsetD8Async", memory, 2, 8, streams[1])
        cuda("cuCtxSynchronize")
        assert bool(cuda.machine.forgive()) == races
    assert asked == [(int(streams[1]), int(event)) for event in events]


def test_calls_are_counted(cuda: Cuda) -> None:
    before, all_before = cuda.machine.calls("cuMemAlloc"), cuda.machine.calls()
    for _ in range(3):
        cuda.alloc()
    assert cuda.machine.calls("cuMemAlloc") == before + 3
    assert cuda.machine.calls() == all_before + 3


def test_the_driver_is_called_from_several_threads() -> None:
    """The bindings let go of the interpreter in a call, and model calls take it: no thread may wait for another."""
    cuda = Cuda(Machine(1, seed=3, eager=3))
    done: list[int] = []

    def work() -> None:
        cuda.on(0)
        stream, event, memory = cuda.stream(), cuda.event(), cuda.alloc()
        call = cuda.machine.work(stream, lambda: done.append(1), [], [(memory, 8)])
        for _ in range(100):
            assert call() == 0
            cuda("cuEventRecord", event, stream)
            while cuda.status("cuEventQuery", event) != OK:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 400
