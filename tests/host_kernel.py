"""kernels/combine.cu compiled for this processor, and called like a launch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest

from engines.cuda.kernels import SOURCE, STORAGE, Combination, Product
from engines.store import BUILD

SHIM = Path(__file__).with_name("kernel_host.cc")
CACHE = BUILD / "libcuda" / "host-kernels"


@cache
def compiled(dtype: str) -> Path:
    """The shared library of one storage type, compiled once per source."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.fail("the kernel's tests need a C++20 compiler: install g++")
    key = hashlib.sha256(SOURCE.read_bytes() + SHIM.read_bytes()).hexdigest()[:16]
    path = CACHE / f"{dtype}-{key}.so"
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
        command += [
            "-Wno-unused-function",
            "-Wl,-Bsymbolic",
            f"-DSTORAGE={STORAGE[dtype]}",
            str(SHIM),
            "-o",
            str(partial),
        ]
        subprocess.run(command, check=True)
        os.replace(partial, path)
    return path


class HostKernel:
    """The kernels of one storage type."""

    sizes: ClassVar[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4}

    def __init__(self, dtype: str) -> None:
        self._library = ctypes.CDLL(str(compiled(dtype)))

    def combine(self, parameters: Combination, outputs: int, width: int, grid: int, block: int) -> None:
        assert self._library.run_combine(outputs, width, grid, block, ctypes.byref(parameters)) == 0

    def distance(self, a: int, b: int, elements: int, partial: int, grid: int, block: int) -> None:
        pointers = ctypes.c_void_p(a), ctypes.c_void_p(b)
        self._library.run_distance(grid, block, *pointers, ctypes.c_ulonglong(elements), ctypes.c_void_p(partial))

    def inner_product(self, parameters: Product, grid: int, block: int) -> None:
        self._library.run_inner_product(grid, block, ctypes.byref(parameters))

    def advance(self, state: int, blocks: int, seen: int) -> None:
        self._library.run_advance(ctypes.c_void_p(state), ctypes.c_uint(blocks), ctypes.c_void_p(seen))
