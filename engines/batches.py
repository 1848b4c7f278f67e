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
FeatureShape = Callable[[tuple[int, ...]], tuple[int, ...]]


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
        key = rows, first.sample.shape[1:], inputs  # which say the output's shape
        batch = self._kept.get(key)
        if batch is None:
            sample = np.empty((rows, *first.sample.shape[1:]), np.float32)
            timestep, output = np.empty(rows, np.float32), np.empty((rows, *first.output.shape[1:]), np.float32)
            own = {name: np.empty((rows, *value.shape[1:]), value.dtype) for name, value in first.conditioning.items()}
            run = self._lane.bind({"sample": sample, "timestep": timestep, **own}, output)
            batch = self._kept[key] = Batch(sample, timestep, own, output, run, [None] * rows)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return batch


@dataclass(frozen=True)
class CachedLane:
    """A lane's denoiser in two parts. `features` is the shape of features for a shape of latents."""

    deep: Lane
    shallow: Lane
    features: FeatureShape


class CachedBatches:
    """The calls of one lane, used by one thread."""

    def __init__(self, lane: CachedLane) -> None:
        self._deep, self._shallow = Batches(lane.deep), Batches(lane.shallow)

    def run(self, entries: Sequence[Entry]) -> None:
        """One call of the deep part for entries that keep features, then one of the shallow part for all."""
        own = [one for one in entries if one.keep is not None]
        if own:
            self._deep.run([one._replace(output=one.keep) for one in own if one.keep is not None])
        self._shallow.run([self._with_features(one) for one in entries])

    @staticmethod
    def _with_features(entry: Entry) -> Entry:
        features = entry.keep if entry.keep is not None else _weighted(entry.features)
        return entry._replace(conditioning={**entry.conditioning, "features": features})

    def __len__(self) -> int:
        return len(self._deep) + len(self._shallow)

    def close(self) -> None:
        """Frees what is bound."""
        self._deep.close()
        self._shallow.close()


def _weighted(features: Sequence[tuple[Array, float]]) -> Array:
    """Σ weight · features."""
    (first, weight), *others = features
    if not others and weight == 1:
        return first
    total: Array = first * np.float32(weight)
    for value, factor in others:
        total += value * np.float32(factor)
    return total


class SharedCalls:
    """Calls of several images on lanes in host memory, each on the thread of its lane.

    `cached` are their denoisers in two parts, where there are such. `todo` are the queues of the threads of lanes 1, 2,
    …; the thread of lane 0 is started when it is first needed: an image that is alone plays lane 0 on its caller's
    thread.
    """

    def __init__(
        self, lanes: Sequence[Lane], cached: Sequence[CachedLane], todo: Sequence[SimpleQueue[Run | None]]
    ) -> None:
        self._batches = [Batches(lane) for lane in lanes]
        self._cached = [CachedBatches(lane) for lane in cached]
        self._first: SimpleQueue[Run | None] = SimpleQueue()
        self._todo = [self._first, *todo]
        self._thread: threading.Thread | None = None
        self.counts = {"batches": 0}  # bound, on all lanes

    def start(self, lane: int, entries: Sequence[Entry], finished: Finished) -> None:
        """See Sharing.start. Only one thread at a time may call it."""
        if lane == 0 and self._thread is None:
            self._thread = threading.Thread(target=work, args=(self._first,), daemon=True)
            self._thread.start()
        self._todo[lane].put(partial(self._run, lane, entries, finished))

    def run(self, lane: int, entries: Sequence[Entry]) -> None:
        """Runs entries of one kind as one call, on the calling thread."""
        parts = entries[0].keep is not None or entries[0].features
        (self._cached if parts else self._batches)[lane].run(entries)

    def _run(self, lane: int, entries: Sequence[Entry], finished: Finished) -> None:
        start, error = time.perf_counter(), None
        try:
            self.run(lane, entries)
        except Exception as caught:  # noqa: BLE001 - carried to the threads of the images and raised there
            error = caught
        self.counts["batches"] = sum(map(len, self._batches)) + sum(map(len, self._cached))
        finished((start, time.perf_counter()), error)

    def close(self) -> None:
        """Ends the thread of lane 0; those of others have ended."""
        if self._thread is not None:
            self._first.put(None)
            self._thread.join()
        for batches in self._batches:
            batches.close()
        for cached in self._cached:
            cached.close()


def work(todo: SimpleQueue[Run | None]) -> None:
    """A lane's thread: runs what is put into the queue until None comes."""
    while (job := todo.get()) is not None:
        job()
