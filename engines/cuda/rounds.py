"""Rounds as launches and copies on streams: compiled once for the slots that they touch, then replayed as graphs.

At home combinations are launched first, for one launch writes a draft into its slot and into the input of every lane
that reads it. Then every lane copies in, runs its model and copies out, all at the same time, and home waits for them.
Coefficients and timesteps are not part of it: they go ahead of it into a table of a few rounds, so that a round serves
any step of any request with the same shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from engines.base import Array
from engines.cuda.driver import SERIAL, Device, Driver
from engines.cuda.kernels import BLOCK, MAX_OUTPUTS, MAX_TARGETS, Combination, Kernels, combination
from engines.cuda.memory import SLOTS_PER_BLOCK, Inputs, Memory, ShapeMemory, Tensor
from engines.errors import DeviceError
from engines.trace import span

log = logging.getLogger(__name__)
TABLE_ROUNDS = 16  # data of so many rounds is on the device; the two halves are written in turn
TABLE_FLOATS = 32768  # of one round: coefficients, then timesteps
Enqueue = Callable[[], None]
# (sources, targets) of combinations, then (latent, output, conditioning) of the branches of every lane's call
Key = tuple[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], tuple[tuple[tuple[int, int, int], ...], ...]]


@runtime_checkable
class Prepared(Protocol):
    """What `bind` returns where something must be there before a run can be captured."""

    def prepare(self) -> None:
        """Makes it, for the next run."""


class Held(Protocol):
    """What a graph needs that captured a run of a network, for as long as it lives."""

    @property
    def outgrown(self) -> bool:
        """Whether the graph keeps memory that would be free without it."""


class LaneNetwork(Protocol):
    """One compiled noise predictor on one device, with scratch memory of its own."""

    @property
    def device(self) -> int:
        """The number of its device."""

    @property
    def capturable(self) -> bool:
        """Whether what it enqueues may become part of a graph, after it ran once."""

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        """What puts one run on a stream: reads `sample`, `timestep` and the conditioning by name, writes `output`."""

    @property
    def held(self) -> Held | None:
        """What a graph needs that captured its last run."""

    @property
    def outgrown(self) -> int:
        """How often memory became too small: then graphs may be outgrown."""

    @property
    def contexts(self) -> int:
        """How many compiled states it has in memory."""

    def trim(self, idle: Callable[[], bool]) -> None:
        """Frees what is not needed any more, if there is any and nothing runs on the lane, which is asked late."""


class Stateless:
    """The rest of a LaneNetwork that keeps nothing between runs."""

    held: Held | None = None
    outgrown = contexts = 0

    def trim(self, idle: Callable[[], bool]) -> None:
        """Nothing to free."""


@dataclass(eq=False)
class Lane:
    """A network with its stream, which all backends on it share, and with what one backend needs beside it.

    `done`: its outputs of this round are written. `carrier` is a stream of home's that copies for a lane without peer
    access, so that those copies wait neither for home's own model nor for each other's; `left` and `arrived` are its
    events. `state` are two words on its device that `advance` counts in.
    """

    number: int
    network: LaneNetwork
    device: Device
    kernels: Kernels
    stream: Any
    done: Any
    state: int
    carrier: Any = None
    left: Any = None
    arrived: Any = None


@dataclass(eq=False)
class RoundGraph:
    """A round, ready to enqueue. `identities` are the coefficients of its copies, behind those of its combinations.

    `last` is when it was enqueued last, counted in rounds; `held` keeps alive what its graph was captured with.
    """

    name: str
    launches: list[tuple[Any, int, Combination]]
    identities: list[Array]
    lanes: tuple[Lane, ...]
    calls: list[Enqueue]
    joins: list[Enqueue]
    copies: Mapping[str, int]
    numbers: tuple[int, ...] = ()
    prepared: list[Prepared] = field(default_factory=list)
    runs: int = 0
    last: int = 0
    refused: int = 0
    graph: Any = None
    held: list[Held | None] = field(default_factory=list)

    @classmethod
    def of_graph(cls, other: RoundGraph) -> RoundGraph:
        """Takes the graph of another one, which goes on through streams."""
        gone = cls("", [], [], (), [], [], {}, graph=other.graph, held=other.held)
        other.graph, other.held = None, []
        return gone

    @property
    def outgrown(self) -> bool:
        """Whether its graph keeps memory that would be free without it."""
        return any(held is not None and held.outgrown for held in self.held)

    @property
    def capturable(self) -> bool:
        """Whether it may become a graph; after a capture that failed it is tried once more."""
        return self.refused < 2 and all(lane.network.capturable for lane in self.lanes)


@dataclass(frozen=True)
class Table:
    """Addresses that combinations read and write beside latents: the data of rounds, whose it is, and the NaN flag."""

    data: int
    state: int
    flag: int
    seen: int  # words of host memory


class Rounds:
    """Compiles and enqueues rounds of one backend."""

    def __init__(
        self, memory: Memory, lanes: Sequence[Lane], main: Any, kernels: Kernels, table: Table,
        staged: Sequence[tuple[int, int]],
    ) -> None:  # fmt: skip
        self._driver: Driver = memory.driver
        self._memory, self._lanes, self._main, self._kernels, self._table = memory, lanes, main, kernels, table
        self._home, pairs = memory.home, set(staged)
        self._fork, self.turned = memory.event(self._home), memory.event(self._home)
        self.side = memory.stream(self._home)  # counts beside the models
        for lane in lanes:
            ordinals = (self._home.ordinal, lane.device.ordinal)
            if pairs & {ordinals, ordinals[::-1]}:
                lane.carrier = memory.stream(self._home)
                lane.left, lane.arrived = memory.event(self._home), memory.event(self._home)

    def enqueue(self, one: RoundGraph) -> None:
        """One round: combinations at home, lanes apart, and home again."""
        driver, main, seen = self._driver, self._main, self._table.seen
        with span("combine"):
            for function, grid, combined in one.launches:
                driver.launch(function, grid, BLOCK, main, [combined])
        if not one.calls:
            self._kernels.advance(main, self._table.state, TABLE_ROUNDS, seen)
            return
        driver("cuEventRecord", self._fork, main)
        driver("cuStreamWaitEvent", self.side, self._fork, 0)
        self._kernels.advance(self.side, self._table.state, TABLE_ROUNDS, seen)
        driver("cuEventRecord", self.turned, self.side)
        for call in one.calls:
            call()
        for join in one.joins:
            join()
        driver("cuStreamWaitEvent", main, self.turned, 0)

    def capture(self, one: RoundGraph) -> None:
        """Makes a graph of a round, unless something in it cannot be captured."""
        try:
            with SERIAL:  # nothing is trimmed before the graph holds what it needs
                for run in one.prepared:
                    run.prepare()
                self._driver("cuCtxSetCurrent", self._home.context)
                one.graph = self._driver.capture(self._main, lambda: self.enqueue(one))
                one.held = [lane.network.held for lane in one.lanes]
        except DeviceError as error:
            one.refused += 1
            log.warning("a %s goes through streams, not through a graph: %s", one.name, error)

    def compile(self, key: Key, shape: ShapeMemory, fill: Callable[..., None]) -> RoundGraph:
        """Turns slots into addresses, and gives drafts to the lanes that read them in the launch that makes them."""
        combinations, calls = key
        busy = [(self._lanes[n], call) for n, call in enumerate(calls) if call]
        inputs = [
            shape.lane_inputs(lane.number, lane.device, tuple(branch for _, _, branch in call), fill)
            for lane, call in busy
        ]
        planned, identities = self._planned(combinations, [call for _, call in busy], inputs, shape)
        times = [(one.staging, len(call) * shape.shape[0]) for (_, call), one in zip(busy, inputs, strict=True)]
        launches, offset = [], 0
        for number, (pointers, goals) in enumerate(planned):
            last = number == len(planned) - 1
            parameters = combination(pointers, goals, shape.elements, times if last else ())
            parameters.data, parameters.stride, parameters.rows = self._table.data, TABLE_FLOATS, offset
            parameters.round, parameters.not_finite = self._table.state, self._table.flag
            offset += len(pointers) * len(goals)
            parameters.timesteps = offset
            launches.append((*self._kernels.combination(parameters, len(goals)), parameters))
        steps = [self._call(lane, call, one, shape) for (lane, call), one in zip(busy, inputs, strict=True)]
        moved = {"peer": 0, "staged": 0}
        for lane, call in busy:
            if lane.device is not self._home:
                moved["staged" if lane.carrier else "peer"] += 1 + len(_runs([output for _, output, _ in call]))
        name = f"round of {sum(len(call) for _, call in busy)} branches on {len(busy)} lanes"
        lanes, runs = tuple(lane for lane, _ in busy), list[object](run for *_, run in steps)
        return RoundGraph(
            name, launches, identities, lanes, [call for call, _, _ in steps], [join for _, join, _ in steps], moved,
            tuple(lane.number for lane in lanes), [run for run in runs if isinstance(run, Prepared)],
        )  # fmt: skip

    @staticmethod
    def _planned(
        combinations: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        calls: Sequence[Sequence[tuple[int, int, int]]],
        inputs: Sequence[Inputs],
        shape: ShapeMemory,
    ) -> tuple[list[tuple[list[int], list[list[int]]]], list[Array]]:
        """Addresses of what every launch reads and where each output goes, and the coefficients of mere copies."""
        planned: list[tuple[list[int], list[list[int]]]] = []
        made: dict[int, tuple[int, int]] = {}
        for sources, targets in combinations:
            made.update({target: (len(planned), m) for m, target in enumerate(targets)})
            planned.append(([shape.slot(s) for s in sources], [[shape.slot(t)] for t in targets]))
        missing: dict[int, list[int]] = {}
        for call, bound in zip(calls, inputs, strict=True):
            for row, (latent, _, _) in enumerate(call):
                pointer = bound.staging + bound.sample_offset + row * shape.bytes
                number, m = made.get(latent, (-1, 0))
                if number >= 0 and sum(map(len, planned[number][1])) < MAX_TARGETS:
                    planned[number][1][m].append(pointer)
                else:
                    missing.setdefault(latent, []).append(pointer)
        identities = []
        for copies in _groups(missing, MAX_OUTPUTS, MAX_TARGETS):
            planned.append(([shape.slot(latent) for latent, _ in copies], [pointers for _, pointers in copies]))
            identities.append(np.eye(len(copies), dtype=np.float32).ravel())
        return planned, identities

    def _call(
        self, lane: Lane, call: Sequence[tuple[int, int, int]], bound: Inputs, shape: ShapeMemory
    ) -> tuple[Enqueue, Enqueue, Enqueue]:
        """What a lane does in a round, what home does when it is done, and the run of the network in it."""
        rows = [output for _, output, _ in call]
        runs, size, remote = _runs(rows), len(rows) * shape.bytes, lane.device is not self._home
        direct = not remote and len(runs) == 1
        own = shape.slot(rows[0]) if direct else shape.output(lane.number, lane.device, size)
        batch = (len(rows) * shape.shape[0], *shape.shape[1:])
        with self._memory.on(lane.device):
            lane.kernels.function("advance")  # loaded now: nothing may be loaded during a capture
            run = lane.network.bind(bound.tensors, Tensor(own, batch, shape.dtype), lane.stream)
        if lane.carrier:
            return self._staged_call(lane, bound, run, own, size, [(shape.slot(first), at * shape.bytes,
                                     count * shape.bytes) for at, first, count in runs], shape)  # fmt: skip
        driver, main = self._driver, self._main
        copies = [(shape.slot(first), own + at * shape.bytes, count * shape.bytes) for at, first, count in runs]
        name = f"lane {lane.number}, cuda:{lane.device.ordinal}, batch {batch[0]}"

        def enqueue() -> None:
            with span(name), self._memory.on(lane.device):
                if lane.stream is not main:
                    driver("cuStreamWaitEvent", lane.stream, self._fork, 0)
                if remote:  # unlike cuMemcpyPeerAsync, which finds its devices in the same way, it may be captured
                    driver("cuMemcpyAsync", bound.block, bound.staging, bound.size, lane.stream)
                run()
                for target, source, count in () if direct else copies:
                    driver("cuMemcpyAsync", target, source, count, lane.stream)
                self._finished(lane)

        def join() -> None:
            if lane.stream is not main:
                driver("cuStreamWaitEvent", main, lane.done, 0)

        return enqueue, join, run

    def _staged_call(
        self, lane: Lane, bound: Inputs, run: Enqueue, own: int, size: int, goals: Sequence[tuple[int, int, int]],
        shape: ShapeMemory,
    ) -> tuple[Enqueue, Enqueue, Enqueue]:  # fmt: skip
        """The same through host memory, by the lane's carrier at home; `goals` are (slot, offset, bytes)."""
        driver, main = self._driver, self._main
        inbox = shape.lane_staging(lane.number, "in", bound.size)
        outbox = shape.lane_staging(lane.number, "out", size)
        name = f"lane {lane.number}, cuda:{lane.device.ordinal}, through host memory"

        def enqueue() -> None:
            with span(name):
                driver("cuStreamWaitEvent", lane.carrier, self._fork, 0)
                driver("cuMemcpyDtoHAsync", inbox, bound.staging, bound.size, lane.carrier)
                driver("cuEventRecord", lane.left, lane.carrier)
                with self._memory.on(lane.device):
                    driver("cuStreamWaitEvent", lane.stream, lane.left, 0)
                    driver("cuMemcpyHtoDAsync", bound.block, inbox, bound.size, lane.stream)
                    run()
                    driver("cuMemcpyDtoHAsync", outbox, own, size, lane.stream)
                    self._finished(lane)

        def join() -> None:
            driver("cuStreamWaitEvent", lane.carrier, lane.done, 0)
            for target, offset, count in goals:
                driver("cuMemcpyHtoDAsync", target, outbox + offset, count, lane.carrier)
            driver("cuEventRecord", lane.arrived, lane.carrier)
            driver("cuStreamWaitEvent", main, lane.arrived, 0)

        return enqueue, join, run

    def _finished(self, lane: Lane) -> None:
        lane.kernels.advance(lane.stream, lane.state, 1, self._table.seen + 4 * (1 + lane.number))
        if lane.stream is not self._main:
            self._driver("cuEventRecord", lane.done, lane.stream)


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
