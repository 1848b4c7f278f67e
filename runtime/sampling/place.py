"""Where the calls of a round run: one rule for every sampler and every machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from engines.base import Backend, Branch, LaneCall

Play = Callable[[Sequence[Branch]], Sequence[LaneCall]]  # runs the branches of a round; returns the calls by lane


@lru_cache(maxsize=4096)
def place(branches: tuple[Branch, ...], held: Sequence[int], lanes: int) -> tuple[LaneCall, ...]:
    """Deals a round's branches evenly over the lanes held, of so many, in order: one call per lane, empty on others.

    With enough lanes each branch has one of its own, a lone guided evaluation uses two, and one lane gets one batch.
    The same round gives the same object, by which a backend knows it again.
    """
    calls: list[LaneCall] = [()] * lanes
    share, extra = divmod(len(branches), len(held))
    start = 0
    for lane in held:
        end = start + share
        if extra:
            end, extra = end + 1, extra - 1
        calls[lane] = branches[start:end]
        start = end
    return tuple(calls)


def on_all_lanes(backend: Backend) -> Play:
    """Rounds on a backend that nobody shares."""
    predict, lanes = backend.predict, backend.lanes
    held = range(lanes)

    def play(branches: Sequence[Branch]) -> Sequence[LaneCall]:
        calls = place(tuple(branches), held, lanes)
        predict(calls)
        return calls

    return play
