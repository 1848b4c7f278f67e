"""TensorRT's runtime on the imaginary machine: what it runs is the ONNX file itself, by ONNX Runtime."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from tests.fake_cuda import FakeCuda, Stream

SCRATCH = 4096
_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}


class FakeTensorRT:
    """The parts of the module that running needs; plans are paths of ONNX files."""

    __name__ = "tensorrt"
    __version__ = "11.0"

    class ILogger:
        pass

    class ExecutionContextAllocationStrategy(Enum):
        USER_MANAGED = 0

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.contexts = 0
        self.alive: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.scratch: Callable[[str, dict[str, tuple[int, ...]]], int] = lambda network, shapes: SCRATCH
        self.loaded: list[str] = []

    def Runtime(self, logger: Any) -> Any:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        path = plan.decode()
        self.loaded.append(Path(path).stem)
        return FakeEngine(self, path) if Path(path).is_file() else None


class FakeEngine:
    def __init__(self, module: FakeTensorRT, path: str) -> None:
        self.module, self.name = module, Path(path).stem
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.device = module.cuda.current

    def create_execution_context(self, strategy: Any) -> Any:
        assert strategy is FakeTensorRT.ExecutionContextAllocationStrategy.USER_MANAGED
        assert self.module.cuda.current == self.device, "a context is made on another device"
        self.module.contexts += 1
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        engine.module.alive.add(self)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = 0

    def update_device_memory_size_for_shapes(self) -> int:
        return self.engine.module.scratch(self.engine.name, dict(self.shapes))

    def set_device_memory(self, pointer: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes() and pointer % 256 == 0
        self.engine.module.cuda.view(pointer, size, self.engine.device)
        self.scratch = pointer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        wanted = next(one for one in self.engine.session.get_inputs() if one.name == name)
        self.shapes[name] = shape
        fits = (axis == size or isinstance(axis, str) for axis, size in zip(wanted.shape[1:], shape[1:], strict=True))
        return all(fits) and shape[0] <= 16

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def execute_async_v3(self, handle: int) -> bool:
        cuda, session = self.engine.module.cuda, self.engine.session
        stream: Stream = next(one for one in cuda.streams if int(one) == handle)
        assert stream.device == self.engine.device and self.scratch
        views = {}
        for one in session.get_inputs():
            dtype = np.dtype(_TYPES[one.type])
            size = int(np.prod(self.shapes[one.name])) * dtype.itemsize
            raw = cuda.view(self.addresses[one.name], size, self.engine.device)
            views[one.name] = raw.view(dtype).reshape(self.shapes[one.name])
        names = [one.name for one in session.get_outputs()]
        goals = {name: self.addresses[name] for name in names}  # as they are when the run is enqueued
        for pointer in goals.values():
            cuda.view(pointer, 1, self.engine.device)

        def work() -> None:
            results = session.run(None, {name: view.copy() for name, view in views.items()})
            for pointer, result in zip(goals.values(), results, strict=True):
                into = cuda.view(pointer, result.nbytes, self.engine.device)
                into[:] = np.ascontiguousarray(result).view(np.uint8).reshape(-1)

        cuda.submit(stream, work)
        return True
