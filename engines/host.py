"""Lanes in host memory: slots are rows of one NumPy array, every lane has a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from engines.base import Array, Call, Rows, combine

Model = Callable[[Array, Array, Mapping[str, Array]], Array]


class Lane(Protocol):
    """One compiled model. Its input arrays are its own and are filled before every run."""

    def inputs(self, batch: int) -> Mapping[str, Array]:
        """The arrays to fill for a batch: `sample`, `timestep`, and the conditioning by name."""

    def run(self, batch: int) -> Array:
        """Runs the network on the filled inputs; the result is valid until the next run."""


class HostBackend:
    """Plays a sampler on lanes in host memory: ONNX Runtime sessions, or plain functions in tests.

    The calling thread works as lane 0, so that a round costs one hand-over per further lane.
    `critical` adds up the seconds of the longest call of every round.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = list(lanes)
        self._todo: list[SimpleQueue[int | None]] = [SimpleQueue() for _ in self._lanes[1:]]
        self._done: SimpleQueue[Exception | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(n,), daemon=True, name=f"lane-{n}")
            for n in range(1, len(self._lanes))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def lanes(self) -> int:
        """How many calls can run at the same time."""
        return len(self._lanes)

    def bind(
        self, shape: tuple[int, ...], timesteps: Sequence[float], conditioning: Sequence[Mapping[str, Array]]
    ) -> None:
        """See Backend.bind."""
        self._shape = shape
        self._timesteps = np.asarray(timesteps, np.float32)
        self._conditioning = list(conditioning)
        self._filled: list[dict[int, tuple[int, ...]]] = [{} for _ in self._lanes]
        self._index: dict[str, int] = {}
        self._slots = np.empty((16, int(np.prod(shape))), np.float32)
        self._last = [0.0] * len(self._lanes)
        self._outputs = [self._slots] * len(self._lanes)
        self.critical = 0.0

    def write(self, slot: str, value: Array) -> None:
        """See Backend.write."""
        index = self._slot(slot)  # first: it may replace the array
        self._slots[index] = value.reshape(-1)

    def read(self, slot: str) -> Array:
        """See Backend.read."""
        value: Array = self._slots[self._index[slot]].reshape(self._shape).copy()
        return value

    def predict(self, calls: Sequence[Call]) -> None:
        """See Backend.predict. The first error of a lane is raised here, after all lanes have stopped.

        The calling thread gathers and scatters for all lanes: a lane's thread that touched Python objects would wait
        for the interpreter lock, and its lane would start late.
        """
        busy = [(n, call) for n, call in enumerate(calls) if call]
        for n, call in busy:
            self._fill(n, call)
        images = self._shape[0]
        for n, call in busy[1:]:
            self._todo[n - 1].put(len(call) * images)
        try:
            first, call = busy[0]
            errors = [self._attempt(first, len(call) * images)]
        finally:  # also on Ctrl-C: a lane still running would write into the next image
            late = [self._done.get() for _ in busy[1:]]
        for error in errors + late:
            if error is not None:
                raise error
        self.critical += max(self._last[n] for n, _ in busy)
        for n, call in busy:
            indices = [self._slot(half.output) for half in call]
            self._slots[indices] = self._outputs[n].reshape(len(call), -1)

    def combine(self, sources: Sequence[str], rows: Rows, targets: Sequence[str]) -> None:
        """See Backend.combine. The result is complete before any of it is stored, so that in place is safe."""
        result = combine(self._gather([self._index[slot] for slot in sources]), rows)
        indices = [self._slot(slot) for slot in targets]
        self._slots[indices] = result

    def distance(self, a: str, b: str) -> float:
        """See Backend.distance."""
        reference = self._slots[self._index[b]]
        difference = self._slots[self._index[a]] - reference
        return float(np.sqrt(np.sum(difference * difference) / np.sum(reference * reference)))

    def close(self) -> None:
        """Stops the lanes' threads and waits for them."""
        for todo in self._todo:
            todo.put(None)
        for thread in self._threads:
            thread.join()

    def _gather(self, indices: list[int]) -> Array:
        """Slots as rows of one array: a view where they are neighbours, which they mostly are, else a copy."""
        first = indices[0]
        if indices == list(range(first, first + len(indices))):
            return self._slots[first : first + len(indices)]
        copied: Array = self._slots[indices]
        return copied

    def _slot(self, name: str) -> int:
        index = self._index.setdefault(name, len(self._index))
        if index == len(self._slots):
            self._slots = np.concatenate([self._slots, np.empty_like(self._slots)])
        return index

    def _work(self, n: int) -> None:
        while (batch := self._todo[n - 1].get()) is not None:
            self._done.put(self._attempt(n, batch))

    def _attempt(self, n: int, batch: int) -> Exception | None:
        start = time.perf_counter()
        try:
            self._outputs[n] = self._lanes[n].run(batch)
        except Exception as error:  # noqa: BLE001 - carried to the calling thread and raised there
            return error
        self._last[n] = time.perf_counter() - start
        return None

    def _fill(self, n: int, call: Call) -> None:
        """Gathers the inputs of one call into the lane's own memory."""
        images = self._shape[0]
        batch = len(call) * images
        inputs = self._lanes[n].inputs(batch)
        rows = inputs["sample"].reshape(len(call), -1)
        self._slots.take([self._index[half.latent] for half in call], 0, out=rows, mode="clip")
        inputs["timestep"][:] = self._timesteps[[half.step for half in call for _ in range(images)]]
        self._fill_conditioning(n, batch, tuple(half.conditioning for half in call), inputs)

    def _fill_conditioning(self, n: int, batch: int, wanted: tuple[int, ...], inputs: Mapping[str, Array]) -> None:
        """Copies embeddings in only when this batch size last saw another order of halves."""
        if self._filled[n].get(batch) == wanted:
            return
        images = self._shape[0]
        for row, conditioning in enumerate(wanted):
            for name, value in self._conditioning[conditioning].items():
                inputs[name][row * images : (row + 1) * images] = value
        self._filled[n][batch] = wanted


class FunctionLane:
    """A Python function as a model, for tests and for models that are not networks.

    `model(sample, timestep, conditioning) → ε` takes batches.
    """

    def __init__(self, model: Model, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        self._shapes = shapes
        self._inputs: dict[int, dict[str, Array]] = {}

    def inputs(self, batch: int) -> Mapping[str, Array]:
        """Arrays of the given shapes, one set per batch size."""
        if batch not in self._inputs:
            self._inputs[batch] = {n: np.zeros((batch, *s), np.float32) for n, s in self._shapes.items()}
        return self._inputs[batch]

    def run(self, batch: int) -> Array:
        """Calls the function."""
        rest = dict(self._inputs[batch])
        return self._model(rest.pop("sample"), rest.pop("timestep"), rest)
