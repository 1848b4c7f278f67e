"""Captures and graphs. Every test breaks one rule of the driver."""

# covers: tests/libcuda/graphs.cc
from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pytest

from tests.libcuda.conftest import OK, Cuda, broken

pytestmark = pytest.mark.imaginary_gpus
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
UNSAFE: dict[str, Callable[[Cuda, Any], tuple[Any, ...]]] = {
    "cuMemAlloc": lambda cuda, made: (8,),
    "cuMemHostAlloc": lambda cuda, made: (8, 1),
    "cuMemFree": lambda cuda, made: (made["memory"],),
    "cuMemFreeHost": lambda cuda, made: (made["host"],),
    "cuEventQuery": lambda cuda, made: (made["event"],),
    "cuEventSynchronize": lambda cuda, made: (made["event"],),
    "cuStreamQuery": lambda cuda, made: (made["other"],),
    "cuStreamSynchronize": lambda cuda, made: (made["other"],),
    "cuCtxSynchronize": lambda cuda, made: (),
    "cuDevicePrimaryCtxRetain": lambda cuda, made: (1,),
    "cuModuleUnload": lambda cuda, made: (made["module"],),
}


def in_thread(work: Callable[[], Any], cuda: Cuda) -> Any:
    """What a function returns in another thread, on the same device."""
    found: list[Any] = []

    def run() -> None:
        cuda.on(0)
        found.append(work())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def made(cuda: Cuda) -> dict[str, Any]:
    from engines.cuda import kernels
    from tests.libcuda.machine import KERNELS

    code = kernels.machine_code(kernels.Variant("float32"), "90", KERNELS)
    return {
        "memory": cuda.alloc(), "host": cuda.pinned(), "event": cuda.event(), "stream": cuda.stream(),
        "other": cuda.stream(), "module": cuda("cuModuleLoadData", code),
    }  # fmt: skip


@pytest.mark.parametrize("name", UNSAFE)
def test_the_capturing_thread_may_not(cuda: Cuda, made: dict[str, Any], name: str) -> None:
    cuda.capture(made["stream"])
    assert cuda.status(name, *UNSAFE[name](cuda, made)) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    broken(cuda.machine, f"{name} ends a capture")
    target = made["memory"]
    assert cuda.status("cuMemsetD8Async", target, 0, 1, made["stream"]) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    assert cuda.status("cuStreamEndCapture", made["stream"]) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    assert cuda.status("cuMemsetD8Async", target, 0, 1, made["stream"]) == OK, "the stream is as before"


@pytest.mark.parametrize("name", UNSAFE)
@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED], ids=["global", "thread-local", "relaxed"])
def test_other_threads_may_unless_the_capture_is_global(cuda: Cuda, made: dict[str, Any], mode: int, name: str) -> None:
    cuda.capture(made["stream"], mode)
    status = in_thread(lambda: cuda.status(name, *UNSAFE[name](cuda, made)), cuda)
    if mode == GLOBAL or name == "cuCtxSynchronize":  # waits for all streams, the capturing one included
        assert status == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        broken(cuda.machine, f"{name} ends a capture")
        assert cuda.status("cuStreamEndCapture", made["stream"]) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    else:
        assert status == OK
        assert cuda.status("cuStreamEndCapture", made["stream"]) == OK


@pytest.mark.parametrize("what", ["cuMemsetD8Async", "cuEventRecord", "cuStreamWaitEvent", "its event"])
def test_another_thread_may_not_use_a_capturing_stream(cuda: Cuda, made: dict[str, Any], what: str) -> None:
    """What it asks for becomes part of the graph. Whoever waits for an event of it is drawn in, too."""
    stream, other, event = made["stream"], made["other"], made["event"]
    cuda.capture(stream)
    cuda("cuEventRecord", event, stream)
    name, arguments = {
        "cuMemsetD8Async": ("cuMemsetD8Async", (made["memory"], 0, 8, stream)),
        "cuEventRecord": ("cuEventRecord", (cuda.event(), stream)),
        "cuStreamWaitEvent": ("cuStreamWaitEvent", (stream, event, 0)),
        "its event": ("cuStreamWaitEvent", (other, event, 0)),
    }[what]
    assert in_thread(lambda: cuda.status(name, *arguments), cuda) == OK
    assert "another thread captures the stream" in cuda.machine.forgive()[0]


