"""A machine with two GPUs, and the driver as cuda-python gives it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from tests.libcuda.machine import KERNELS, Machine

OK = "CUDA_SUCCESS"


class Cuda:
    """`cuda("cuMemAlloc", 8)` returns what the call returns after its status, which must be good."""

    def __init__(self, machine: Machine, *, init: bool = True) -> None:
        from cuda.bindings import driver

        self.machine, self.api = machine, driver
        if init:
            self("cuInit", 0)
            self.contexts = [self("cuDevicePrimaryCtxRetain", n) for n in range(machine.devices)]
            self("cuCtxSetCurrent", self.contexts[0])

    def status(self, name: str, *arguments: Any) -> str:
        """The name of the status that a call ends with."""
        return str(getattr(self.api, name)(*arguments)[0].name)

    def __call__(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.api, name)(*arguments)
        assert not status, f"{name} failed with {status.name}: {self.machine.violations()}"
        return values[0] if len(values) == 1 else values

    def on(self, device: int) -> None:
        self("cuCtxSetCurrent", self.contexts[device])

    def stream(self) -> Any:
        return self("cuStreamCreate", 1)

    def event(self) -> Any:
        return self("cuEventCreate", 2)

    def alloc(self, size: int = 256) -> int:
        return int(self("cuMemAlloc", size))

    def pinned(self, size: int = 256) -> int:
        return int(self("cuMemHostAlloc", size, 1))

    def capture(self, stream: Any, mode: int = 1) -> None:
        self("cuStreamBeginCapture", stream, self.api.CUstreamCaptureMode(mode))

    def graph(self, stream: Any) -> Any:
        """Ends a capture and makes it ready to launch."""
        made = self("cuStreamEndCapture", stream)
        executable = self("cuGraphInstantiate", made, 0)
        self("cuGraphDestroy", made)
        return executable

    def kernel(self, name: str = "advance", dtype: str = "float32", outputs: int = 0, width: int = 0) -> Any:
        from engines.cuda import kernels

        code = kernels.machine_code(kernels.Variant(dtype, outputs, width), "90", KERNELS)
        return self("cuModuleGetFunction", self("cuModuleLoadData", code), name.encode())

    def launch_status(self, function: Any, stream: Any, parameters: list[Any], grid: int = 1, block: int = 1) -> str:
        pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(one) for one in parameters))
        shape = grid, 1, 1, block, 1, 1
        return self.status("cuLaunchKernel", function, *shape, 0, stream, ctypes.addressof(pointers), 0)


@pytest.fixture
def machine() -> Machine:
    """Two GPUs. Nothing runs before the host asks for it."""
    return Machine(2, seed=1, eager=0)


@pytest.fixture
def cuda(machine: Machine) -> Iterator[Cuda]:
    """The driver, with the first GPU current."""
    yield Cuda(machine)


def broken(machine: Machine, part: str) -> None:
    """A rule of which this is a part of the words was broken, and no other."""
    found = machine.forgive()
    assert len(found) == 1, found
    assert part in found[0], found
