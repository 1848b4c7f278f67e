"""A machine with NVIDIA GPUs that exists in this process, and behaves as badly as the CUDA driver is allowed to.

It stands in for `cuda.bindings.driver`. Streams are queues that advance in a random order within what events allow,
copies read and write when they run and not when they are asked for, fresh memory is poisoned, every access must lie in
an allocation of a device that may see it, and captured graphs run their nodes in any order that their edges allow.
Kernels are kernels/combine.cu, compiled for the host.
"""

from __future__ import annotations

import ctypes
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda.bindings import driver as real
from numpy.typing import NDArray

from engines.cuda.kernels import Combination
from tests.host_kernel import HostKernel

OK = real.CUresult.CUDA_SUCCESS
FREE_OF_CONTEXT = ("cuInit", "cuDriver", "cuDevice", "cuGetError", "cuCtxSetCurrent")
Work = Callable[[], None]


@dataclass(eq=False)
class Stream:
    device: int
    speed: int  # how often it is chosen
    queue: deque[tuple[str, Any]] = field(default_factory=deque)
    graph: Graph | None = None  # while it is captured
    last: set[int] = field(default_factory=set)  # nodes that its next one depends on

    def __int__(self) -> int:
        return id(self)


@dataclass(eq=False)
class Event:
    device: int
    asked: int = 0
    done: int = 0
    captured: tuple[Graph, set[int]] | None = None


@dataclass(eq=False)
class Graph:
    origin: Stream
    nodes: list[tuple[int, Work, set[int]]] = field(default_factory=list)  # device, what it does, what it waits for
    streams: list[Stream] = field(default_factory=list)


@dataclass(eq=False)
class Replay:
    """One launch of a graph under way."""

    graph: Graph
    done: set[int] = field(default_factory=set)

    def ready(self) -> list[int]:
        nodes = enumerate(self.graph.nodes)
        return [n for n, (_, _, needs) in nodes if n not in self.done and needs <= self.done]


