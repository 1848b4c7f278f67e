"""Handles, contexts, and what must belong together. Every test breaks one rule of the driver."""

# covers: tests/libcuda/handles.cc
from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from tests.libcuda.conftest import OK, Cuda, broken
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus


def test_nothing_works_before_init(machine: Machine) -> None:
    cuda = Cuda(machine, init=False)
    assert cuda.status("cuDeviceGetCount") == "CUDA_ERROR_NOT_INITIALIZED"
    broken(machine, "cuDeviceGetCount is called before cuInit")


@pytest.mark.parametrize(
    ("make", "use", "destroy", "kind"),
    [
        (lambda cuda: cuda.stream(), "cuStreamQuery", "cuStreamDestroy", "stream"),
        (lambda cuda: cuda.event(), "cuEventQuery", "cuEventDestroy", "event"),
        (lambda cuda: _graph(cuda), "cuGraphDestroy", "cuGraphDestroy", "graph"),
        (lambda cuda: _module(cuda), "cuModuleUnload", "cuModuleUnload", "module"),
    ],
    ids=["stream", "event", "graph", "module"],
)
def test_handles(cuda: Cuda, make: Any, use: str, destroy: str, kind: str) -> None:
    """Unknown, of another kind, destroyed, destroyed twice."""
    handle = make(cuda)
    other = cuda.event() if kind != "event" else cuda.stream()
    for wrong, words in ((type(handle)(0x1230), f"is no {kind}"), (type(handle)(int(other)), "is taken for a")):
        assert cuda.status(use, wrong) == "CUDA_ERROR_INVALID_HANDLE"
        broken(cuda.machine, words)
    cuda(destroy, handle)
    for name in {use, destroy}:
        assert cuda.status(name, handle) == "CUDA_ERROR_INVALID_HANDLE"
        broken(cuda.machine, f"{name}: this {kind} was destroyed before")


def _graph(cuda: Cuda) -> Any:
    stream = cuda.stream()
    cuda.capture(stream)
    return cuda("cuStreamEndCapture", stream)


def _module(cuda: Cuda) -> Any:
    from engines.cuda import kernels
    from tests.libcuda.machine import KERNELS

    return cuda("cuModuleLoadData", kernels.machine_code(kernels.Variant("float32"), "90", KERNELS))


def test_no_handle_and_no_address_comes_twice(cuda: Cuda) -> None:
    seen: set[int] = set()
    for _ in range(50):
        event, memory, host = cuda.event(), cuda.alloc(), cuda.pinned()
        assert not seen & {int(event), memory, host}
        seen |= {int(event), memory, host}
        cuda("cuEventDestroy", event)
        cuda("cuMemFree", memory)
        cuda("cuMemFreeHost", host)


def test_an_event_of_another_context(cuda: Cuda) -> None:
    event = cuda.event()
    cuda.on(1)
    assert cuda.status("cuEventRecord", event, cuda.stream()) == "CUDA_ERROR_INVALID_HANDLE"
    broken(cuda.machine, "the event is of another context than the stream")


def test_a_stream_may_wait_for_an_event_of_another_context(cuda: Cuda) -> None:
    event = cuda.event()
    cuda("cuEventRecord", event, cuda.stream())
    cuda.on(1)
    cuda("cuStreamWaitEvent", cuda.stream(), event, 0)


@pytest.mark.parametrize("which", ["stream", "function"])
def test_a_launch_in_another_context(cuda: Cuda, which: str) -> None:
    function, stream, memory = cuda.kernel(), cuda.stream(), cuda.alloc()
    if which == "function":
        cuda.on(1)
        stream = cuda.stream()
    else:
        cuda.on(1)
        function = cuda.kernel()
    status = cuda.launch_status(function, stream, [ctypes.c_void_p(memory), ctypes.c_uint(8), ctypes.c_void_p(memory)])
    assert status == "CUDA_ERROR_INVALID_HANDLE"
    broken(cuda.machine, f"the {which} is of another context than the current one")


def test_a_fill_in_another_context(cuda: Cuda) -> None:
    memory, stream = cuda.alloc(), cuda.stream()
    cuda.on(1)
    assert cuda.status("cuMemsetD8Async", memory, 0, 8, stream) == "CUDA_ERROR_INVALID_HANDLE"
    broken(cuda.machine, "cuMemsetD8Async: the stream is of another context")


def test_no_current_context(cuda: Cuda) -> None:
    cuda("cuCtxSetCurrent", cuda.api.CUcontext(0))
    assert cuda.status("cuMemAlloc", 8) == "CUDA_ERROR_INVALID_CONTEXT"
    broken(cuda.machine, "no current context")


def test_a_context_that_was_released(cuda: Cuda) -> None:
    cuda("cuDevicePrimaryCtxRelease", 0)
    assert cuda.status("cuMemAlloc", 8) == "CUDA_ERROR_INVALID_CONTEXT"
    broken(cuda.machine, "or one that was destroyed")
    assert cuda.status("cuCtxSetCurrent", cuda.contexts[0]) == "CUDA_ERROR_INVALID_CONTEXT"
    broken(cuda.machine, "cuCtxSetCurrent: this context was destroyed before")
    assert int(cuda("cuDevicePrimaryCtxRetain", 0)) != int(cuda.contexts[0])


def test_released_more_often_than_retained(cuda: Cuda) -> None:
    cuda("cuDevicePrimaryCtxRetain", 0)
    assert cuda.status("cuDevicePrimaryCtxRelease", 0) == cuda.status("cuDevicePrimaryCtxRelease", 0) == OK
    assert cuda.status("cuDevicePrimaryCtxRelease", 0) == "CUDA_ERROR_INVALID_CONTEXT"
    broken(cuda.machine, "released more often than retained")


@pytest.mark.parametrize("end", ["cuDevicePrimaryCtxRelease", "cuDevicePrimaryCtxReset"])
@pytest.mark.parametrize("kind", ["stream", "event", "bytes", "pinned", "module"])
def test_what_a_context_takes_with_it(cuda: Cuda, end: str, kind: str) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "stream": cuda.stream, "event": cuda.event, "bytes": cuda.alloc, "pinned": cuda.pinned,
        "module": lambda: _module(cuda),
    }  # fmt: skip
    makers[kind]()
    cuda(end, 0)
    what = "256 bytes that were not freed" if kind in ("bytes", "pinned") else f"a {kind} that is still there"
    broken(cuda.machine, f"a context is destroyed, and with it {what}")
    assert set(cuda.machine.live()) <= {"context", "context reference"}


def test_references_are_counted(cuda: Cuda) -> None:
    assert cuda.machine.live() == {"context": 2, "context reference": 2}
    cuda("cuDevicePrimaryCtxRetain", 1)
    assert cuda.machine.live()["context reference"] == 3
    for device in (0, 1, 1):
        cuda("cuDevicePrimaryCtxRelease", device)
    assert cuda.machine.live() == {}


def test_devices_that_are_not_there(cuda: Cuda) -> None:
    for name in ("cuDeviceGet", "cuDevicePrimaryCtxRetain"):
        assert cuda.status(name, 2) == "CUDA_ERROR_INVALID_DEVICE"
        broken(cuda.machine, f"{name}: there is no device 2")


def test_code_that_is_no_kernel_of_this_project(cuda: Cuda) -> None:
    assert cuda.status("cuModuleLoadData", b"\x7fELF" + bytes(100)) == "CUDA_ERROR_INVALID_IMAGE"
    broken(cuda.machine, "not code that the project's compiler made")
    assert cuda.status("cuModuleGetFunction", _module(cuda), b"combine_latents") == "CUDA_ERROR_NOT_FOUND"
