"""Memory of another process: it is the same memory, and what the driver refuses."""

# covers: tests/libcuda/processes.cc

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.libcuda.conftest import Cuda, broken
from tests.libcuda.exporter import exported

pytestmark = pytest.mark.imaginary_gpus


def handle(cuda: Cuda, content: bytes) -> object:
    made = cuda.api.CUipcMemHandle()
    ctypes.memmove(made.getPtr(), content, 64)
    return made


def test_both_processes_see_what_either_writes(cuda: Cuda, rng: np.random.Generator) -> None:
    first, second = rng.bytes(5000), rng.bytes(700)
    with exported(5000, 0, first) as theirs:
        pointer = int(cuda("cuIpcOpenMemHandle", handle(cuda, theirs.handle), 1))
        assert int(cuda("cuIpcOpenMemHandle", handle(cuda, theirs.handle), 1)) == pointer
        assert tuple(map(int, cuda("cuMemGetAddressRange", pointer + 7))) == (pointer, 5000)
        host, stream = cuda.pinned(5000), cuda.stream()
        cuda("cuMemcpyDtoHAsync", host, pointer, 5000, stream)
        cuda("cuStreamSynchronize", stream)
        assert ctypes.string_at(host, 5000) == first
        ctypes.memmove(host, second, 700)
        cuda("cuMemcpyHtoDAsync", pointer + 11, host, 700, stream)
        cuda("cuStreamSynchronize", stream)
        assert theirs.content() == first[:11] + second + first[711:]
        cuda("cuIpcCloseMemHandle", pointer)
        assert cuda.machine.live()["memory of another process"] == 1, "it was opened twice"
        cuda("cuIpcCloseMemHandle", pointer)
        assert "memory of another process" not in cuda.machine.live()
        cuda.status("cuIpcCloseMemHandle", pointer)
        broken(cuda.machine, "closed twice, or never opened")


def test_what_is_refused(cuda: Cuda) -> None:
    own = cuda("cuIpcGetMemHandle", cuda.alloc())
    assert cuda.status("cuIpcOpenMemHandle", own, 1) == "CUDA_ERROR_INVALID_CONTEXT", "of this process"
    assert cuda.status("cuIpcOpenMemHandle", handle(cuda, bytes(64)), 1) == "CUDA_ERROR_INVALID_VALUE"
    assert cuda.status("cuIpcGetMemHandle", cuda.pinned()) == "CUDA_ERROR_INVALID_VALUE"
    assert cuda.status("cuMemGetAddressRange", 4096) == "CUDA_ERROR_NOT_FOUND"
    with exported(100) as theirs:
        gone = theirs.handle
    assert cuda.status("cuIpcOpenMemHandle", handle(cuda, gone), 1) == "CUDA_ERROR_MAP_FAILED"


def test_it_is_closed_not_freed_and_not_while_it_is_used(cuda: Cuda) -> None:
    with exported(100) as theirs:
        pointer, stream = int(cuda("cuIpcOpenMemHandle", handle(cuda, theirs.handle), 1)), cuda.stream()
        assert cuda.status("cuMemFree", pointer) == "CUDA_ERROR_INVALID_VALUE"
        broken(cuda.machine, "its handle is to be closed")
        cuda("cuMemsetD8Async", pointer, 1, 100, stream)
        cuda("cuIpcCloseMemHandle", pointer)
        broken(cuda.machine, "freed while work on them is queued")
