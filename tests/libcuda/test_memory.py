"""Memory and copies. Every test breaks one rule of the driver."""

# covers: tests/libcuda/memory.cc
from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests import ROOT
from tests.libcuda.conftest import OK, Cuda, broken

pytestmark = pytest.mark.imaginary_gpus


@pytest.mark.parametrize("which", ["target", "source"])
def test_a_copy_beyond_an_allocation(cuda: Cuda, which: str) -> None:
    small, large = cuda.alloc(100), cuda.alloc(200)
    target, source = (small, large) if which == "target" else (large, small)
    stream = cuda.stream()
    assert cuda.status("cuMemcpyDtoDAsync", target, source, 101, stream) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "101 bytes reach beyond an allocation of 100")
    assert cuda.status("cuMemcpyDtoDAsync", target, source, 100, stream) == OK


def test_copies_of_the_wrong_kind(cuda: Cuda) -> None:
    device, host, stream = cuda.alloc(), cuda.pinned(), cuda.stream()
    for name, target, source, words in (
        ("cuMemcpyHtoDAsync", device, device, "device memory is given for host memory"),
        ("cuMemcpyHtoDAsync", host, host, "host memory is given for device memory"),
        ("cuMemcpyDtoHAsync", device, device, "device memory is given for host memory"),
        ("cuMemcpyDtoHAsync", host, host, "host memory is given for device memory"),
        ("cuMemcpyDtoDAsync", device, host, "host memory is given for device memory"),
    ):
        assert cuda.status(name, target, source, 8, stream) == "CUDA_ERROR_INVALID_VALUE"
        broken(cuda.machine, f"{name}: {words}")


def test_a_peer_without_access(cuda: Cuda) -> None:
    source = cuda.alloc()
    cuda.on(1)
    target, stream = cuda.alloc(), cuda.stream()
    assert cuda.status("cuMemcpyAsync", target, source, 8, stream) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "memory of another device, without peer access")
    cuda("cuCtxEnablePeerAccess", cuda.contexts[0], 0)
    cuda("cuMemcpyAsync", target, source, 8, stream)
    assert cuda.status("cuCtxEnablePeerAccess", cuda.contexts[0], 0) == "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED"
    cuda("cuStreamSynchronize", stream)
    cuda("cuCtxDisablePeerAccess", cuda.contexts[0])
    assert cuda.status("cuMemcpyAsync", target, source, 8, stream) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "without peer access")


def test_a_copy_between_contexts_needs_no_access(cuda: Cuda) -> None:
    """Unless it is captured: the driver goes through the host then."""
    source = cuda.alloc()
    cuda.on(1)
    target, stream = cuda.alloc(), cuda.stream()
    both = target, cuda.contexts[1], source, cuda.contexts[0], 256, stream
    cuda.machine.view(source, 256)[:] = 9
    cuda("cuMemcpyPeerAsync", *both)
    cuda("cuStreamSynchronize", stream)
    assert (cuda.machine.view(target, 256) == 9).all()
    swapped = target, cuda.contexts[0], source, cuda.contexts[1], 256, stream
    assert cuda.status("cuMemcpyPeerAsync", *swapped) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "of another context than the one that is named")
    cuda.capture(stream)
    assert cuda.status("cuMemcpyPeerAsync", *both) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "without peer access")


def test_machines_without_peers(cuda: Cuda) -> None:
    cuda.machine.set("peers", 0)
    assert cuda("cuDeviceCanAccessPeer", 0, 1) == 0
    assert cuda.status("cuCtxEnablePeerAccess", cuda.contexts[1], 0) == "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"


def test_fresh_memory_is_nan(cuda: Cuda) -> None:
    for dtype in (np.float16, np.float32, np.float64):
        assert np.isnan(cuda.machine.view(cuda.alloc(64), 64).view(dtype)).all()
        assert np.isnan(cuda.machine.view(cuda.pinned(64), 64).view(dtype)).all()


