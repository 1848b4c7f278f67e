"""The floor: the time of an image's model calls alone.

The rounds of a real image are replayed as bare calls on the same lanes and memory, with a barrier after each round and
nothing else: no copies, no combinations, no schedule. No engine that makes the same calls can be faster.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

from engines.base import Backend, LaneCall
from engines.host import HostBackend
from runtime.sampling.operations import STATE


def replay(backend: HostBackend) -> float:
    """Seconds for the calls of the last image alone. Lane 0 runs on the calling thread, as in the engine."""
    rounds = [dict(backend.runs(calls)) for calls in backend.played]
    arrivals: list[SimpleQueue[None]] = [SimpleQueue() for _ in range(backend.lanes)]

    def play(number: int) -> None:
        for runs in rounds:
            if number in runs:
                runs[number]()
            for other in range(backend.lanes):  # the barrier
                if other != number:
                    arrivals[other].put(None)
            for _ in range(backend.lanes - 1):
                arrivals[number].get()

    threads = [Thread(target=play, args=(number,)) for number in range(1, backend.lanes)]
    for thread in threads:
        thread.start()
    start = time.perf_counter()
    play(0)
    seconds = time.perf_counter() - start
    for thread in threads:
        thread.join()
    return seconds


def enqueued(backend: Backend, rounds: Sequence[Sequence[LaneCall]]) -> float:
    """Seconds for the calls of the last image alone on lanes ordered by events, as GPUs are, without combinations."""
    backend.read(STATE)  # idle
    start = time.perf_counter()
    for calls in rounds:
        backend.predict(calls)
    backend.read(STATE)
    return time.perf_counter() - start
