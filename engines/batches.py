"""Model calls with branches of several images: rows are copied into a batch, and its outputs to where they belong."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from engines.base import Array, Entry, Finished

KEPT = 16  # batches per lane, of as many numbers of rows and kinds; the one that was used longest ago goes
Run = Callable[[], None]


class Lane(Protocol):
    """One compiled model."""

    def bind(self, inputs: Mapping[str, Array], output: Array) -> Run:
        """What runs the network once, in place, on `sample`, `timestep` and the conditioning by name."""


@dataclass(frozen=True)
class Batch:
    """A bound call. `filled` says whose conditioning is in each row: the arrays by name, and the row of theirs."""

    sample: Array
    timestep: Array
    conditioning: Mapping[str, Array]
    output: Array
    run: Run
    filled: list[tuple[Mapping[str, Array], int] | None]


class Batches:
    """The batches of one lane, used by one thread."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._kept: OrderedDict[tuple[object, ...], Batch] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def close(self) -> None:
        """Frees them: they hold the lane's session."""
        self._kept.clear()

    def run(self, entries: Sequence[Entry]) -> None:
        """One call of entries of the same kind, each with one row per image."""
        batch, row = self._batch(entries), 0
        for entry in entries:
            rows = slice(row, row + len(entry.sample))
            batch.sample[rows], batch.timestep[rows] = entry.sample, entry.timestep
            wanted = [(entry.conditioning, n) for n in range(len(entry.sample))]
            if any(
                there is None or there[0] is not here[0] or there[1] != here[1]
                for there, here in zip(batch.filled[rows], wanted, strict=True)
            ):
                for name, value in entry.conditioning.items():
                    batch.conditioning[name][rows] = value
                batch.filled[rows] = wanted
            row = rows.stop
        batch.run()
        row = 0
        for entry in entries:
            entry.output[...] = batch.output[row : row + len(entry.output)]
            row += len(entry.output)

    def _batch(self, entries: Sequence[Entry]) -> Batch:
        first, rows = entries[0], sum(len(entry.sample) for entry in entries)
        inputs = tuple((name, value.shape[1:], value.dtype.str) for name, value in first.conditioning.items())
        key = rows, first.sample.shape[1:], inputs
        batch = self._kept.get(key)
        if batch is None:
            sample = np.empty((rows, *first.sample.shape[1:]), np.float32)
            timestep, output = np.empty(rows, np.float32), np.empty_like(sample)
            own = {name: np.empty((rows, *value.shape[1:]), value.dtype) for name, value in first.conditioning.items()}
            run = self._lane.bind({"sample": sample, "timestep": timestep, **own}, output)
            batch = self._kept[key] = Batch(sample, timestep, own, output, run, [None] * rows)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return batch


class SharedCalls:
    """Calls of several images on lanes in host memory, each on the thread of its lane.

    `todo` are the queues of the threads of lanes 1, 2, …; the thread of lane 0 is started when it is first needed: an
    image that is alone plays lane 0 on its caller's thread.
    """

    def __init__(self, lanes: Sequence[Lane], todo: Sequence[SimpleQueue[Run | None]]) -> None:
        self._batches = [Batches(lane) for lane in lanes]
        self._first: SimpleQueue[Run | None] = SimpleQueue()
        self._todo = [self._first, *todo]
        self._thread: threading.Thread | None = None
        self.counts = {"batches": 0}  # bound, on all lanes

    def start(self, lane: int, entries: Sequence[Entry], finished: Finished) -> None:
        """See Sharing.start. Only one thread at a time may call it."""
        if lane == 0 and self._thread is None:
            self._thread = threading.Thread(target=work, args=(self._first,), daemon=True)
            self._thread.start()
        self._todo[lane].put(partial(self._run, self._batches[lane], entries, finished))

    def _run(self, batches: Batches, entries: Sequence[Entry], finished: Finished) -> None:
        start, error = time.perf_counter(), None
        try:
            batches.run(entries)
        except Exception as caught:  # noqa: BLE001 - carried to the threads of the images and raised there
            error = caught
        self.counts["batches"] = sum(map(len, self._batches))
        finished((start, time.perf_counter()), error)

    def close(self) -> None:
        """Ends the thread of lane 0; those of others have ended."""
        if self._thread is not None:
            self._first.put(None)
            self._thread.join()
        for batches in self._batches:
            batches.close()


def work(todo: SimpleQueue[Run | None]) -> None:
    """A lane's thread: runs what is put into the queue until None comes."""
    while (job := todo.get()) is not None:
        job()
