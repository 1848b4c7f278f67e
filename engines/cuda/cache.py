"""What is kept between rounds and images, within limits: memory by shape, compiled rounds, graphs, and their data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from engines.base import Array
from engines.cuda.driver import SERIAL, release
from engines.cuda.memory import Memory, ShapeMemory
from engines.cuda.rounds import Key, Lane, RoundGraph, Rounds
from engines.errors import DeviceMemoryError

SHAPES = 3  # of latents whose memory and rounds are kept
SLOT_BYTES = 1 << 28  # of slots that keep their names from image to image
ROUNDS, GRAPHS = 512, 96  # of all backends on the same lanes together
STALE = 256  # rounds without use, after which a graph makes room for another
PLANNED_BYTES, PLANS = 1 << 20, 16  # data of rounds that is kept ready to send; sequences of timesteps that it is for


@dataclass(frozen=True)
class Planned:
    """A round that was asked for by the same objects before, and its data in pinned memory; `asked` keeps their ids."""

    round: RoundGraph
    source: int
    bytes: int
    asked: object


class RoundCache:
    """Of one backend on lanes. `settle()` waits until nothing of the backend runs.

    `planned` finds a round by the identities of what was asked for, for the timesteps of this image.
    """

    def __init__(self, rounds: Rounds, memory: Memory, lanes: Sequence[Lane], settle: Callable[[], None]) -> None:
        self._rounds, self._memory, self._lanes, self._settle = rounds, memory, lanes, settle
        self._most_rounds, self._most_graphs = max(ROUNDS // len(lanes), 32), max(GRAPHS // len(lanes), 8)
        self._outgrown = 0
        self._shapes: OrderedDict[object, ShapeMemory] = OrderedDict()
        self._compiled: OrderedDict[tuple[int, Key], RoundGraph] = OrderedDict()
        self._captured: set[RoundGraph] = set()
        self._retired: list[RoundGraph] = []
        self._data, self._used = memory.pinned(PLANNED_BYTES), 0
        self.planned: dict[tuple[int, ...], Planned] = {}
        self._timesteps: tuple[float, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many rounds are compiled, and how many of them are graphs."""
        return {"rounds": len(self._compiled), "graphs": len(self._captured)}

    def bind(self, shape: tuple[int, ...], dtype: str, conditioning: Any, timesteps: tuple[float, ...]) -> ShapeMemory:
        """The memory of an image's shapes; nothing may run."""
        key = (shape, conditioning)
        found = self._shapes.get(key)
        if found is not None and len(found.index) * found.bytes > SLOT_BYTES:
            self._drop(key)
        while key not in self._shapes and len(self._shapes) >= SHAPES:
            self._drop(next(iter(self._shapes)))
        if key not in self._shapes:
            memory = Memory(self._memory.driver, self._memory.home)
            self._shapes[key] = ShapeMemory(shape, dtype, conditioning, memory)
        self._shapes.move_to_end(key)
        self._timesteps = timesteps
        self._plan()
        return self._shapes[key]

    def round(self, shape: ShapeMemory, key: Key, fill: Callable[..., None]) -> RoundGraph:
        """A round by the slots that it touches."""
        known = id(shape), key
        one = self._compiled.get(known)
        if one is None:
            one = self._compiled[known] = self._compile(shape, key, fill)
            if len(self._compiled) > self._most_rounds:
                self._retired.append(self._compiled.popitem(last=False)[1])
                self._forget_plans()
        self._compiled.move_to_end(known)
        return one

    def _compile(self, shape: ShapeMemory, key: Key, fill: Callable[..., None]) -> RoundGraph:
        try:
            return self._rounds.compile(key, shape, fill)
        except DeviceMemoryError:
            self._settle()  # smaller scratch and other shapes have some
            for other in [other for other, kept in self._shapes.items() if kept is not shape]:
                self._drop(other)
            return self._rounds.compile(key, shape, fill)

    def capture(self, one: RoundGraph, now: int) -> None:
        """Makes a graph of a round that came again, if there is room, or some graph has not been used for long."""
        if len(self._captured) >= self._most_graphs:
            oldest = min(self._captured, key=lambda other: other.last)
            if oldest.last > now - STALE:
                return
            self._captured.discard(oldest)
            self._retired.append(RoundGraph.of_graph(oldest))
        self._rounds.capture(one)
        if one.graph is not None:
            self._captured.add(one)

    def remember(self, one: RoundGraph, data: Array, key: tuple[int, ...], asked: object) -> Planned:
        """Keeps a round's data ready to send, for when the same objects ask for it again."""
        size = -(-data.nbytes // 256) * 256
        if self._used + size > PLANNED_BYTES:
            self._settle()  # no copy reads what is overwritten
            self._forget_plans()
        at, self._used = self._used, self._used + size
        self._data[at : at + data.nbytes] = data.view(np.uint8)
        planned = self.planned[key] = Planned(one, self._data.ctypes.data + at, data.nbytes, asked)
        return planned

    def retire(self) -> None:
        """Destroys graphs that are not used any more, while nothing runs, and lets go of what they held.

        Those that keep memory which their lanes have outgrown are captured again when they come again.
        """
        outgrown = sum(lane.network.outgrown for lane in self._lanes)
        if outgrown != self._outgrown:
            self._outgrown, old = outgrown, [one for one in self._captured if one.outgrown]
            self._captured.difference_update(old)
            self._retired += [RoundGraph.of_graph(one) for one in old]
        if not self._retired:
            return
        gone, self._retired = self._retired, []
        self._captured.difference_update(gone)
        graphs = [one.graph for one in gone if one.graph is not None]
        with self._memory.on(self._memory.home):
            release([partial(self._memory.driver, "cuGraphExecDestroy", graph) for graph in graphs])
        with SERIAL:
            for one in gone:
                one.graph, one.held, one.calls, one.prepared = None, [], [], []

    def close(self) -> None:
        """Frees all of it; nothing may run."""
        for key in list(self._shapes):
            self._drop(key)
        self.retire()

    def _plan(self) -> None:
        plans = next(reversed(self._shapes.values())).planned
        self.planned = plans.setdefault(self._timesteps, {})
        plans.move_to_end(self._timesteps)
        if len(plans) > PLANS:
            plans.popitem(last=False)

    def _forget_plans(self) -> None:
        """The data of all rounds is made anew."""
        for shape in self._shapes.values():
            shape.planned.clear()
        self._used = 0
        self._plan()

    def _drop(self, key: object) -> None:
        """Frees what depends on a shape, of which nothing may run any more."""
        shape = self._shapes.pop(key)
        for known in [known for known in self._compiled if known[0] == id(shape)]:
            self._retired.append(self._compiled.pop(known))
        self.retire()
        shape.memory.close()
