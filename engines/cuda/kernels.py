"""kernels/combine.cu on the host's side: compiled once per architecture and variant, its structs, its launches."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from engines.base import Rows
from engines.cuda.driver import Device, Driver, release
from engines.errors import DeviceError
from engines.files import written_whole

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "driffusion-engine"
SOURCE = Path(__file__).resolve().parent.parent.parent / "kernels" / "combine.cu"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
STORAGE = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float"}
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


MAX_INPUTS, MAX_TARGETS, MAX_OUTPUTS, MAX_LANES = 256, 128, 34, 64
BLOCK, MAX_GRID = 128, 8192
DISTANCE_GRID, DISTANCE_BLOCK = 8, 256
PARTIALS = 2 * DISTANCE_GRID * DISTANCE_BLOCK
MAX_PRODUCT_INPUTS, PRODUCT_PARTIALS = 32, 3 * DISTANCE_GRID * DISTANCE_BLOCK


class Combination(ctypes.Structure):
    """The struct of the same name in combine.cu."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("round", ctypes.c_void_p),
        ("not_finite", ctypes.c_void_p),
        ("elements", ctypes.c_ulonglong),
        ("stride", ctypes.c_uint),
        ("rows", ctypes.c_uint),
        ("inputs", ctypes.c_uint),
        ("timesteps", ctypes.c_uint),
        ("lanes", ctypes.c_uint),
        ("batch", ctypes.c_uint * MAX_LANES),
        ("timestep", ctypes.c_void_p * MAX_LANES),
        ("input", ctypes.c_void_p * MAX_INPUTS),
        ("target", ctypes.c_void_p * MAX_TARGETS),
        ("first", ctypes.c_ubyte * (MAX_OUTPUTS + 1)),
    )


class Product(ctypes.Structure):
    """The struct of the same name in combine.cu."""

    _fields_ = (
        ("elements", ctypes.c_ulonglong),
        ("partial", ctypes.c_void_p),
        ("inputs", ctypes.c_uint),
        ("a", ctypes.c_float * MAX_PRODUCT_INPUTS),
        ("b", ctypes.c_float * MAX_PRODUCT_INPUTS),
        ("input", ctypes.c_void_p * MAX_PRODUCT_INPUTS),
    )


@dataclass(frozen=True)
class Variant:
    """One compilation of the source; without outputs the small kernels beside `combine_latents`."""

    dtype: str
    outputs: int = 0
    width: int = 0

    def options(self, arch: str) -> list[str]:
        """What the compiler is told."""
        defines = [f"-DSTORAGE={STORAGE[self.dtype]}"]
        if self.outputs:
            defines += [f"-DOUTPUTS={self.outputs}", f"-DWIDTH={self.width}"]
        return [f"--gpu-architecture=sm_{arch}", "--std=c++17", "--ptxas-options=-v", *defines]


def width(dtype: str, outputs: int, elements: int, pointers: Sequence[int]) -> int:
    """How many elements are read at once: 16 bytes, less if accumulators, alignment or the count forbid it."""
    largest = 16 // BYTES[dtype]
    while largest > 1 and (
        largest * outputs > 68 or elements % largest or any(p % (largest * BYTES[dtype]) for p in pointers)
    ):
        largest //= 2
    return largest


