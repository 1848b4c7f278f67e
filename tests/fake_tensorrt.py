"""TensorRT's runtime on the imaginary machine: what it runs is the ONNX file itself, by ONNX Runtime."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from cuda.bindings import driver

from tests.libcuda.machine import Machine

SCRATCH = 4096
LARGEST = 16
_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


class FakeTensorRT:
    """The parts of the module that running needs; plans are paths of ONNX files."""

    __name__ = "tensorrt"
    __version__ = "11.0"

    class ILogger:
        pass

    class ExecutionContextAllocationStrategy(Enum):
        USER_MANAGED = 0

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()  # that are alive
        self.loaded: list[str] = []
        self.scratch: Callable[[str, dict[str, tuple[int, ...]]], int] = lambda network, shapes: SCRATCH
        self.weights: Callable[[str], int] = lambda network: 256

    def Runtime(self, logger: Any) -> Any:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        path = plan.decode()
        self.loaded.append(Path(path).stem)
        status, weights = driver.cuMemAlloc(self.weights(Path(path).stem))
        return FakeEngine(self, path, int(weights)) if not status and Path(path).is_file() else None


class FakeEngine:
    def __init__(self, module: FakeTensorRT, path: str, weights: int) -> None:
        self.module, self.name, self.weights = module, Path(path).stem, weights
        self.context = driver.cuCtxGetCurrent()[1]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.device = current_device()
        self._output_bytes: dict[tuple[tuple[str, tuple[int, ...]], ...], dict[str, int]] = {}

    def __del__(self) -> None:
        before = driver.cuCtxGetCurrent()[1]
        driver.cuCtxSetCurrent(self.context)
        driver.cuMemFree(self.weights)
        driver.cuCtxSetCurrent(before)

    def output_bytes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """How big outputs are for inputs of these shapes, which only a run tells: the file does not name every axis."""
        key = tuple(shapes.items())
        if key not in self._output_bytes:
            inputs = {one.name: np.zeros(shapes[one.name], _TYPES[one.type]) for one in self.session.get_inputs()}
            names = [one.name for one in self.session.get_outputs()]
            results = self.session.run(None, inputs)
            self._output_bytes[key] = {name: result.nbytes for name, result in zip(names, results, strict=True)}
        return self._output_bytes[key]

    def create_execution_context(self, strategy: Any) -> Any:
        """As the real one, it must not meet a capture, not even one of another thread."""
        assert strategy is FakeTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        assert current_device() == self.device, "a context is made on another device"
        if self.module.machine.library_call("create_execution_context"):
            return None
        context = FakeContext(self)
        self.module.contexts.add(context)
        return context


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0
        self.prepared: dict[tuple[int, ...], Callable[[], int]] = {}

    def update_device_memory_size_for_shapes(self) -> int:
        return self.engine.module.scratch(self.engine.name, dict(self.shapes))

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes() and pointer % 256 == 0
        self.engine.module.machine.view(pointer, size)
        self.scratch = pointer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = next(one for one in self.engine.session.get_inputs() if one.name == name)
        self.shapes[name] = shape
        fits = (axis == size or isinstance(axis, str) for axis, size in zip(wanted.shape[1:], shape[1:], strict=True))
        return all(fits) and shape[0] <= LARGEST

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def execute_async_v3(self, handle: int) -> bool:
        assert self.scratch and current_device() == self.engine.device
        key = (handle, self.scratch, *self.addresses.values())  # a run keeps those that it was enqueued with
        if key not in self.prepared:
            self.prepared[key] = self._prepare(handle)
        return self.prepared[key]() == 0

    def _prepare(self, handle: int) -> Callable[[], int]:
        machine, session = self.engine.module.machine, self.engine.session
        dtypes = {one.name: np.dtype(_TYPES[one.type]) for one in (*session.get_inputs(), *session.get_outputs())}
        sizes = {name: int(np.prod(shape)) * dtypes[name].itemsize for name, shape in self.shapes.items()}
        inputs = {name: (self.addresses[name], size) for name, size in sizes.items()}
        outputs = {name: (self.addresses[name], size) for name, size in self.engine.output_bytes(self.shapes).items()}
        myself = weakref.ref(self)

        def work() -> None:
            context = myself()
            assert context is not None, "an execution context is gone before its work has run"
            views = {name: machine.view(*where).view(dtypes[name]) for name, where in inputs.items()}
            feeds = {name: view.reshape(context.shapes[name]).copy() for name, view in views.items()}
            for (name, where), result in zip(outputs.items(), session.run(None, feeds), strict=True):
                machine.view(*where).view(dtypes[name])[:] = result.reshape(-1)

        writes = [*outputs.values(), (self.scratch, SCRATCH)]
        return machine.work(handle, work, list(inputs.values()), writes)


def current_device() -> int:
    """The number of the device that is current in this thread."""
    status, device = driver.cuCtxGetDevice()
    assert not status, status
    return int(device)
