"""Arrays on imaginary GPUs, as another library hands them over through DLPack."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from engines.cuda.arrays import _Deleter, _Tensor
from engines.errors import ParameterError
from runtime.call import Call
from tests.libcuda.conftest import Cuda
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus


class Theirs:
    """An array on the second GPU; its content is written by work that is still under way on its library's stream."""

    def __init__(self, cuda: Cuda, value: np.ndarray, code: int = 2, strides: tuple[int, ...] | None = None) -> None:
        cuda.on(1)
        self.cuda, size = cuda, value.nbytes
        self.stream, self.written, host = cuda.stream(), cuda.event(), cuda.pinned(size)
        pointer = cuda.alloc(size)
        ctypes.memmove(host, value.ctypes.data, size)
        cuda("cuMemcpyHtoDAsync", pointer, host, size, self.stream)
        cuda("cuEventRecord", self.written, self.stream)
        self.shape = (ctypes.c_int64 * value.ndim)(*value.shape)
        self.strides = (ctypes.c_int64 * value.ndim)(*strides) if strides else None
        self.tensor = _Tensor(
            pointer, 2, 1, value.ndim, code, 8 * value.itemsize, 1, self.shape, self.strides, 0, None, _Deleter(0)
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 1

    def __dlpack__(self, *, stream: int) -> Any:
        self.cuda("cuStreamWaitEvent", stream, self.written, 0)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.fixture
def cuda() -> Cuda:
    return Cuda(Machine(2, seed=1, eager=0))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_latents_on_a_gpu(cuda: Cuda, rng: np.random.Generator, dtype: str) -> None:
    """They arrive after what writes them; nothing of the copy stays behind."""
    value = rng.standard_normal((1, 3, 5, 7)).astype(dtype)
    theirs, before = Theirs(cuda, value), cuda.machine.live()
    call = Call("a star", latents=theirs)  # type: ignore[arg-type]
    assert call.latents is not None and np.array_equal(call.latents, value)
    assert cuda.machine.live() == before


def test_bfloat16(cuda: Cuda) -> None:
    call = Call("a star", latents=Theirs(cuda, np.array([[0x3F80, 0xC040]], np.uint16), code=4))  # type: ignore[arg-type]
    assert call.latents is not None and call.latents.tolist() == [[1.0, -3.0]]


def test_what_is_not_taken(cuda: Cuda) -> None:
    value = np.zeros((2, 3), np.float32)
    for theirs, message in (
        (Theirs(cuda, value, code=5), "type 5 of 32 bits"),
        (Theirs(cuda, value, strides=(1, 2)), "not contiguous"),
    ):
        with pytest.raises(ParameterError, match=message):
            Call("a star", latents=theirs)  # type: ignore[arg-type]
