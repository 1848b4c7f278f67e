"""What each lane did when: recorded during one denoising loop, on request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from engines.base import Backend, Branch, LaneCall
from runtime.sampling.place import Play

P = ParamSpec("P")
R = TypeVar("R")
SHORTEST = 1e-4  # seconds; a callback that only counts is not worth an entry


@dataclass(frozen=True)
class Span:
    """One thing that took time, in seconds since the denoising began; both None where the host does not wait for it.

    kind: `call`, a run of the network on a lane; `combine`, which refines a round and makes the next drafts;
    `distances` and `inner products`, which a sampler measures; `callback`, what the caller does between rounds,
    such as a preview.
    round: counted from 1; what happens between two rounds has the number of the first. steps: counted from 0.
    """

    kind: str
    round: int
    start: float | None
    end: float | None
    lane: int | None = None
    steps: tuple[int, ...] = ()
    branches: int = 0


class Timeline:
    """The spans of one denoising loop, in the order in which they ended."""

    def __init__(self, backend: Backend) -> None:
        self.spans: list[Span] = []
        self._backend, self._round, self._zero = backend, 0, time.perf_counter()

    def rounds(self, play: Play) -> Play:
        """What plays rounds and returns their calls by lane, with the calls noted."""

        def noted(branches: Sequence[Branch]) -> Sequence[LaneCall]:
            calls = play(branches)
            self._round += 1
            times = self._backend.measurements.spans
            for lane, call in enumerate(calls):
                if call:
                    start, end = times[lane] if times is not None else (None, None)
                    self._note("call", start, end, lane, tuple(sorted({branch.step for branch in call})), len(call))
            return calls

        return noted

    def timed(self, kind: str, function: Callable[P, R], shortest: float = 0.0) -> Callable[P, R]:
        """The function, noted whenever it takes at least so many seconds."""

        def noted(*args: P.args, **kwargs: P.kwargs) -> R:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            end = time.perf_counter()
            if end - start >= shortest:
                self._note(kind, *((None, None) if self._backend.measurements.spans is None else (start, end)))
            return result

        return noted

    def _note(
        self, kind: str, start: float | None, end: float | None, lane: int | None = None, steps: tuple[int, ...] = (),
        branches: int = 0,
    ) -> None:  # fmt: skip
        if start is not None and end is not None:
            start, end = start - self._zero, end - self._zero
        self.spans.append(Span(kind, self._round, start, end, lane, steps, branches))
