"""Lanes on NVIDIA GPUs: streams, events, peer copies, and whole rounds as graphs.

The first lane's device is the *home*: it holds every slot and combines. Combinations do not run when they are asked for
but when the round's model calls are known, because one launch can then write a draft into its slot and into the input
of every lane that reads it. A round becomes a *program*: launches at home, then on every lane copy in, model, copy out,
then a join. A program that is met again is replayed as a CUDA graph. Coefficients and timesteps are not part of it:
they go ahead of it into a table of a few rounds, so that it fits any step of any request with the same shapes.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.base import Array, LaneCall, Measurements, Rows
from engines.cuda.driver import Device, Driver, release
from engines.cuda.kernels import (
    BLOCK,
    BYTES,
    DISTANCE_BLOCK,
    DISTANCE_GRID,
    MAX_OUTPUTS,
    MAX_TARGETS,
    PARTIALS,
    Combination,
    Kernels,
    combination,
)
from engines.errors import DeviceError, NonFiniteError
from engines.trace import span

log = logging.getLogger(__name__)
TABLE_ROUNDS = 8  # how far the host may run ahead
TABLE_FLOATS = 32768  # of one round: coefficients, then timesteps
STAGING_BYTES = 1 << 22
PAIRS_AT_ONCE = 16  # distances that the host waits for together
SLOTS_PER_BLOCK = 32


PAIR_ROUNDS, PAIR_BYTES = 64, (1, 4 << 10, 32 << 10, (512 << 10) + 3)  # latents of SD 1.5, SDXL and SD 3 among them


@dataclass(frozen=True)
class Tensor:
    """Memory on one device."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str


Enqueue = Callable[[], None]


class Network(Protocol):
    """One compiled noise predictor on one device, with scratch memory of its own."""

    @property
    def device(self) -> int:
        """The number of its device."""

    @property
    def capturable(self) -> bool:
        """Whether what it enqueues may become part of a graph, after it ran once."""

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """What puts one run on a stream: reads `sample`, `timestep` and the conditioning by name, writes `output`."""


@dataclass(frozen=True)
class _Inputs:
    """What one lane reads for one composition of branches. At home it is combined into; elsewhere it is copied to.

    `block` holds the timesteps and then the samples, so that one copy moves both. `outbox` is its image at home.
    """

    block: int
    outbox: int
    size: int
    sample_offset: int
    tensors: Mapping[str, Tensor]


@dataclass
class _Lane:
    network: Network
    device: Device
    stream: Any
    done: Any  # event: its outputs of this round are written
    inputs: dict[tuple[int, ...], _Inputs] = field(default_factory=dict)
    outputs: dict[int, int] = field(default_factory=dict)  # by bytes
    staging: dict[tuple[str, int], int] = field(default_factory=dict)


@dataclass
class _Program:
    """A round, ready to enqueue. `identities` are the coefficients of its copies, behind those of its combinations."""

    name: str
    launches: list[tuple[Any, int, Combination]]
    identities: list[Array]
    calls: list[Callable[[], None]]
    joins: list[Callable[[], None]]
    capturable: bool
    copies: Mapping[str, int]
    runs: int = 0
    graph: Any = None


Key = tuple[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], tuple[tuple[tuple[int, int, int], ...], ...]]


