"""The floor: what the model calls of an image cost by themselves.

The placement of a real run is recorded and replayed as bare calls on the same lanes, with a barrier after each round
and nothing else: no gathering, no combining, no schedule. No engine that makes the same calls can be faster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

from engines.base import Call
from engines.host import Lane
from engines.null import NullBackend
from runtime.execute import execute, planned
from runtime.samplers import STATE
from runtime.schedule import Schedule


class _Recorder(NullBackend):
    """Notes the batch size of every call."""

    def predict(self, calls: Sequence[Call]) -> None:
        """One round: halves per lane."""
        super().predict(calls)
        self.rounds_seen.append([len(call) for call in calls])

    rounds_seen: list[list[int]]


def placement(schedule: Schedule, mode: str, k: int, lanes: int, guidance_scale: float) -> list[list[int]]:
    """Per round and lane, how many halves the engine runs there in one call."""
    recorder = _Recorder(lanes)
    recorder.rounds_seen = []
    recorder.bind((1,), schedule.timesteps, ())
    recorder.written.add(STATE)
    execute(planned(mode, schedule, k, lanes, guidance_scale), recorder, lambda finished: None)
    return recorder.rounds_seen


def replay(lanes: Sequence[Lane], rounds: Sequence[Sequence[int]]) -> float:
    """Seconds for the calls alone. Lane 0 runs on the calling thread, as in the engine."""
    for lane, batches in zip(lanes, zip(*rounds, strict=True), strict=True):
        for batch in set(batches) - {0}:
            lane.inputs(batch)  # memory is bound before the clock starts
    arrivals: list[SimpleQueue[None]] = [SimpleQueue() for _ in lanes]

    def play(number: int) -> None:
        for batches in rounds:
            if batches[number]:
                lanes[number].run(batches[number])
            for other in range(len(lanes)):  # the barrier: tell everyone, hear from everyone
                if other != number:
                    arrivals[other].put(None)
            for _ in range(len(lanes) - 1):
                arrivals[number].get()

    threads = [Thread(target=play, args=(number,)) for number in range(1, len(lanes))]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    play(0)
    seconds = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return seconds