def test_relaxed_captures_allow_everything_but_what_they_wait_for(cuda: Cuda, made: dict[str, Any]) -> None:
    cuda.capture(made["stream"], RELAXED)
    cuda.alloc()
    assert cuda.status("cuStreamQuery", made["stream"]) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    broken(cuda.machine, "asks for the progress of a capturing stream")


def test_another_library_that_may_wait_for_all_streams(cuda: Cuda, made: dict[str, Any]) -> None:
    """As one that makes an execution context in another thread."""
    cuda.capture(made["stream"])
    assert in_thread(lambda: cuda.machine.library_call("create_execution_context"), cuda) == 900
    broken(cuda.machine, "create_execution_context ends a capture")
    cuda.on(1)
    assert cuda.machine.library_call("create_execution_context") == 0


def test_work_that_is_not_joined(cuda: Cuda, made: dict[str, Any]) -> None:
    stream, other, event, memory = made["stream"], made["other"], made["event"], made["memory"]
    cuda.capture(stream)
    cuda("cuEventRecord", event, stream)
    cuda("cuStreamWaitEvent", other, event, 0)
    cuda("cuMemsetD8Async", memory, 0, 8, other)
    assert cuda.status("cuStreamEndCapture", stream) == "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"
    broken(cuda.machine, "work that the first one does not wait for")


def test_events_of_captures(cuda: Cuda, made: dict[str, Any]) -> None:
    """Nobody may ask for one, and nobody may wait for one when the capture has ended."""
    stream, other, event = made["stream"], made["other"], made["event"]
    cuda.capture(stream)
    cuda("cuEventRecord", event, stream)
    graph = cuda.graph(stream)
    for name in ("cuEventQuery", "cuEventSynchronize"):
        assert cuda.status(name, event) == "CUDA_ERROR_CAPTURED_EVENT"
        broken(cuda.machine, f"{name}: the event was last recorded in a capture")
    assert cuda.status("cuStreamWaitEvent", other, event, 0) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "last recorded in a capture that has ended")
    cuda("cuEventRecord", event, stream)
    cuda("cuStreamWaitEvent", other, event, 0)
    cuda("cuEventSynchronize", event)
    cuda("cuGraphExecDestroy", graph)


def test_an_event_from_outside(cuda: Cuda, made: dict[str, Any]) -> None:
    cuda("cuEventRecord", made["event"], made["other"])
    cuda.capture(made["stream"])
    status = cuda.status("cuStreamWaitEvent", made["stream"], made["event"], 0)
    assert status == "CUDA_ERROR_STREAM_CAPTURE_ISOLATION"
    broken(cuda.machine, "waits for an event from outside the capture")


def test_two_captures_do_not_merge(cuda: Cuda, made: dict[str, Any]) -> None:
    cuda.capture(made["stream"])
    cuda("cuEventRecord", made["event"], made["stream"])
    cuda.capture(made["other"])
    assert cuda.status("cuStreamWaitEvent", made["other"], made["event"], 0) == "CUDA_ERROR_STREAM_CAPTURE_MERGE"
    broken(cuda.machine, "would merge two captures")


def test_who_ends_a_capture(cuda: Cuda, made: dict[str, Any]) -> None:
    stream, other, event = made["stream"], made["other"], made["event"]
    assert cuda.status("cuStreamEndCapture", stream) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "the stream is not capturing")
    cuda.capture(stream)
    status = in_thread(lambda: cuda.status("cuStreamEndCapture", stream), cuda)
    assert status == "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"
    broken(cuda.machine, "is called by another thread")
    assert cuda.status("cuStreamEndCapture", stream) == "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
    cuda.capture(stream)
    cuda("cuEventRecord", event, stream)
    cuda("cuStreamWaitEvent", other, event, 0)
    assert cuda.status("cuStreamEndCapture", other) == "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"
    broken(cuda.machine, "is called for another stream than the first")


def test_a_stream_captures_once_at_a_time(cuda: Cuda, made: dict[str, Any]) -> None:
    cuda.capture(made["stream"])
    mode = cuda.api.CUstreamCaptureMode(THREAD_LOCAL)
    assert cuda.status("cuStreamBeginCapture", made["stream"], mode) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "the stream is capturing already")


@pytest.mark.parametrize("name", ["cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync"])
def test_pageable_memory(cuda: Cuda, made: dict[str, Any], name: str) -> None:
    host = (ctypes.c_uint8 * 8)()
    cuda.capture(made["stream"])
    pointers = (made["memory"], ctypes.addressof(host))
    target, source = pointers if name == "cuMemcpyHtoDAsync" else reversed(pointers)
    assert cuda.status(name, target, source, 8, made["stream"]) == "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
    broken(cuda.machine, "copies pageable memory")