class CudaBackend:
    """Plays a sampler on lanes of one or several GPUs; see engines.base.Backend.

    dtype: how latents are stored, float16, bfloat16 or float32. graphs: replay rounds as CUDA graphs where the networks
    allow it. home: the lane whose device holds the latents. beside: another backend on the same networks, for another
    image at the same time; the streams of lanes are shared, so that a lane's work stays in one order.
    """

    def __init__(
        self, driver: Driver, networks: Sequence[Network], dtype: str, cache: Path, *, graphs: bool = True,
        home: int = 0, sibling_of: CudaBackend | None = None,
    ) -> None:  # fmt: skip
        self._driver, self._dtype, self._graphs = driver, dtype, graphs
        devices = {ordinal: driver.device(ordinal) for ordinal in sorted({one.device for one in networks})}
        self._home = devices[networks[home].device]
        self._devices = list(devices.values())
        self._freed: list[Callable[[], None]] = []
        streams: list[Any] = [lane.stream for lane in sibling_of._lanes] if sibling_of else [None] * len(networks)
        self._lanes: list[_Lane] = [
            self._open(network, devices[network.device], stream)
            for network, stream in zip(networks, streams, strict=True)
        ]
        self._main = self._lanes[home].stream
        self._upload_streams = {device.ordinal: self._upload_stream(device) for device in self._devices}
        self._staged = sibling_of.measurements.staged if sibling_of else self._test_pairs(self._devices)
        self._copied = {"peer": 0, "staged": 0}
        # the host does not wait for rounds, so that it knows neither their spans nor their critical path
        self.measurements: Measurements = Measurements(self._timed, copied=self._copied, staged=self._staged)
        with self._on(self._home):
            self._uploads = driver.stream()
            self._uploaded = [driver.event() for _ in range(TABLE_ROUNDS)]
            self._played = [driver.event() for _ in range(TABLE_ROUNDS)]
            self._fork, self._idle = driver.event(), driver.event()
        self._freed += [
            lambda: driver("cuStreamDestroy", self._uploads),
            *(
                lambda event=event: driver("cuEventDestroy", event)
                for event in (*self._uploaded, *self._played, self._fork, self._idle)
            ),
        ]
        self._kernels = Kernels(driver, self._home, dtype, cache)
        self._table = self._allocate(self._home, 4 * TABLE_ROUNDS * TABLE_FLOATS)
        self._round_pointer, self._flag = self._allocate(self._home, 4), self._allocate(self._home, 4)
        self._partials = self._allocate(self._home, 4 * PARTIALS * PAIRS_AT_ONCE)
        self._pinned_table = self._pinned(4 * TABLE_ROUNDS * TABLE_FLOATS).view(np.float32).reshape(TABLE_ROUNDS, -1)
        self._pinned_partials = self._pinned(4 * PARTIALS * PAIRS_AT_ONCE).view(np.float32)
        self._pinned_flag = self._pinned(4).view(np.uint32)
        self._staging = self._pinned(STAGING_BYTES)
        self._shape: tuple[int, ...] = ()
        self._conditioning: list[dict[str, Array]] = []
        self._shaped: list[Callable[[], None]] = []
        self._programs: dict[Key, _Program] = {}
        self._shared: dict[tuple[int, tuple[int, ...]], dict[str, Tensor]] = {}
        self._blocks: list[int] = []
        self._index: dict[str, int] = {}
        self._pending: list[tuple[tuple[int, ...], Array, tuple[int, ...]]] = []
        self._pending_floats = self._staged_bytes = self._round = 0

    # --- the verbs of a backend ----------------------------------------------------------------------------------

    @property
    def lanes(self) -> int:
        """How many calls can run at the same time."""
        return len(self._lanes)

    def bind(
        self, shape: tuple[int, ...], timesteps: Sequence[float], conditioning: Sequence[Mapping[str, Array]]
    ) -> None:
        """See Backend.bind. Memory, programs and graphs stay for as long as shapes stay the same."""
        shapes = [{name: np.shape(value) for name, value in one.items()} for one in conditioning]
        self._settle()
        if shape != self._shape or shapes != [{n: v.shape for n, v in one.items()} for one in self._conditioning]:
            self._forget()
            self._shape, self._elements = shape, int(np.prod(shape))
            self._bytes = self._elements * BYTES[self._dtype]
        self._index = {}
        self._pending, self._pending_floats, self._round = [], 0, 0
        self._timesteps = [float(t) for t in timesteps]
        self._conditioning = [dict(one) for one in conditioning]
        for (device, branches), tensors in self._shared.items():
            self._fill(device, branches, tensors)
        with self._on(self._home):
            for pointer in (self._round_pointer, self._flag):
                self._driver("cuMemsetD32Async", pointer, 0, 1, self._main)

    def write(self, slot: str, value: Array) -> None:
        """See Backend.write."""
        self._flush()
        self._upload(self._home, self._slot(self._row(slot)), narrow(value, self._dtype))

    def read(self, slot: str) -> Array:
        """See Backend.read. NonFiniteError when anything that was combined since `bind` was not finite."""
        self._flush()
        raw = self._download(self._slot(self._index[slot]), self._bytes)
        with self._on(self._home):
            self._copy_out(self._pinned_flag, self._flag)
        self._settle()
        if self._pinned_flag[0]:
            raise NonFiniteError("a latent became NaN or infinite on the GPU: no image can be made of it")
        return widen(raw, self._dtype).reshape(self._shape)

    def predict(self, calls: Sequence[LaneCall]) -> None:
        """See Backend.predict. Returns before the calls have run."""
        self._flush(calls)

    def combine(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        """See Backend.combine. More outputs than registers hold become several launches."""
        table = np.asarray(rows, np.float32)
        if len(targets) <= MAX_OUTPUTS:
            self._add(sources, table, targets)
            return
        moving = {slot: f"{slot}/moving" for slot in targets if slot in sources}  # still read by later launches
        for start in range(0, len(targets), MAX_OUTPUTS):
            part = slice(start, start + MAX_OUTPUTS)
            self._add(sources, table[part], [moving.get(slot, slot) for slot in targets[part]])
        aliased = list(moving)
        for start in range(0, len(aliased), MAX_OUTPUTS):
            slots = aliased[start : start + MAX_OUTPUTS]
            self._add([moving[slot] for slot in slots], np.eye(len(slots), dtype=np.float32), slots)

    def distances(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See Backend.distances; the host waits."""
        self._flush()
        function, found = self._kernels.function("distance"), []
        for start in range(0, len(pairs), PAIRS_AT_ONCE):
            part = pairs[start : start + PAIRS_AT_ONCE]
            with self._on(self._home):
                for n, pair in enumerate(part):
                    a, b = (ctypes.c_void_p(self._slot(self._index[slot])) for slot in pair)
                    partials = ctypes.c_void_p(self._partials + 4 * PARTIALS * n)
                    parameters = [a, b, ctypes.c_ulonglong(self._elements), partials]
                    self._driver.launch(function, DISTANCE_GRID, DISTANCE_BLOCK, self._main, parameters)
                self._copy_out(self._pinned_partials[: PARTIALS * len(part)], self._partials)
            self._settle()
            sums = self._pinned_partials.reshape(PAIRS_AT_ONCE, 2, -1)[: len(part)].sum(2, dtype=np.float64)
            found += [float(np.sqrt(difference / norm)) for difference, norm in sums]
        return found

    def _timed(self, calls: Sequence[LaneCall]) -> float:
        """From an idle device to an idle device, with what a round costs beside its calls."""
        self._flush()
        self._settle()
        start = time.perf_counter()
        self.predict(calls)
        self._settle()
        return time.perf_counter() - start

    def settle(self) -> None:
        """See Backend.settle."""
        self._settle()

    def dead(self) -> list[int]:
        """See Backend.dead: lanes of devices that were lost."""
        return [number for number, lane in enumerate(self._lanes) if self._failed(lane.device)]

    def close(self) -> None:
        """Waits for the lanes and frees their memory."""
        try:
            self._settle()
        except DeviceError as error:  # a lost device: there is nothing to wait for
            log.warning("%s", error)
        self._forget()
        release(self._freed)

    # --- programs ------------------------------------------------------------------------------------------------

    def _add(self, sources: Sequence[str], rows: Array, targets: Sequence[str]) -> None:
        if self._pending_floats + rows.size > TABLE_FLOATS // 2:
            self._flush()
        self._pending.append((tuple(self._index[s] for s in sources), rows, tuple(self._row(t) for t in targets)))
        self._pending_floats += rows.size

    def _flush(self, calls: Sequence[LaneCall] = ()) -> None:
        """Plays what is pending and then the calls."""
        if not self._pending and not calls:
            return
        self._driver("cuCtxSetCurrent", self._home.context)  # another network may have run on this thread
        pending, self._pending, self._pending_floats = self._pending, [], 0
        key: Key = (
            tuple((sources, targets) for sources, _, targets in pending),
            tuple(
                tuple((self._index[branch.latent], self._row(branch.output), branch.conditioning) for branch in call)
                for call in calls
            ),
        )
        program = self._programs.get(key) or self._programs.setdefault(key, self._compile(key))
        images = self._shape[0]
        times = [np.repeat([self._timesteps[branch.step] for branch in call], images) for call in calls if call]
        parts = [rows.T.ravel() for _, rows, _ in pending] + program.identities + times
        self._play(program, np.concatenate(parts, dtype=np.float32))

    def _play(self, program: _Program, data: Array) -> None:
        """Sends the round's numbers ahead on a stream of their own, then the program."""
        driver, entry = self._driver, self._round % TABLE_ROUNDS
        if self._round >= TABLE_ROUNDS:
            driver.wait(self._played[entry], f"round {self._round - TABLE_ROUNDS} on {self._home.name}")
        self._pinned_table[entry, : data.size] = data
        with self._on(self._home), span(program.name):
            at = entry * TABLE_FLOATS * 4
            driver(
                "cuMemcpyHtoDAsync", self._table + at, self._pinned_table.ctypes.data + at, data.nbytes, self._uploads
            )
            driver("cuEventRecord", self._uploaded[entry], self._uploads)
            driver("cuStreamWaitEvent", self._main, self._uploaded[entry], 0)
            if program.graph is None and program.runs and self._graphs and program.capturable:
                program.graph = self._capture(program)
            if program.graph is not None:
                driver("cuGraphLaunch", program.graph, self._main)
            else:
                self._enqueue(program)
            driver("cuEventRecord", self._played[entry], self._main)
        program.runs += 1
        self._round += 1
        for kind, copies in program.copies.items():
            self._copied[kind] += copies

    def _capture(self, program: _Program) -> Any:
        """The program as a graph, or None where something in it cannot be captured."""
        try:
            return self._driver.capture(self._main, lambda: self._enqueue(program))
        except DeviceError as error:
            program.capturable = False
            log.warning("a %s goes through streams, not through a graph: %s", program.name, error)
            return None

    def _enqueue(self, program: _Program) -> None:
        """One round: combinations at home, lanes apart, and home again."""
        driver = self._driver
        with span("combine"):
            for function, grid, combined in program.launches:
                driver.launch(function, grid, BLOCK, self._main, [combined])
        if program.calls:
            driver("cuEventRecord", self._fork, self._main)
        for call in program.calls:
            call()
        for join in program.joins:
            join()
        parameters = [ctypes.c_void_p(self._round_pointer), ctypes.c_uint(TABLE_ROUNDS)]
        driver.launch(self._kernels.function("advance"), 1, 1, self._main, parameters)

    def _compile(self, key: Key) -> _Program:
        """Turns slots into addresses, and gives drafts to the lanes that read them in the launch that makes them."""
        combinations, calls = key
        busy = [(self._lanes[n], call) for n, call in enumerate(calls) if call]
        planned: list[tuple[list[int], list[list[int]]]] = []  # addresses of inputs; where each output goes
        made: dict[int, tuple[int, int]] = {}
        for sources, targets in combinations:
            made.update({target: (len(planned), m) for m, target in enumerate(targets)})
            planned.append(([self._slot(s) for s in sources], [[self._slot(t)] for t in targets]))
        missing: dict[int, list[int]] = {}
        for lane, call in busy:
            bound = self._lane_inputs(lane, tuple(conditioning for _, _, conditioning in call))
            for row, (latent, _, _) in enumerate(call):
                pointer = bound.outbox + bound.sample_offset + row * self._bytes
                number, m = made.get(latent, (-1, 0))
                if number >= 0 and sum(map(len, planned[number][1])) < MAX_TARGETS:
                    planned[number][1][m].append(pointer)
                else:
                    missing.setdefault(latent, []).append(pointer)
        identities = []
        for copies in _groups(missing, MAX_OUTPUTS, MAX_TARGETS):
            planned.append(([self._slot(latent) for latent, _ in copies], [pointers for _, pointers in copies]))
            identities.append(np.eye(len(copies), dtype=np.float32).ravel())
        times = [
            (self._lane_inputs(lane, tuple(c for _, _, c in call)).outbox, len(call) * self._shape[0])
            for lane, call in busy
        ]
        launches, offset = [], 0
        for number, (pointers, goals) in enumerate(planned):
            last = number == len(planned) - 1
            parameters = combination(pointers, goals, self._elements, times if last else ())
            parameters.data, parameters.stride, parameters.rows = self._table, TABLE_FLOATS, offset
            parameters.round, parameters.not_finite = self._round_pointer, self._flag
            offset += len(pointers) * len(goals)
            parameters.timesteps = offset
            launches.append((*self._kernels.combination(parameters, len(goals)), parameters))
        self._kernels.function("advance")
        steps = [self._call(lane, call) for lane, call in busy]
        branches = sum(len(call) for _, call in busy)
        moved = {"peer": 0, "staged": 0}
        for lane, call in busy:
            if lane.device is not self._home:
                kind = "staged" if self._is_staged(lane) else "peer"
                moved[kind] += 1 + len(_runs([output for _, output, _ in call]))
        return _Program(
            f"round of {branches} branches on {len(busy)} lanes", launches, identities, [call for call, _ in steps],
            [join for _, join in steps], all(lane.network.capturable for lane, _ in busy), moved,
        )  # fmt: skip

    def _call(self, lane: _Lane, call: Sequence[tuple[int, int, int]]) -> tuple[Enqueue, Enqueue]:
        """What a lane does in a round, and what home does when it is done."""
        driver, home, main = self._driver, self._home, self._main
        bound = self._lane_inputs(lane, tuple(conditioning for _, _, conditioning in call))
        rows = [output for _, output, _ in call]
        runs, remote, staged = _runs(rows), lane.device is not home, self._is_staged(lane)
        size = len(rows) * self._bytes
        direct = not remote and len(runs) == 1
        own = self._slot(rows[0]) if direct else self._output(lane, size)
        shape = (len(rows) * self._shape[0], *self._shape[1:])
        with self._on(lane.device):
            run = lane.network.bind(bound.tensors, Tensor(own, shape, self._dtype), lane.stream)
        inbox = self._lane_staging(lane, "in", bound.size) if staged else 0
        outbox = self._lane_staging(lane, "out", size) if staged else 0

        name = f"lane {self._lanes.index(lane)}, cuda:{lane.device.ordinal}, batch {shape[0]}"

        def enqueue() -> None:
            with span(name):
                enqueue_all()

        def enqueue_all() -> None:
            if staged:
                driver("cuMemcpyDtoHAsync", inbox, bound.outbox, bound.size, main)
                driver("cuEventRecord", self._fork, main)
            with self._on(lane.device):
                if lane.stream is not main:
                    driver("cuStreamWaitEvent", lane.stream, self._fork, 0)
                if staged:
                    driver("cuMemcpyHtoDAsync", bound.block, inbox, bound.size, lane.stream)
                elif remote:
                    self._copy(bound.block, bound.outbox, bound.size, lane.stream)
                run()
                if staged:
                    driver("cuMemcpyDtoHAsync", outbox, own, size, lane.stream)
                elif not direct:
                    for start, first, count in runs:
                        source, target = own + start * self._bytes, self._slot(first)
                        self._copy(target, source, count * self._bytes, lane.stream)
                if lane.stream is not main:
                    driver("cuEventRecord", lane.done, lane.stream)

        def join() -> None:
            if lane.stream is not main:
                driver("cuStreamWaitEvent", main, lane.done, 0)
            if staged:
                for start, first, count in runs:
                    target, source = self._slot(first), outbox + start * self._bytes
                    driver("cuMemcpyHtoDAsync", target, source, count * self._bytes, main)

        return enqueue, join

    # --- memory --------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Frees what depends on shapes."""
        graphs = [program.graph for program in self._programs.values() if program.graph is not None]
        release(self._shaped)
        release([partial(self._driver, "cuGraphExecDestroy", graph) for graph in graphs])
        for lane in self._lanes:
            for memory in (lane.inputs, lane.outputs, lane.staging):
                memory.clear()
        self._programs, self._shared, self._blocks = {}, {}, []

    def _row(self, slot: str) -> int:
        row = self._index.setdefault(slot, len(self._index))
        if row >= len(self._blocks) * SLOTS_PER_BLOCK:
            self._blocks.append(self._allocate(self._home, SLOTS_PER_BLOCK * self._bytes, shaped=True))
        return row

    def _slot(self, row: int) -> int:
        """The address of a slot; slots of one block are neighbours."""
        return self._blocks[row // SLOTS_PER_BLOCK] + row % SLOTS_PER_BLOCK * self._bytes

    def _lane_inputs(self, lane: _Lane, branches: tuple[int, ...]) -> _Inputs:
        if branches not in lane.inputs:
            batch = len(branches) * self._shape[0]
            offset = -(-4 * batch // 256) * 256
            size = offset + len(branches) * self._bytes
            block = self._allocate(lane.device, size, shaped=True)
            outbox = block if lane.device is self._home else self._allocate(self._home, size, shaped=True)
            shared = (lane.device.ordinal, branches)
            if shared not in self._shared:
                self._shared[shared] = {
                    name: self._conditioning_tensor(lane.device, batch, value)
                    for name, value in self._conditioning[branches[0]].items()
                }
                self._fill(*shared, self._shared[shared])
            tensors = {
                "sample": Tensor(block + offset, (batch, *self._shape[1:]), self._dtype),
                "timestep": Tensor(block, (batch,), "float32"),
                **self._shared[shared],
            }
            lane.inputs[branches] = _Inputs(block, outbox, size, offset, tensors)
        return lane.inputs[branches]

    def _conditioning_tensor(self, device: Device, batch: int, value: Array) -> Tensor:
        shape = (batch, *value.shape[1:])
        return Tensor(self._allocate(device, int(np.prod(shape)) * BYTES[self._dtype], shaped=True), shape, self._dtype)

    def _fill(self, ordinal: int, branches: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Sets the conditioning of a batch: one block of images per branch."""
        device = next(lane.device for lane in self._lanes if lane.device.ordinal == ordinal)
        for name, tensor in tensors.items():
            value = np.concatenate([self._conditioning[branch][name] for branch in branches])
            self._upload(device, tensor.pointer, narrow(value, self._dtype))

    def _output(self, lane: _Lane, size: int) -> int:
        if size not in lane.outputs:
            lane.outputs[size] = self._allocate(lane.device, size, shaped=True)
        return lane.outputs[size]

    def _lane_staging(self, lane: _Lane, way: str, size: int) -> int:
        if (way, size) not in lane.staging:
            lane.staging[way, size] = self._pinned(size, shaped=True).ctypes.data
        return lane.staging[way, size]

    def _allocate(self, device: Device, size: int, *, shaped: bool = False) -> int:
        """Plain device memory: pooled memory breaks peer copies on some systems."""
        driver = self._driver
        with self._on(device):
            pointer = int(driver("cuMemAlloc", max(size, 256)))

        def free() -> None:
            with self._on(device):
                driver("cuMemFree", pointer)

        (self._shaped if shaped else self._freed).append(free)
        return pointer

    def _pinned(self, size: int, *, shaped: bool = False) -> NDArray[np.uint8]:
        with self._on(self._home):
            memory, free = pinned(self._driver, size)
        (self._shaped if shaped else self._freed).append(free)
        return memory

    # --- copies --------------------------------------------------------------------------------------------------

    def _upload(self, device: Device, pointer: int, value: NDArray[Any]) -> None:
        """Host memory to a device, in order with what home does; the value may change after this returns."""
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        for start in range(0, raw.size, STAGING_BYTES):
            part = raw[start : start + STAGING_BYTES]
            if self._staged_bytes + part.size > STAGING_BYTES:
                self._settle()
            at = self._staged_bytes
            self._staging[at : at + part.size] = part
            self._staged_bytes = -(-(at + part.size) // 256) * 256
            source = self._staging.ctypes.data + at
            stream, sent = self._upload_streams[device.ordinal]
            with self._on(device):
                self._driver("cuMemcpyHtoDAsync", pointer + start, source, part.size, stream)
                if stream is not self._main:
                    self._driver("cuEventRecord", sent, stream)
                    self._driver("cuStreamWaitEvent", self._main, sent, 0)

    def _download(self, pointer: int, size: int) -> NDArray[np.uint8]:
        self._settle()
        parts = []
        for start in range(0, size, STAGING_BYTES):
            count = min(size - start, STAGING_BYTES)
            with self._on(self._home):
                self._copy_out(self._staging[:count], pointer + start)
            self._settle()
            parts.append(self._staging[:count].copy())
        return np.concatenate(parts)

    def _copy_out(self, target: NDArray[Any], pointer: int) -> None:
        self._driver("cuMemcpyDtoHAsync", target.ctypes.data, pointer, target.nbytes, self._main)

    def _copy(self, target: int, source: int, size: int, stream: Any) -> None:
        """Between devices, or on one. Unlike cuMemcpyPeerAsync, which finds its devices in the same way from the
        addresses, it may be captured."""
        self._driver("cuMemcpyAsync", target, source, size, stream)

    def _settle(self) -> None:
        """Waits until home has done everything; lanes have then, too. DeviceError when another device was lost.

        Home may not notice: waiting for a lost device ends, and home goes on with what lay there before.
        """
        with self._on(self._home):
            self._driver("cuEventRecord", self._idle, self._main)
        self._driver.wait(self._idle, f"the work on {self._home.name}")
        self._staged_bytes = 0
        for device in self._devices:
            if device is not self._home and self._failed(device):
                with self._on(device):
                    self._driver("cuStreamQuery", self._upload_streams[device.ordinal][0])

    def _failed(self, device: Device) -> bool:
        """An error that a lost device once gave comes again with every call, also on streams that nothing runs on."""
        api, (stream, _) = self._driver.api, self._upload_streams[device.ordinal]
        api.cuCtxSetCurrent(device.context)
        status = api.cuStreamQuery(stream)[0]
        api.cuCtxSetCurrent(self._home.context)
        return status not in (api.CUresult.CUDA_SUCCESS, api.CUresult.CUDA_ERROR_NOT_READY)

    # --- devices -------------------------------------------------------------------------------------------------

    @contextmanager
    def _on(self, device: Device) -> Iterator[None]:
        """Makes a device current, which is a property of the calling thread, and afterwards home again."""
        self._driver("cuCtxSetCurrent", device.context)
        try:
            yield
        finally:
            if device is not self._home:
                self._driver("cuCtxSetCurrent", self._home.context)

    def _open(self, network: Network, device: Device, stream: Any) -> _Lane:
        with self._on(device):
            lane = _Lane(network, device, stream or self._driver.stream(), self._driver.event())
        self._freed.append(lambda: self._driver("cuEventDestroy", lane.done))
        if stream is None:
            self._freed.append(lambda: self._driver("cuStreamDestroy", lane.stream))
        return lane

    def _upload_stream(self, device: Device) -> tuple[Any, Any]:
        """What takes data to a device outside rounds, with its event: other images may be using its lanes."""
        if device is self._home:
            return self._main, None
        with self._on(device):
            stream, sent = self._driver.stream(), self._driver.event()
        self._freed += [
            lambda: self._driver("cuEventDestroy", sent),
            lambda: self._driver("cuStreamDestroy", stream),
        ]
        return stream, sent

    def _is_staged(self, lane: _Lane) -> bool:
        pairs = {(self._home.ordinal, lane.device.ordinal), (lane.device.ordinal, self._home.ordinal)}
        return bool(pairs & set(self._staged))

    def _test_pairs(self, devices: Sequence[Device]) -> tuple[tuple[int, int], ...]:
        """Copies patterns between every ordered pair of devices and reads them back; the pairs that cannot or lie.

        Peer copies have been seen to return success and to change nothing, or to change data.
        """
        failed = []
        for of, to in product(devices, devices):
            if of is to:
                continue
            reason = self._pair_fault(of, to)
            if reason:
                failed.append((of.ordinal, to.ordinal))
                log.warning(
                    "peer copies from cuda:%d to cuda:%d %s: latents go through host memory",
                    of.ordinal, to.ordinal, reason,
                )  # fmt: skip
        return tuple(failed)

    def _pair_fault(self, of: Device, to: Device) -> str | None:
        """Why copies from one device to another must not be direct, or None."""
        driver = self._driver
        with self._on(to):
            can = driver("cuDeviceCanAccessPeer", driver("cuDeviceGet", to.ordinal), driver("cuDeviceGet", of.ordinal))
            if not can:
                return "are not possible"
            status = driver.api.cuCtxEnablePeerAccess(of.context, 0)[0]
            if status and status != driver.api.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
                return f"cannot be enabled ({status.name})"
        kept = len(self._freed)
        try:
            return self._copies_fault(of, to)
        except DeviceError as error:
            return f"failed ({error})"
        finally:
            todo = self._freed[kept:]
            del self._freed[kept:]
            release(todo)

    def _copies_fault(self, of: Device, to: Device) -> str | None:
        driver, largest, random = self._driver, max(PAIR_BYTES), np.random.default_rng(0)
        source, target = self._allocate(of, largest), self._allocate(to, largest)
        host = self._pinned(largest)

        def stream_on(device: Device) -> tuple[Any, Any]:
            with self._on(device):
                stream, done = driver.stream(), driver.event()
            self._freed.extend((lambda: driver("cuStreamDestroy", stream), lambda: driver("cuEventDestroy", done)))
            return stream, done

        (sending, sent), (receiving, received) = stream_on(of), stream_on(to)
        for number in range(PAIR_ROUNDS):
            size = PAIR_BYTES[number % len(PAIR_BYTES)]
            pattern = random.integers(0, 256, size, np.uint8)
            host[:size] = pattern
            with self._on(of):
                driver("cuMemcpyHtoDAsync", source, host.ctypes.data, size, sending)
                driver("cuEventRecord", sent, sending)
            with self._on(to):
                driver("cuMemsetD8Async", target, int(~pattern[0]) & 255, size, receiving)
                driver("cuStreamWaitEvent", receiving, sent, 0)
                self._copy(target, source, size, receiving)
                driver("cuMemcpyDtoHAsync", host.ctypes.data, target, size, receiving)
                driver("cuEventRecord", received, receiving)
            driver.wait(received, f"a peer copy from cuda:{of.ordinal} to cuda:{to.ordinal}")
            if not np.array_equal(host[:size], pattern):
                return f"changed data (round {number}, {size} bytes)"
        return None


def pinned(driver: Driver, size: int) -> tuple[NDArray[np.uint8], Callable[[], None]]:
    """Host memory that every device copies to and from without waiting, and what frees it."""
    pointer = int(driver("cuMemHostAlloc", size, driver.api.CU_MEMHOSTALLOC_PORTABLE))
    memory: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    return memory, lambda: driver("cuMemFreeHost", pointer)


def _groups(missing: Mapping[int, list[int]], outputs: int, targets: int) -> Iterable[list[tuple[int, list[int]]]]:
    """Slots and where copies of them go, in launches of a limited size."""
    group: list[tuple[int, list[int]]] = []
    for latent, pointers in missing.items():
        for start in range(0, len(pointers), targets):
            part = pointers[start : start + targets]
            if len(group) == outputs or sum(len(p) for _, p in group) + len(part) > targets:
                yield group
                group = []
            group.append((latent, part))
    if group:
        yield group


def _runs(rows: Sequence[int]) -> list[tuple[int, int, int]]:
    """(position, first row, count) of the longest stretches of neighbouring rows within a block."""
    runs: list[tuple[int, int, int]] = []
    for position, row in enumerate(rows):
        if runs and runs[-1][1] + runs[-1][2] == row and row % SLOTS_PER_BLOCK:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + 1)
        else:
            runs.append((position, row, 1))
    return runs


def narrow(value: Array, dtype: str) -> NDArray[Any]:
    """float32 as it is stored, to nearest, ties to even."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(value, dtype)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)


def widen(raw: NDArray[np.uint8], dtype: str) -> Array:
    """Stored values as float32."""
    if dtype != "bfloat16":
        return raw.view(dtype).astype(np.float32)
    return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
