"""Arrays of other libraries that lie on a GPU, through DLPack (https://dmlc.github.io/dlpack)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from engines.cuda.driver import Driver, release
from engines.cuda.memory import pinned, widen

CUDA = 2  # kDLCUDA, memory of one GPU
_TYPES = {(0, 32): "int32", (0, 64): "int64", (2, 16): "float16", (2, 32): "float32", (2, 64): "float64",
          (4, 16): "bfloat16"}  # fmt: skip


class _Tensor(ctypes.Structure):
    """DLManagedTensor."""


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Tensor))
_Tensor._fields_ = [
    ("data", ctypes.c_void_p), ("device_type", ctypes.c_int), ("device", ctypes.c_int), ("ndim", ctypes.c_int),
    ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
    ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
    ("offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", _Deleter),
]  # fmt: skip


def on_gpu(value: Any) -> bool:
    """Whether an array is in the memory of a GPU."""
    return hasattr(value, "__dlpack_device__") and int(value.__dlpack_device__()[0]) == CUDA


def to_host(value: Any) -> np.ndarray:
    """A copy in this computer's memory; bfloat16 becomes float32.

    Its library is told the stream that copies, so that the copy waits for work that is still under way on the caller's.
    BufferError for types and layouts that are not taken, DeviceError of the driver.
    """
    driver = Driver()
    device = driver.device(int(value.__dlpack_device__()[1]))
    freed = [driver.close]
    try:
        driver("cuCtxSetCurrent", device.context)
        stream, done = driver.stream(), driver.event()
        freed += [lambda: driver("cuStreamDestroy", stream), lambda: driver("cuEventDestroy", done)]
        capsule = value.__dlpack__(stream=int(stream))
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        tensor = _Tensor.from_address(get(capsule, b"dltensor"))  # the capsule frees it, unless it is renamed
        shape = tuple(tensor.shape[n] for n in range(tensor.ndim))
        dtype = _TYPES.get((tensor.code, tensor.bits)) if tensor.lanes == 1 else None
        if dtype is None:
            raise BufferError(f"type {tensor.code} of {tensor.bits} bits × {tensor.lanes} is not taken")
        steps = [int(np.prod(shape[n + 1 :], dtype=np.int64)) for n in range(tensor.ndim)]
        strides = [tensor.strides[n] for n in range(tensor.ndim)] if tensor.strides else steps
        if any(a != b for a, b, side in zip(strides, steps, shape, strict=True) if side > 1):
            raise BufferError("it is not contiguous")
        plain = "uint16" if dtype == "bfloat16" else dtype
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(plain).itemsize
        memory, free = pinned(driver, max(size, 1))
        freed.append(free)
        if size:
            driver("cuMemcpyDtoHAsync", memory.ctypes.data, tensor.data + tensor.offset, size, stream)
        driver("cuEventRecord", done, stream)
        driver.wait(done, f"the copy of an array from {device.name}")
        raw = memory[:size].copy()
        return (widen(raw, dtype) if dtype == "bfloat16" else raw.view(dtype)).reshape(shape)
    finally:
        release(freed)
