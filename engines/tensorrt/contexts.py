"""A TensorRT engine on one device, and its execution contexts: one per shape, in memory of the size that it needs."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.cuda.driver import SERIAL, Device, Driver
from engines.cuda.memory import Tensor
from engines.errors import DeviceError, DeviceMemoryError, EngineError
from engines.files import written_whole
from engines.tensorrt.build import make_logger

log = logging.getLogger(__name__)
CONTEXTS = 8  # shapes that a lane keeps ready; graphs keep what they were captured with beyond that
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Engine:
    """A plan on one device. Its weights are there once, however many lanes use it.

    TensorRT-RTX compiles kernels when a context is made; what it compiled is kept in `jit`, beside the plan.
    """

    def __init__(
        self, driver: Driver, device: Device, plan: bytes, name: str, trt: Any, jit: Path | None = None
    ) -> None:
        self.driver, self.device, self.name = driver, device, name
        self._trt, self._jit, self._kept = trt, jit, b""
        self._messages: list[str] = []
        self._cache: Any = None
        driver("cuCtxSetCurrent", device.context)
        self._runtime = self._trt.Runtime(make_logger(self._trt, self._messages))
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise DeviceError(
                f"TensorRT cannot load the plan of {name} on {device.name}: "
                f"{self.said() or 'it is for another GPU or version'}: "
                "free memory on the device, or build it again with `make engines`"
            )
        self._settings = self._runtime_settings()

    def said(self) -> str:
        """TensorRT's last errors."""
        return "; ".join(self._messages[-3:])

    def close(self) -> None:
        """Frees the weights, after all contexts, while whoever ran the engine may still know it."""
        with SERIAL:
            try:
                self.driver("cuCtxSetCurrent", self.device.context)
            finally:  # also of a device that was lost
                self.engine = self._settings = self._runtime = self._cache = None

    def _runtime_settings(self) -> Any:
        """How contexts are made: in memory of the caller's.

        TensorRT-RTX compiles kernels when a context is made: one cache for all contexts of the engine, and before the
        first run rather than behind it, or a captured graph would keep the provisional ones for ever.
        """
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._trt, "IRuntimeCache"):
            return strategy
        settings = self.engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        eager = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.dynamic_shapes_kernel_specialization_strategy = eager
        self._cache = settings.create_runtime_cache()
        self._kept = read_digested(self._jit)
        if self._kept and not self._cache.deserialize(self._kept):
            log.warning("%s is not used: it is of another version of TensorRT-RTX", self._jit)
        settings.set_runtime_cache(self._cache)
        return settings

    def context(self, shapes: Shapes) -> Context:
        """An execution context for inputs of these shapes, without memory yet."""
        with SERIAL:
            self.driver("cuCtxSetCurrent", self.device.context)
            context = self.engine.create_execution_context(self._settings)
            if context is None:
                raise DeviceMemoryError(f"{self.name}: TensorRT made no execution context: {self.said()}")
            for name, shape in shapes:
                if not context.set_input_shape(name, shape):
                    raise DeviceError(f"{self.name}: {name} cannot be of shape {shape} in this plan: build it again")
            size = max(int(context.update_device_memory_size_for_shapes()), 256)
        self._keep_compiled()
        return Context(self, context, size)

    def _keep_compiled(self) -> None:
        if self._cache is None or self._jit is None:
            return
        content = bytes(self._cache.serialize())
        if content != self._kept:
            self._kept = content
            write_digested(self._jit, content)


@dataclass(eq=False)
class Context:
    """An execution context for one shape; it works in `block`, and reads and writes `tensors`."""

    engine: Engine
    context: Any
    size: int
    block: Block | None = None
    tensors: object = None

    def work_in(self, block: Block | None) -> None:
        """Where intermediate results go; nowhere, until it is told again."""
        if self.block is not None:
            self.block.users.discard(self)
        self.block = block
        if block is not None:
            block.users.add(self)
            self.context.set_device_memory(block.pointer, block.size)

    def point(self, tensors: Mapping[str, Tensor]) -> None:
        """Sets the addresses of all inputs and outputs, unless they are these already."""
        if self.tensors is not tensors:
            for name, tensor in tensors.items():
                self.context.set_tensor_address(name, tensor.pointer)
            self.tensors = tensors

    def run(self, stream: int) -> None:
        """Enqueues one run."""
        if not self.context.execute_async_v3(stream):
            self.engine.driver("cuMemGetInfo")  # says it when the device was lost, which TensorRT does not
            raise DeviceError(f"{self.engine.name} failed in TensorRT: {self.engine.said()}")

    def capturable(self, stream: int) -> bool:
        """Whether a run on a stream can become part of a graph; where TensorRT does not say, it can."""
        asked = getattr(self.context, "is_stream_capturable", None)
        return asked is None or bool(asked(stream))