class FakeCuda:
    """`devices` GPUs; `eager` is how many queued operations may run at each call; faults are armed by name.

    Faults: "peer zeros" (peer copies write zeros and succeed), "peer refused" (no peer access), "out of memory" (the
    n-th allocation fails), "launch" (the n-th launch fails), "lost" (a device is gone after n of its operations),
    "hang" (nothing ever runs again), "no wait" (waits that `ignored(stream, event)` picks are forgotten).
    """

    def __init__(self, devices: int, seed: int = 0, eager: int = 2) -> None:
        self.random = random.Random(seed)
        self.eager = eager
        self.devices = devices
        self.version = 13000
        self.fault: dict[str, int] = {}
        self.ignored: Callable[[Stream, Event], bool] = lambda stream, event: False
        self.calls: Counter[str] = Counter()
        self.streams: list[Stream] = []
        self.memory: dict[int, tuple[int, NDArray[np.uint8]]] = {}  # by address: device (−1: pinned), bytes
        self.peers: set[tuple[int, int]] = set()
        self.current = -1
        self.free = 8 << 30  # bytes of every device
        self.lost: set[int] = set()
        self.breaking = devices - 1  # the one that "lost" is about
        self.kernels: dict[str, HostKernel] = {}
        self.work_done: Counter[int] = Counter()
        for name in (
            "CUresult", "CUdevice_attribute", "CUstream_flags", "CUevent_flags", "CUstreamCaptureMode",
            "CU_MEMHOSTALLOC_PORTABLE",
        ):  # fmt: skip
            setattr(self, name, getattr(real, name))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("cu"):
            raise AttributeError(name)
        assert hasattr(real, name), f"cuda.bindings.driver has no {name}"
        method = getattr(self, f"_{name.replace('CtxReset', 'CtxRelease')}")

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            for _ in range(self.random.randint(0, self.eager)):
                self.advance()
            if self.current in self.lost and not name.startswith(FREE_OF_CONTEXT):
                return (real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, None)
            return method(*arguments)

        self.__dict__[name] = call
        return call

    # --- time ----------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Runs one operation that may run now; False when there is none."""
        if "hang" in self.fault:
            return False
        choices = [(one, stream.speed) for stream in self.streams for one in self._runnable(stream)]
        if not choices:
            return False
        works, speeds = zip(*choices, strict=True)
        self.random.choices(works, speeds)[0]()
        return True

    def _runnable(self, stream: Stream) -> Iterator[Work]:
        if not stream.queue:
            return
        kind, what = stream.queue[0]
        if kind == "wait":
            event, number = what
            if event.done >= number:
                yield lambda: self._next(stream)
        elif kind == "record":
            event, number = what

            def record() -> None:
                event.done = max(event.done, number)
                self._next(stream)

            yield record
        elif kind == "graph":
            for node in what.ready():
                yield lambda node=node: self._node(what, node)  # type: ignore[misc]
            if len(what.done) == len(what.graph.nodes):
                yield lambda: self._next(stream)
        else:

            def work() -> None:
                self._work(stream.device, what)
                self._next(stream)

            yield work

    def _node(self, replay: Replay, node: int) -> None:
        device, work, _ = replay.graph.nodes[node]
        self._work(device, work)
        replay.done.add(node)

    def _work(self, device: int, work: Work) -> None:
        self.work_done[device] += 1
        if "lost" in self.fault and device == self.breaking and self.work_done[device] > self.fault["lost"]:
            self.lost.add(device)
        if device not in self.lost:
            work()

    @staticmethod
    def _next(stream: Stream) -> None:
        stream.queue.popleft()

    def submit(self, stream: Stream, work: Work) -> None:
        """Puts work on a stream, or into the graph that captures it."""
        if stream.graph is None:
            stream.queue.append(("work", work))
        else:
            stream.graph.nodes.append((stream.device, work, set(stream.last)))
            stream.last = {len(stream.graph.nodes) - 1}

    # --- memory --------------------------------------------------------------------------------------------------

    def view(self, pointer: int, size: int, device: int | None = None) -> NDArray[np.uint8]:
        """Memory by address; it must be allocated, and where a device is named, be its own or pinned."""
        for start, (owner, array) in self.memory.items():
            if start <= pointer and pointer + size <= start + array.size:
                assert device is None or owner in (device, -1), f"device {device} touches memory of device {owner}"
                return array[pointer - start : pointer - start + size]
        raise AssertionError(f"access to {size} bytes at {pointer:#x}, which no allocation holds")

    def _allocate(self, device: int, size: int) -> int:
        array = np.full(size + 256, 0xFF, np.uint8)  # NaN in every storage type
        offset = -array.ctypes.data % 256
        memory = array[offset : offset + size]
        self.memory[memory.ctypes.data] = (device, memory)
        return int(memory.ctypes.data)

    def _cuMemAlloc(self, size: int) -> Any:
        if self.fault.get("out of memory", -1) == self.calls["cuMemAlloc"]:
            return (real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
        return OK, self._allocate(self.current, size)

    def _cuMemHostAlloc(self, size: int, flags: int) -> Any:
        return OK, self._allocate(-1, size)

    def _cuMemFree(self, pointer: int) -> Any:
        assert self.lost or not any(stream.queue for stream in self.streams), "memory is freed while work is queued"
        assert self.memory.pop(pointer)[0] >= 0
        return (OK,)

    def _cuMemFreeHost(self, pointer: int) -> Any:
        assert self.memory.pop(pointer)[0] == -1
        return (OK,)

    def _copy(self, target: int, source: int, size: int, stream: Stream, devices: tuple[int | None, int | None]) -> Any:
        into, of = self.view(target, size, devices[0]), self.view(source, size, devices[1])

        def copy() -> None:
            into[:] = of

        self.submit(stream, copy)
        return (OK,)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: Stream) -> Any:
        return self._copy(target, source, size, stream, (stream.device, -1))

    def _cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: Stream) -> Any:
        return self._copy(target, source, size, stream, (-1, stream.device))

    def _cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: Stream) -> Any:
        return self._copy(target, source, size, stream, (stream.device, stream.device))

    def _owner(self, pointer: int) -> int:
        return next(d for start, (d, array) in self.memory.items() if start <= pointer < start + array.size)

    def _cuMemcpyAsync(self, target: int, source: int, size: int, stream: Stream) -> Any:
        into, out_of = self.view(target, size), self.view(source, size)
        between = {self._owner(target), self._owner(source)}
        if "peer refused" in self.fault and len(between) > 1:
            return (real.CUresult.CUDA_ERROR_INVALID_VALUE,)
        zeros = "peer zeros" in self.fault and len(between) > 1

        def copy() -> None:
            into[:] = 0 if zeros else out_of

        self.submit(stream, copy)
        return (OK,)

    def _cuMemsetD32Async(self, target: int, value: int, count: int, stream: Stream) -> Any:
        into = self.view(target, 4 * count, stream.device).view(np.uint32)
        self.submit(stream, lambda: into.fill(value))
        return (OK,)

    def _cuMemsetD8Async(self, target: int, value: int, count: int, stream: Stream) -> Any:
        into = self.view(target, count, stream.device)
        self.submit(stream, lambda: into.fill(value))
        return (OK,)

    def _cuMemGetInfo(self) -> Any:
        return OK, self.free, 16 << 30

    # --- streams, events, graphs ---------------------------------------------------------------------------------

    def _cuStreamCreate(self, flags: int) -> Any:
        stream = Stream(self.current, self.random.choice([1, 20, 400]))
        self.streams.append(stream)
        return OK, stream

    def _cuStreamQuery(self, stream: Stream) -> Any:
        if stream.device in self.lost:
            return (real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        if stream.queue:
            self.advance()
        return (real.CUresult.CUDA_ERROR_NOT_READY if stream.queue else OK,)

    def _cuStreamDestroy(self, stream: Stream) -> Any:
        self.streams.remove(stream)
        return (OK,)

    def _cuEventCreate(self, flags: int) -> Any:
        return OK, Event(self.current)

    def _cuEventDestroy(self, event: Event) -> Any:
        return (OK,)

    def _cuEventRecord(self, event: Event, stream: Stream) -> Any:
        assert event.device == stream.device, "an event is recorded on a stream of another device"
        if stream.graph is not None:
            event.captured = (stream.graph, set(stream.last))
            return (OK,)
        event.captured = None
        event.asked += 1
        stream.queue.append(("record", (event, event.asked)))
        return (OK,)

    def _cuStreamWaitEvent(self, stream: Stream, event: Event, flags: int) -> Any:
        if self.ignored(stream, event):
            return (OK,)
        if event.captured is not None:
            graph, nodes = event.captured
            if stream.graph is None:
                assert not stream.queue or graph.origin is not stream
                stream.graph, stream.last = graph, set()
                graph.streams.append(stream)
            assert stream.graph is graph
            stream.last |= nodes
        elif stream.graph is not None:
            return (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_ISOLATION,)
        else:
            stream.queue.append(("wait", (event, event.asked)))
        return (OK,)

    def _cuEventQuery(self, event: Event) -> Any:
        if event.captured is not None:
            return (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        if event.device in self.lost:
            return (real.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,)
        if event.done >= event.asked:
            return (OK,)
        if not self.advance() and "hang" not in self.fault:
            raise AssertionError("deadlock: the host waits for an event and no stream can go on")
        return (real.CUresult.CUDA_ERROR_NOT_READY,)

    def _cuStreamBeginCapture(self, stream: Stream, mode: Any) -> Any:
        stream.graph, stream.last = Graph(stream), set()
        stream.graph.streams.append(stream)
        return (OK,)

    def _cuStreamEndCapture(self, stream: Stream) -> Any:
        graph = stream.graph
        assert graph is not None and graph.origin is stream
        joined: set[int] = set()
        todo = list(stream.last)
        while todo:
            node = todo.pop()
            if node not in joined:
                joined.add(node)
                todo += graph.nodes[node][2]
        for one in graph.streams:
            one.graph, one.last = None, set()
        if len(joined) != len(graph.nodes):
            return (real.CUresult.CUDA_ERROR_STREAM_CAPTURE_UNJOINED, None)
        return OK, graph

    def _cuGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        return OK, graph

    def _cuGraphDestroy(self, graph: Graph) -> Any:
        return (OK,)

    def _cuGraphExecDestroy(self, graph: Graph) -> Any:
        return (OK,)

    def _cuGraphLaunch(self, graph: Graph, stream: Stream) -> Any:
        stream.queue.append(("graph", Replay(graph)))
        return (OK,)

    # --- kernels -------------------------------------------------------------------------------------------------

    def _cuModuleLoadData(self, code: bytes) -> Any:
        return OK, json.loads(code)

    def _cuModuleUnload(self, module: dict[str, Any]) -> Any:
        return (OK,)

    def _cuModuleGetFunction(self, module: dict[str, Any], name: bytes) -> Any:
        return OK, (module, name.decode())

    def _cuLaunchKernel(
        self, function: Any, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: Stream,
        parameters: int, extra: int,
    ) -> Any:  # fmt: skip
        if self.fault.get("launch", -1) == self.calls["cuLaunchKernel"]:
            return (real.CUresult.CUDA_ERROR_LAUNCH_FAILED,)
        module, name = function
        kernel = self.kernels.setdefault(module["dtype"], HostKernel(module["dtype"]))
        pointers = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))

        def argument(n: int, kind: Any) -> Any:
            return kind.from_buffer_copy(ctypes.string_at(pointers[n], ctypes.sizeof(kind)))

        if name == "combine_latents":
            combined = argument(0, Combination)
            self._check(combined, module, stream.device)
            self.submit(stream, lambda: kernel.combine(combined, module["outputs"], module["width"], gx, bx))
        elif name == "advance":
            pointer, blocks = argument(0, ctypes.c_void_p).value, argument(1, ctypes.c_uint).value
            seen, _ = argument(2, ctypes.c_void_p).value, self.view(pointer, 8, stream.device)
            self.submit(stream, lambda: kernel.advance(pointer, blocks, seen))
        else:
            a, b = (argument(n, ctypes.c_void_p).value for n in (0, 1))
            elements, partial = argument(2, ctypes.c_ulonglong).value, argument(3, ctypes.c_void_p).value
            self.view(partial, 8 * gx * bx, stream.device)
            self.submit(stream, lambda: kernel.distance(a, b, elements, partial, gx, bx))
        return (OK,)

    def _check(self, combined: Combination, module: dict[str, Any], device: int) -> None:
        """Every address of a combination is memory of the device that runs it."""
        size = combined.elements * HostKernel.sizes[module["dtype"]]
        for pointer in combined.input[: combined.inputs]:
            self.view(pointer, size, device)
        for pointer in combined.target[: combined.first[module["outputs"]]]:
            self.view(pointer, size, device)
        for lane in range(combined.lanes):
            self.view(combined.timestep[lane], 4 * combined.batch[lane], device)

    # --- devices -------------------------------------------------------------------------------------------------

    def _cuInit(self, flags: int) -> Any:
        return (OK,)

    def _cuDriverGetVersion(self) -> Any:
        return OK, self.version

    def _cuDeviceGetCount(self) -> Any:
        return OK, self.devices

    def _cuDeviceGet(self, ordinal: int) -> Any:
        return OK, ordinal

    def _cuDeviceGetName(self, length: int, device: int) -> Any:
        return OK, b"Imaginary GPU\0".ljust(length)  # what the driver leaves alone stays blank

    def _cuDeviceGetAttribute(self, attribute: Any, device: int) -> Any:
        return OK, 9 if attribute == real.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR else 0

    def _cuDevicePrimaryCtxRetain(self, device: int) -> Any:
        return OK, device

    def _cuDevicePrimaryCtxRelease(self, device: int) -> Any:
        return (OK,)

    def _cuCtxSetCurrent(self, context: int) -> Any:
        self.current = context
        return (OK,)

    def _cuDeviceCanAccessPeer(self, device: int, peer: int) -> Any:
        return OK, int("peer refused" not in self.fault)

    def _cuCtxEnablePeerAccess(self, context: int, flags: int) -> Any:
        if (self.current, context) in self.peers:
            return (real.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,)
        self.peers.add((self.current, context))
        return (OK,)

    def _cuGetErrorString(self, status: Any) -> Any:
        return OK, b"as armed by the test"
