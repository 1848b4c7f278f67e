"""Lanes in host memory: slots are rows of one NumPy array, every lane has a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from engines.base import Array, Branch, Entry, Finished, LaneCall, Measurements, Rows, combine
from engines.batches import CachedLane, Lane, Run, SharedCalls, work
from engines.errors import DeviceError, ParameterError
from engines.process import Owner

COMBINED = 4096  # elements of all slots at a time: 33 slots of them are half a megabyte
CLOSED = "the model is closed: load it again"
STRETCH = 256  # elements that are added up in float32
Model = Callable[[Array, Array, Mapping[str, Array]], Array]


@dataclass(frozen=True)
class _Bound:
    """A call that is bound to memory: run it after `timestep` is set and, where slots are apart, rows are gathered."""

    run: Run
    timestep: Array
    gather: tuple[list[int], Array] | None
    scatter: tuple[list[int], Array] | None


class HostBackend:
    """Plays a sampler on lanes in host memory: ONNX Runtime sessions, or plain functions in tests.

    The calling thread works as lane 0, so that a round costs one hand-over per further lane. Networks read drafts from
    their slots and write into slots, without a copy where the slots of a call are neighbours.
    `sibling` is for another image at the same time, on the same lanes and threads. Two of them never use a lane at the
    same time: they take turns, or share calls (`sharing`), for which every lane has a thread and lane 0 gets one, too.
    `played` lists the rounds of the image.
    `mark(part)` is called where a part of the work ends; a benchmark puts a clock in its place.
    """

    def __init__(
        self, lanes: Sequence[Lane], sibling_of: HostBackend | None = None, cached: Sequence[CachedLane] = ()
    ) -> None:
        self._lanes, self._cached = list(lanes), list(cached)
        self._todo: list[SimpleQueue[Run | None]]
        self._todo = sibling_of._todo if sibling_of else [SimpleQueue() for _ in self._lanes[1:]]
        self._done: SimpleQueue[tuple[int, Exception | None]] = SimpleQueue()
        self._number = 0  # of the round: results of a round that was interrupted are told apart by it
        self._closed = False
        self._owner = Owner()
        self._dead: set[int] = sibling_of._dead if sibling_of else set()
        self._shared: SharedCalls = sibling_of._shared if sibling_of else SharedCalls(self._lanes, cached, self._todo)
        self._lender = sibling_of is None
        self._critical, self._spans = 0.0, list[tuple[float, float]]()
        counts = self._shared.counts if self._lender else {}
        self.measurements = Measurements(self._timed, self._critical, self._spans, counts=counts)
        self.mark: Callable[[str], None] = lambda part: None
        own = [] if sibling_of else self._todo
        self._threads = [threading.Thread(target=work, args=(q,), daemon=True) for q in own]
        for thread in self._threads:
            thread.start()
        self._shape: tuple[int, ...] = ()
        self._index: dict[str, int] = {}
        self._features, self._parts = dict[str, Array](), False  # kept ones by slot; whether the last call was in parts
        self._conditioning: list[dict[str, Array]] = []
        self._inputs: dict[tuple[int, ...], dict[str, Array]] = {}
        self._bound: dict[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]], _Bound] = {}

    @property
    def lanes(self) -> int:
        """How many calls can run at the same time."""
        return len(self._lanes)

    def bind(
        self, shape: tuple[int, ...], timesteps: Sequence[float], conditioning: Sequence[Mapping[str, Array]]
    ) -> None:
        """See Backend.bind. Memory stays, and what is bound to it, for as long as shapes stay the same."""
        self.mark("before")
        shapes = [{name: np.shape(value) for name, value in one.items()} for one in conditioning]
        if shape != self._shape or shapes != [{n: v.shape for n, v in one.items()} for one in self._conditioning]:
            self._shape = shape
            self._inputs, self._bound = {}, {}
            self._slots = np.empty((32, int(np.prod(shape))), np.float32)
        self._index, self._features, self._parts = {}, {}, False
        self._timesteps = [float(t) for t in timesteps]
        self._conditioning = [dict(one) for one in conditioning]
        for branches, arrays in self._inputs.items():
            self._fill(branches, arrays)
        self.measurements.spans = self._spans = [(0.0, 0.0)] * len(self._lanes)
        self.played: list[Sequence[LaneCall]] = []

    def write(self, slot: str, value: Array) -> None:
        """See Backend.write."""
        row = self._row(slot)  # first: it may replace the array
        self.mark("python")
        self._slots[row] = value.reshape(-1)
        self.mark("copy")

    def read(self, slot: str) -> Array:
        """See Backend.read."""
        self.mark("python")
        value: Array = self._slots[self._index[slot]].reshape(self._shape).copy()
        self.mark("copy")
        return value

    def runs(self, calls: Sequence[LaneCall]) -> list[tuple[int, Run]]:
        """The bare model calls of a round with their lanes: what a floor is measured with."""
        return [(n, bound.run) for n, bound in self._prepare(calls)]

    def predict(self, calls: Sequence[LaneCall]) -> None:
        """See Backend.predict. The first error of a lane is raised here, after all lanes have stopped.

        The calling thread prepares for all lanes: a lane's thread that touched Python objects would wait for the
        interpreter lock, and its lane would start late.
        """
        self._owner.check()
        if self._closed:
            raise DeviceError(CLOSED)
        busy = self._prepare(calls)
        self.mark("python")
        for _, bound in busy:
            if bound.gather:
                rows, sample = bound.gather
                self._slots.take(rows, 0, out=sample, mode="clip")
        self.mark("copy")
        self._number += 1
        errors: list[Exception | None] = []
        started = 0
        try:
            for n, bound in busy[1:]:
                started += 1
                self._todo[n - 1].put(partial(self._report, self._number, n, bound.run))
            first, bound = busy[0]
            errors.append(self._attempt(first, bound.run))
        finally:  # also on Ctrl-C: a lane still running would write into the next image
            while started:
                number, error = self._done.get()
                if number == self._number:
                    started -= 1
                    errors.append(error)
        for error in errors:
            if error is not None:
                raise error
        self.mark("lanes")
        self._critical += max(self._spans[n][1] - self._spans[n][0] for n, _ in busy)
        self.measurements.critical_path_seconds = self._critical
        self.played.append(calls)
        self.mark("python")
        for _, bound in busy:
            if bound.scatter:
                rows, output = bound.scatter
                self._slots[rows] = output
        self.mark("copy")

    def combine(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        """See Backend.combine. Block by block of elements, which stay in the processor's cache between the two copies.

        The result of a block is complete before any of it is stored, so that in place is safe.
        """
        indices, into = [self._index[slot] for slot in sources], [self._row(slot) for slot in targets]
        chosen, stored = _selection(indices), _selection(into)
        coefficients = np.asarray(rows, np.float32)
        self.mark("python")
        for start in range(0, self._slots.shape[1], COMBINED):
            block = slice(start, start + COMBINED)
            inputs = self._slots[chosen, block]
            self.mark("copy")
            result = combine(inputs, coefficients)
            self.mark("combine")
            self._slots[stored, block] = result
            self.mark("copy")

    def distances(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See Backend.distances."""
        self.mark("python")
        found = []
        for a, b in pairs:
            reference = self._slots[self._index[b]]
            difference = self._slots[self._index[a]] - reference
            error, scale = np.add.reduce(difference * difference), np.add.reduce(reference * reference)
            found.append(float(np.sqrt(error / scale)))
        self.mark("combine")
        return found

    def inner_products(self, products: Sequence[tuple[Sequence[str], Rows]]) -> list[float]:
        """See Backend.inner_products."""
        self.mark("python")
        found: list[float] = []
        for sources, rows in products:
            inputs = self._slots[_selection([self._index[slot] for slot in sources])]
            a, b = combine(inputs, rows)
            found += [_total(a * b), _total(a * a), _total(b * b)]
        self.mark("combine")
        return found

    def _timed(self, calls: Sequence[LaneCall]) -> float:
        before = self._critical
        self.predict(calls)
        return self._critical - before

    def dead(self) -> list[int]:
        """See Backend.dead: lanes whose runtime raised."""
        return sorted(self._dead)

    @property
    def sharing(self) -> HostBackend:
        """See Backend.sharing."""
        return self

    @property
    def kind(self) -> Hashable:
        """See Sharing.kind."""
        first = self._conditioning[0] if self._conditioning else {}
        return (
            self._shape[1:],
            self._parts,
            tuple((name, value.shape[1:], value.dtype.str) for name, value in first.items()),
        )

    def entries(self, branches: Sequence[Branch]) -> list[Entry]:
        """See Sharing.entries: views of slots."""
        self._owner.check()
        if self._closed:
            raise DeviceError(CLOSED)
        outputs = [self._row(branch.output) for branch in branches]  # first: it may replace the array
        self._parts = _in_parts(branches)
        return [
            Entry(
                self._slots[self._index[branch.latent]].reshape(self._shape), self._timesteps[branch.step],
                self._conditioning[branch.conditioning], self._slots[output].reshape(self._shape),
                self._room(branch.keep) if branch.keep else None,
                tuple((self._features[slot], weight) for slot, weight in branch.features),
            )
            for branch, output in zip(branches, outputs, strict=True)
        ]  # fmt: skip

    def _room(self, slot: str) -> Array:
        """Where features of all images are kept."""
        if slot not in self._features:
            self._features[slot] = np.empty(self._cached[0].features(self._shape), np.float32)
        return self._features[slot]

    def _prepare_parts(self, calls: Sequence[LaneCall]) -> list[tuple[int, _Bound]]:
        """As `_prepare`, for calls of a denoiser in two parts: rows are copied, as those of shared calls are."""
        self.entries([branch for call in calls for branch in call])  # first: it may replace the array
        return [
            (n, _Bound(partial(self._shared.run, n, self.entries(call)), np.empty(0, np.float32), None, None))
            for n, call in enumerate(calls)
            if call
        ]

    def start(self, lane: int, entries: Sequence[Entry], finished: Finished) -> None:
        """See Sharing.start."""

        def ended(span: tuple[float, float], error: Exception | None) -> None:
            if isinstance(error, DeviceError):
                self._dead.add(lane)
            finished(span, error)

        self._shared.start(lane, entries, ended)

    def note(self, calls: Sequence[LaneCall], spans: Mapping[int, tuple[float, float]]) -> None:
        """See Sharing.note. The critical path is that of the lane that took longest."""
        for lane, span in spans.items():
            self._spans[lane] = span
        self._critical += max(end - start for start, end in spans.values())
        self.measurements.critical_path_seconds = self._critical
        self.played.append(calls)

    def sibling(self) -> HostBackend:
        """Another backend on the same lanes and threads, to be closed before this one."""
        return HostBackend(self._lanes, self, self._cached)

    def settle(self) -> None:
        """See Backend.settle: `predict` has waited."""

    def close(self) -> None:
        """Stops the lanes' threads and waits for them."""
        self._closed = True
        self._bound, self._inputs, self._shape = {}, {}, ()  # calls hold the lanes' sessions
        self._slots, self._conditioning, self._features = np.empty((0, 0), np.float32), [], {}
        for todo, thread in zip(self._todo, self._threads, strict=False):  # none of those that are another backend's
            todo.put(None)
            thread.join()
        if self._lender:
            self._shared.close()

    def _row(self, slot: str) -> int:
        row = self._index.setdefault(slot, len(self._index))
        if row == len(self._slots):
            self._slots = np.concatenate([self._slots, np.empty_like(self._slots)])
            self._bound.clear()  # it reads and writes the array before
        return row

    def _prepare(self, calls: Sequence[LaneCall]) -> list[tuple[int, _Bound]]:
        """The calls of a round, bound to memory and with their timesteps set."""
        if any(map(_in_parts, calls)):
            return self._prepare_parts(calls)
        wanted = [
            (
                n,
                tuple(self._index[branch.latent] for branch in call),
                tuple(self._row(branch.output) for branch in call),
                call,
            )
            for n, call in enumerate(calls)
            if call
        ]
        busy, images = [], self._shape[0]
        for n, latents, outputs, call in wanted:
            key = (n, latents, outputs, tuple(branch.conditioning for branch in call))
            bound = self._bound.get(key) or self._bound.setdefault(key, self._bind(*key))
            for row, branch in enumerate(call):
                bound.timestep[row * images : (row + 1) * images] = self._timesteps[branch.step]
            busy.append((n, bound))
        return busy

    def _bind(self, n: int, latents: Sequence[int], outputs: Sequence[int], branches: tuple[int, ...]) -> _Bound:
        """Binds a call to the slots themselves where they are neighbours, else to memory of its own."""
        count, batch = len(branches), len(branches) * self._shape[0]
        if branches not in self._inputs:
            self._inputs[branches] = {
                name: np.empty((batch, *value.shape[1:]), value.dtype)
                for name, value in self._conditioning[branches[0]].items()
            }
            self._fill(branches, self._inputs[branches])

        def rows(indices: Sequence[int]) -> tuple[Array, tuple[list[int], Array] | None]:
            if _neighbours(indices):
                return self._slots[indices[0] : indices[0] + count], None
            own = np.empty((count, self._slots.shape[1]), np.float32)
            return own, (list(indices), own)

        sample, gather = rows(latents)
        output, scatter = rows(outputs)
        shape = (batch, *self._shape[1:])
        timestep = np.zeros(batch, np.float32)
        inputs = {"sample": sample.reshape(shape), "timestep": timestep, **self._inputs[branches]}
        return _Bound(self._lanes[n].bind(inputs, output.reshape(shape)), timestep, gather, scatter)

    def _fill(self, branches: Sequence[int], arrays: Mapping[str, Array]) -> None:
        """Sets the conditioning of a batch: one block of images per branch."""
        images = self._shape[0]
        for row, branch in enumerate(branches):
            for name, value in self._conditioning[branch].items():
                arrays[name][row * images : (row + 1) * images] = value

    def _report(self, number: int, n: int, run: Run) -> None:
        self._done.put((number, self._attempt(n, run)))

    def _attempt(self, n: int, run: Run) -> Exception | None:
        start = time.perf_counter()
        try:
            run()
        except Exception as error:  # noqa: BLE001 - carried to the calling thread and raised there
            if isinstance(error, DeviceError):
                self._dead.add(n)
            return error
        self._spans[n] = (start, time.perf_counter())
        return None


def _in_parts(branches: LaneCall) -> bool:
    """Whether a call is one of a denoiser in two parts; all calls of a round are of one kind."""
    return bool(branches) and bool(branches[0].keep or branches[0].features)


def _total(values: Array) -> float:
    """The sum: of stretches in float32, of those in float64."""
    return float(np.add.reduceat(values, np.arange(0, values.size, STRETCH)).sum(dtype=np.float64))


def _selection(rows: list[int]) -> slice | list[int]:
    """An index of rows: one that makes a view where they are neighbours."""
    return slice(rows[0], rows[0] + len(rows)) if _neighbours(rows) else rows


def _neighbours(rows: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(rows))


class FunctionLane:
    """A Python function as a model: `model(sample, timestep, conditioning) → output`, in batches."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def bind(self, inputs: Mapping[str, Array], output: Array) -> Run:
        """Calls the function on the arrays."""
        conditioning = {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}

        def run() -> None:
            result = np.asarray(self._model(inputs["sample"], inputs["timestep"], conditioning))
            if result.shape != output.shape:
                raise ParameterError(
                    "model", f"the model must return one output per state, {output.shape}, not {result.shape}"
                )
            output[...] = result

        return run