@dataclass(eq=False)
class Block:
    """Scratch memory, and who needs it: contexts, and what graphs hold. An outgrown one is freed after the last."""

    pointer: int
    size: int
    outgrown: bool = False
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)


class Held:
    """What a graph needs that captured runs of these contexts: them, and the memory that they worked in just then."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        self.contexts = list(contexts)
        self._blocks = [one.block for one in contexts if one.block is not None]
        for block in self._blocks:
            block.users.add(self)

    @property
    def outgrown(self) -> bool:
        """See rounds.Held."""
        return any(block.outgrown for block in self._blocks)


class Contexts:
    """The contexts of one stream, which run one after another, so that all of them work in the same memory.

    Threads may ask and trim at the same time: they take turns, as captures do.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: OrderedDict[Shapes, Context] = OrderedDict()
        self._evicted: list[Context] = []
        self._blocks: list[Block] = []
        self._alive: weakref.WeakSet[Context] = weakref.WeakSet()
        self.outgrown = 0  # how often memory became too small

    def __len__(self) -> int:
        return len(self._alive)

    def size(self, shapes: Shapes) -> int:
        """How much scratch memory the context of a shape needs; takes none."""
        return self._of(shapes).size

    def get(self, shapes: Shapes) -> Context:
        """The context of a shape, ready to run."""
        with SERIAL:
            found = self._of(shapes)
            if found.block is None:
                found.work_in(self.reserve(found.size))
            return found

    def _of(self, shapes: Shapes) -> Context:
        with SERIAL:
            found = self._kept.get(shapes)
            if found is None:
                found = self._kept[shapes] = self._engine.context(shapes)
                self._alive.add(found)
                if len(self._kept) > CONTEXTS:
                    self._evicted.append(self._kept.popitem(last=False)[1])
            self._kept.move_to_end(shapes)
            return found

    def reserve(self, size: int) -> Block:
        """Memory of at least that size; what works in a smaller block moves when nothing runs.

        When there is none, all blocks count as outgrown: without them there may be.
        """
        with SERIAL:
            last = self._blocks[-1] if self._blocks else None
            if last is not None and last.size >= size and not last.outgrown:
                return last
            for block in self._blocks:
                block.outgrown = True
            self.outgrown += last is not None
            driver = self._engine.driver
            driver("cuCtxSetCurrent", self._engine.device.context)
            self._blocks.append(Block(int(driver("cuMemAlloc", size)), size))
            return self._blocks[-1]

    @property
    def untidy(self) -> bool:
        """Whether something may be freed."""
        return bool(self._evicted) or any(block.outgrown for block in self._blocks)

    def trim(self, idle: Callable[[], bool]) -> None:
        """If nothing runs: frees evicted contexts, and memory that was outgrown and that no graph needs."""
        if not self.untidy:
            return
        with SERIAL:
            if not idle():
                return
            self._evicted.clear()
            roomy = None if not self._blocks or self._blocks[-1].outgrown else self._blocks[-1]
            for context in self._kept.values():
                if context.block is not None and context.block.outgrown:
                    context.work_in(roomy)
            for block in [one for one in self._blocks if one.outgrown and not one.users]:
                self._free(block)

    def close(self) -> None:
        """Frees everything."""
        with SERIAL:
            self._evicted.clear()
            self._kept.clear()
        for block in list(self._blocks):
            self._free(block)

    def _free(self, block: Block) -> None:
        self._blocks.remove(block)
        self._engine.driver("cuCtxSetCurrent", self._engine.device.context)
        self._engine.driver("cuMemFree", block.pointer)


def read_digested(path: Path | None) -> bytes:
    """A file that `write_digested` wrote; nothing where there is none, or where it is not what was written."""
    if path is None or not path.is_file():
        return b""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        log.warning("%s was altered or truncated and is not used", path)
        return b""
    return content[32:]


def write_digested(path: Path, content: bytes) -> None:
    """A file with its sha256 in front, under its name by one rename; only a log line where it cannot be written."""
    try:
        with written_whole(path) as partial:
            partial.write_bytes(hashlib.sha256(content).digest() + content)
    except EngineError as error:
        log.warning("compiled kernels are not kept: %s", error)