# --- launches --------------------------------------------------------------------------------------------------------


def captured(cuda: Cuda, made: dict[str, Any]) -> Any:
    cuda.capture(made["stream"])
    cuda("cuMemsetD8Async", made["memory"], 5, 8, made["stream"])
    return cuda.graph(made["stream"])


def test_a_graph_runs_as_often_as_it_is_launched(cuda: Cuda, made: dict[str, Any]) -> None:
    graph = captured(cuda, made)
    assert (cuda.machine.view(made["memory"], 8) != 5).all(), "nothing runs while it is captured"
    for _ in range(2):
        cuda("cuMemsetD8Async", made["memory"], 1, 8, made["stream"])
        cuda("cuGraphLaunch", graph, made["stream"])
        cuda("cuStreamSynchronize", made["stream"])
        assert (cuda.machine.view(made["memory"], 8) == 5).all()
    cuda("cuGraphExecDestroy", graph)


def test_memory_that_was_freed(cuda: Cuda, made: dict[str, Any]) -> None:
    graph = captured(cuda, made)
    cuda("cuMemFree", made["memory"])
    assert cuda.status("cuGraphLaunch", graph, made["stream"]) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "memory of a node (cuMemsetD8Async) was freed after the graph was made")


def test_a_module_that_was_unloaded(cuda: Cuda, made: dict[str, Any]) -> None:
    function = cuda("cuModuleGetFunction", made["module"], b"advance")
    parameters = [ctypes.c_void_p(made["memory"]), ctypes.c_uint(8), ctypes.c_void_p(made["host"])]
    cuda.capture(made["stream"])
    assert cuda.launch_status(function, made["stream"], parameters) == OK
    graph = cuda.graph(made["stream"])
    cuda("cuModuleUnload", made["module"])
    assert cuda.launch_status(function, made["stream"], parameters) == "CUDA_ERROR_INVALID_HANDLE"
    broken(cuda.machine, "cuLaunchKernel: this function was destroyed before")
    assert cuda.status("cuGraphLaunch", graph, made["stream"]) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "a module was destroyed after the graph was made")


def test_a_module_is_unloaded_while_its_kernel_is_queued(cuda: Cuda, made: dict[str, Any]) -> None:
    function = cuda("cuModuleGetFunction", made["module"], b"advance")
    parameters = [ctypes.c_void_p(made["memory"]), ctypes.c_uint(8), ctypes.c_void_p(made["host"])]
    assert cuda.launch_status(function, made["stream"], parameters) == OK
    cuda("cuModuleUnload", made["module"])
    broken(cuda.machine, "a kernel of the module is queued")


@pytest.mark.parametrize("asked", [False, True], ids=["queued", "perhaps over"])
def test_a_graph_is_destroyed_in_flight(cuda: Cuda, made: dict[str, Any], asked: bool) -> None:
    graph = captured(cuda, made)
    cuda("cuGraphLaunch", graph, made["stream"])
    if asked:
        cuda.machine.violations()  # it runs, and the host has not seen it
    cuda("cuGraphExecDestroy", graph)
    broken(cuda.machine, "the graph may still be running")
    graph = captured(cuda, made)
    cuda("cuGraphLaunch", graph, made["stream"])
    cuda("cuStreamSynchronize", made["stream"])
    cuda("cuGraphExecDestroy", graph)


def test_graphs_on_two_devices(cuda: Cuda, made: dict[str, Any]) -> None:
    """A capture reaches streams of other devices through events."""
    stream, event = made["stream"], made["event"]
    cuda.on(1)
    there, back, memory = cuda.stream(), cuda.event(), cuda.alloc()
    cuda.on(0)
    cuda.capture(stream)
    cuda("cuEventRecord", event, stream)
    cuda.on(1)
    cuda("cuStreamWaitEvent", there, event, 0)
    cuda("cuMemsetD8Async", memory, 3, 8, there)
    cuda("cuEventRecord", back, there)
    cuda.on(0)
    cuda("cuStreamWaitEvent", stream, back, 0)
    graph = cuda.graph(stream)
    before = cuda.machine.work_done(1)
    cuda("cuGraphLaunch", graph, stream)
    cuda("cuStreamSynchronize", stream)
    assert cuda.machine.work_done(1) == before + 1
    assert (cuda.machine.view(memory, 8) == 3).all()