def test_freed_twice_never_allocated_and_as_the_wrong_kind(cuda: Cuda) -> None:
    device, host = cuda.alloc(), cuda.pinned()
    for name, pointer in (
        ("cuMemFree", host), ("cuMemFreeHost", device), ("cuMemFree", device + 8), ("cuMemFree", 4096),
    ):  # fmt: skip
        assert cuda.status(name, pointer) == "CUDA_ERROR_INVALID_VALUE"
        broken(cuda.machine, f"{name}: nothing of this kind is allocated")
    cuda("cuMemFree", device)
    cuda("cuMemFreeHost", host)
    for name, pointer in (("cuMemFree", device), ("cuMemFreeHost", host)):
        assert cuda.status(name, pointer) == "CUDA_ERROR_INVALID_VALUE"
        broken(cuda.machine, "freed twice")


def test_use_after_free(cuda: Cuda) -> None:
    memory, other, stream = cuda.alloc(), cuda.alloc(), cuda.stream()
    cuda("cuMemFree", memory)
    assert cuda.status("cuMemcpyDtoDAsync", other, memory, 8, stream) == "CUDA_ERROR_INVALID_VALUE"
    broken(cuda.machine, "not allocated, or not any more")
    assert cuda.machine.work(stream, None, [(memory, 8)], [(other, 8)])() == 0
    broken(cuda.machine, "a model call touches 8 bytes")
    assert cuda.status("cuStreamQuery", stream) == "CUDA_ERROR_ILLEGAL_ADDRESS", "as a kernel that reads freed memory"


def test_freed_while_work_is_queued(cuda: Cuda) -> None:
    memory, stream = cuda.alloc(), cuda.stream()
    cuda("cuMemsetD8Async", memory, 1, 8, stream)
    cuda("cuMemFree", memory)
    assert "freed while work on them is queued" in cuda.machine.forgive()[0]


def test_freed_before_the_host_knows(cuda: Cuda) -> None:
    """The work has run, but nobody asked: on a slower GPU it would still be under way."""
    memory, stream, other = cuda.alloc(), cuda.stream(), cuda.stream()
    cuda("cuMemsetD8Async", memory, 1, 8, stream)
    cuda.machine.violations()  # runs everything
    cuda("cuStreamSynchronize", other)
    cuda("cuMemFree", memory)
    broken(cuda.machine, "before the host knows that cuMemsetD8Async on them is over")


def test_freed_when_the_host_knows(cuda: Cuda) -> None:
    memory, stream = cuda.alloc(), cuda.stream()
    cuda("cuMemsetD8Async", memory, 1, 8, stream)
    cuda("cuStreamSynchronize", stream)
    cuda("cuMemFree", memory)


@pytest.mark.parametrize("kind", ["device", "pinned"])
@pytest.mark.parametrize(("at", "words"), [(100, "behind them"), (-1, "in front of them")])
def test_a_write_past_the_end(cuda: Cuda, kind: str, at: int, words: str) -> None:
    """A model call writes one byte too many: what lies round an allocation is looked at when it is freed."""
    memory, stream = (cuda.alloc if kind == "device" else cuda.pinned)(100), cuda.stream()
    content = cuda.machine.view(memory, 100).ctypes.data

    def run() -> None:
        ctypes.memset(content + at, 0, 1)

    cuda.machine.work(stream, run, [], [(memory, 100)])()
    cuda("cuStreamSynchronize", stream)
    cuda("cuMemFree" if kind == "device" else "cuMemFreeHost", memory)
    broken(cuda.machine, f"100 bytes are freed, and something was written {words}")


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("the host reads device memory", "ctypes.string_at(memory, 1)"),
        ("a call writes far past the end", "ctypes.memset(machine.view(memory, 100).ctypes.data, 0, 5000)"),
        ("the host reads freed host memory", "cuda('cuMemFreeHost', host); ctypes.string_at(host, 1)"),
    ],
)
def test_what_ends_a_process_on_a_gpu_ends_it_here(what: str, code: str) -> None:
    start = """
        import ctypes
        from tests.libcuda.conftest import Cuda
        from tests.libcuda.machine import Machine
        machine = Machine(1)
        cuda = Cuda(machine)
        memory, host = cuda.alloc(100), cuda.pinned(100)
    """
    program = textwrap.dedent(start) + code
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=None, capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV, (what, done.stderr)