def compile_variant(variant: Variant, arch: str) -> tuple[bytes, str]:
    """Machine code for one architecture and the compiler's resource report; needs NVRTC and no driver."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise DeviceError(f"cuda-python is missing ({error}): pip install --editable '.[cuda]'") from error

    def checked(result: tuple[Any, ...]) -> Any:
        if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise DeviceError(f"{SOURCE.name} cannot be compiled for sm_{arch}: {result[0].name}")
        return result[1] if len(result) > 1 else None

    try:
        program = checked(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None))
    except RuntimeError as error:  # what the bindings raise when they find no library
        raise DeviceError(f"NVRTC is missing ({error}): pip install nvidia-cuda-nvrtc") from error
    options = [option.encode() for option in variant.options(arch)]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = bytes(bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)) + 1))  # of its own: it is written into
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    report = log.rstrip(b" \0").decode()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise DeviceError(f"{SOURCE.name} cannot be compiled for sm_{arch}: {status.name}\n{report}")
    code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, code))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return code, report


def machine_code(variant: Variant, arch: str, cache: Path) -> bytes:
    """Machine code from the cache, which is keyed by the source, or compiled into it."""
    wanted = " ".join(variant.options(arch)).encode() + SOURCE.read_bytes()
    path = cache / f"{hashlib.sha256(wanted).hexdigest()[:32]}.cubin"
    if not path.is_file():
        code, _ = compile_variant(variant, arch)
        cache.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as partial:
            partial.write_bytes(code)
    return path.read_bytes()


class Kernels:
    """The kernels of one storage type, loaded on one device when they are first asked for."""

    def __init__(self, driver: Driver, device: Device, dtype: str, cache: Path) -> None:
        self._driver, self._device, self._dtype, self._cache = driver, device, dtype, cache
        self._modules: dict[Variant, Any] = {}
        self.function = lru_cache(maxsize=None)(self._load)

    def _load(self, name: str, outputs: int = 0, elements_at_once: int = 0) -> Any:
        variant = Variant(self._dtype, outputs, elements_at_once)
        self._driver("cuCtxSetCurrent", self._device.context)
        if variant not in self._modules:
            code = machine_code(variant, self._device.arch, self._cache)
            self._modules[variant] = self._driver("cuModuleLoadData", code)
        return self._driver("cuModuleGetFunction", self._modules[variant], name.encode())

    def combination(self, parameters: Combination, outputs: int) -> tuple[Any, int]:
        """The function for a combination and its grid."""
        pointers = [*parameters.input[: parameters.inputs], *parameters.target[: parameters.first[outputs]]]
        at_once = width(self._dtype, outputs, parameters.elements, pointers)
        grid = min(-(-parameters.elements // (at_once * BLOCK)), MAX_GRID)
        return self.function("combine_latents", outputs, at_once), max(grid, 1)

    def advance(self, stream: Any, state: int, blocks: int, seen: int) -> None:
        """Goes on to the next of so many blocks, and counts: two words of the device, and one of the host."""
        parameters = [ctypes.c_void_p(state), ctypes.c_uint(blocks), ctypes.c_void_p(seen)]
        self._driver.launch(self.function("advance"), 1, 1, stream, parameters)

    def close(self) -> None:
        """Unloads everything; no kernel may be queued any more."""
        modules, self._modules = list(self._modules.values()), {}
        self.function.cache_clear()

        def unload(module: Any) -> None:
            self._driver("cuCtxSetCurrent", self._device.context)
            self._driver("cuModuleUnload", module)

        release([partial(unload, module) for module in modules])


def product(inputs: Sequence[int], rows: Rows, elements: int, partial: int) -> Product:
    """Two combinations of latents, given as device pointers, and where the partial sums go."""
    if len(inputs) > MAX_PRODUCT_INPUTS:
        raise DeviceError(f"an inner product over {len(inputs)} latents does not fit one launch ({MAX_PRODUCT_INPUTS})")
    parameters = Product(elements=elements, partial=partial, inputs=len(inputs))
    parameters.input[: len(inputs)] = list(inputs)
    parameters.a[: len(inputs)], parameters.b[: len(inputs)] = ([float(value) for value in row] for row in rows)
    return parameters


def combination(
    inputs: Sequence[int], targets: Sequence[Sequence[int]], elements: int, timesteps: Sequence[tuple[int, int]] = ()
) -> Combination:
    """`inputs` and, for every output, where it goes, as device pointers; (pointer, batch) of lanes' timesteps."""
    count = sum(map(len, targets))
    if len(inputs) > MAX_INPUTS or count > MAX_TARGETS or len(targets) > MAX_OUTPUTS or len(timesteps) > MAX_LANES:
        raise DeviceError(
            f"a combination of {len(inputs)} latents into {count} does not fit one launch "
            f"({MAX_INPUTS} into {MAX_TARGETS}): use a smaller k"
        )
    parameters = Combination(elements=elements, inputs=len(inputs), lanes=len(timesteps))
    parameters.input[: len(inputs)] = list(inputs)
    parameters.target[:count] = [pointer for one in targets for pointer in one]
    parameters.first[: len(targets) + 1] = np.cumsum([0, *map(len, targets)]).tolist()
    for lane, (pointer, batch) in enumerate(timesteps):
        parameters.timestep[lane], parameters.batch[lane] = pointer, batch
    return parameters
