"""How far the lanes are, told by numbers that kernels write into host memory: read without a driver call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

AHEAD_SECONDS = 0.02  # of work that the host may enqueue before it is needed: lanes are given back after so much
MOST_AHEAD = 8  # rounds
_MASK = (1 << 32) - 1


class Issued(Protocol):
    """What a round is to the count: the numbers of its lanes."""

    @property
    def numbers(self) -> Sequence[int]:
        """The lanes that have a call in it."""


class Progress:
    """Word 0 of `words` counts rounds that have begun, their combinations being done; word 1 + n the calls of lane n.

    Rounds end in order, so that these numbers say which lane a round is waiting for. Nothing here calls the driver, and
    any thread may ask.
    """

    def __init__(self, words: NDArray[np.uint32]) -> None:
        self._words = memoryview(words)  # type: ignore[arg-type]
        self._base = list(self._words)
        self._rounds: list[Issued] = []
        self._expected = 0
        self._seen, self._since = 0, time.perf_counter()
        self._paced, self._paced_at, self._pace = 0, 0.0, 0.0
        self.issued = 0

    def restart(self) -> None:
        """Nothing is under way: counts from here."""
        self._base, self._rounds, self._expected = list(self._words), [], 0
        self.issued = self._paced = 0

    def issue(self, one: Issued) -> None:
        """A round was enqueued."""
        self._since = time.perf_counter()
        self._rounds.append(one)
        self._expected += 1 + len(one.numbers)
        self.issued += 1

    @property
    def waiting(self) -> int:
        """Rounds that were enqueued and have not begun."""
        return self.issued - ((self._words[0] - self._base[0]) & _MASK)

    def allowed(self) -> int:
        """How many rounds may wait: as many as the device does in AHEAD_SECONDS, by how fast it went so far."""
        begun = self.issued - self.waiting
        if begun > self._paced:
            now = time.perf_counter()
            if self._paced:
                pace = (now - self._paced_at) / (begun - self._paced)
                self._pace = min(pace, 1.2 * self._pace) if self._pace else pace
            self._paced, self._paced_at = begun, now
        return max(1, min(MOST_AHEAD, int(AHEAD_SECONDS / self._pace))) if self._pace else 2

    def stalled(self) -> float:
        """Seconds since anything began or ended, as far as was looked; 0 when nothing is under way."""
        done = sum((word - base) & _MASK for word, base in zip(self._words, self._base, strict=True))
        now = time.perf_counter()
        if done != self._seen:
            self._seen, self._since = done, now
        return now - self._since if done < self._expected else 0.0

    def late(self) -> list[int]:
        """The lanes that the round under way is waiting for; none when it is not theirs, or nothing is under way."""
        begun = self.issued - self.waiting
        asked = [0] * (len(self._words) - 1)
        for one in self._rounds[:begun]:
            for lane in one.numbers:
                asked[lane] += 1
        return [n for n, count in enumerate(asked) if (self._words[n + 1] - self._base[n + 1]) & _MASK < count]