def test_out_of_memory_and_what_is_free(cuda: Cuda) -> None:
    cuda.machine.set("free_bytes", 1000)
    memory = cuda.alloc(600)
    assert cuda("cuMemGetInfo") == [400, 16 << 30]
    assert cuda.status("cuMemAlloc", 401) == "CUDA_ERROR_OUT_OF_MEMORY"
    cuda("cuMemFree", memory)
    cuda.alloc(401)


def test_host_memory_that_changes_before_its_copy(cuda: Cuda) -> None:
    memory, host, stream = cuda.alloc(), cuda.pinned(), cuda.stream()
    ctypes.memset(host, 1, 256)
    cuda("cuMemcpyHtoDAsync", memory, host, 256, stream)
    ctypes.memset(host + 100, 2, 1)
    cuda("cuStreamSynchronize", stream)
    broken(cuda.machine, "the host changed the memory before it was copied")
    cuda("cuMemcpyHtoDAsync", memory, host, 256, stream)
    cuda("cuStreamSynchronize", stream)
    ctypes.memset(host, 3, 256)
    assert cuda.machine.forgive() == []


def test_host_memory_that_changes_before_a_graph_copies_it(cuda: Cuda) -> None:
    memory, host, stream = cuda.alloc(), cuda.pinned(), cuda.stream()
    cuda.capture(stream)
    cuda("cuMemcpyHtoDAsync", memory, host, 256, stream)
    graph = cuda.graph(stream)
    for value in (1, 2):
        ctypes.memset(host, value, 256)
        cuda("cuGraphLaunch", graph, stream)
        cuda("cuStreamSynchronize", stream)
        assert (cuda.machine.view(memory, 256) == value).all()
    cuda("cuGraphLaunch", graph, stream)
    ctypes.memset(host, 3, 1)
    cuda("cuStreamSynchronize", stream)
    broken(cuda.machine, "the host changed the memory before it was copied")


def test_host_memory_that_a_copy_changes_is_right(cuda: Cuda) -> None:
    """From one device into host memory and from there to another one, in order: nothing to object to."""
    first, second, host, stream = cuda.alloc(), cuda.alloc(), cuda.pinned(), cuda.stream()
    cuda("cuMemsetD8Async", first, 7, 256, stream)
    cuda("cuMemcpyDtoHAsync", host, first, 256, stream)
    cuda("cuMemcpyHtoDAsync", second, host, 256, stream)
    cuda("cuStreamSynchronize", stream)
    assert (cuda.machine.view(second, 256) == 7).all()


def test_pageable_memory_is_copied_at_once(cuda: Cuda) -> None:
    """As the real driver, which reads it before the call returns, and writes it before the call returns."""
    memory, stream = cuda.alloc(), cuda.stream()
    value = np.arange(256, dtype=np.uint8)
    cuda("cuMemcpyHtoDAsync", memory, value.ctypes.data, 256, stream)
    value[:] = 0
    cuda("cuMemcpyDtoHAsync", value.ctypes.data, memory, 256, stream)
    assert (value == np.arange(256)).all()


def test_peer_copies_that_lie(cuda: Cuda) -> None:
    cuda.machine.set("peer_zeros", 1)
    source = cuda.alloc()
    cuda.on(1)
    cuda("cuCtxEnablePeerAccess", cuda.contexts[0], 0)
    target, stream = cuda.alloc(), cuda.stream()
    cuda("cuMemcpyAsync", target, source, 256, stream)
    cuda("cuStreamSynchronize", stream)
    assert not cuda.machine.view(target, 256).any()
