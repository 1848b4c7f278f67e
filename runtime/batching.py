"""Rounds of several requests in shared model calls.

Every request plays its rounds on a thread of its own. A lane that becomes free takes branches of the rounds that wait,
in the order in which their requests asked for them, as one call. So requests join and leave at any round, whatever
their samplers, and the rule of fairness is: of two running requests, neither waits for a second round of the other
before it gets its own. That holds among requests of equal priority; rounds of a lower number are dealt before all
others that wait. A request that runs alone plays its rounds itself, on all lanes.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial

from engines.base import Backend, Branch, Entry, LaneCall, Sharing
from runtime.lane_policy import BatchSizes
from runtime.sampling.place import place

PATIENCE = 0.1  # of its last call that a lane waits for requests that are between two rounds


@dataclass(eq=False)
class Player:
    """A request that runs: its latents are in `backend`, and it has at most `most` lanes at a time.

    rows: of its last round, one per branch and image; before the first, what it expects. between: since when it has
    been between two rounds, or None while one waits or runs. shared_rounds: those played while others ran.
    """

    backend: Backend
    sharing: Sharing
    most: int
    sizes: BatchSizes
    rows: float
    between: float | None
    ended: threading.Condition
    priority: int = 5
    kind: Hashable = None
    waiting: deque[tuple[Branch, Entry]] = field(default_factory=deque)
    calls: list[list[Branch]] = field(default_factory=list)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    on: set[int] = field(default_factory=set)  # lanes that run a part of the round
    error: Exception | None = None
    shared_rounds: int = 0

    def begin(self, branches: Sequence[Branch], entries: Sequence[Entry], lanes: int) -> None:
        """The next round."""
        self.kind, self.between, self.error, self.spans = self.sharing.kind, None, None, {}
        self.waiting.extend(zip(branches, entries, strict=True))
        self.rows = sum(len(entry.sample) for entry in entries)
        self.calls = [[] for _ in range(lanes)]

    def may_use(self, lane: int) -> bool:
        """Whether it may have a call on the lane now."""
        return lane not in self.on and len(self.on) < self.most

    @property
    def playing(self) -> bool:
        """Whether some of its round waits or runs."""
        return bool(self.waiting or self.on)


@dataclass(eq=False)
class SharedCall:
    """What a lane runs for several players."""

    started: float
    rows: int
    players: list[Player]


class Batcher:
    """Deals the rounds of all players over lanes. `busy(lane, seconds)` is called after every shared call."""

    def __init__(self, count: int, busy: Callable[[int, float], None]) -> None:
        self.count, self._busy = count, busy
        self._lock = threading.RLock()
        self._players: list[Player] = []
        self._waiting: deque[Player] = deque()  # by priority, then in the order of their rounds
        self._running: list[SharedCall | None] = [None] * count
        self._last = [0.0] * count  # seconds of the last call
        self._alone: tuple[Player, float] | None = None  # plays a round by itself, and since when
        self.calls = self.rows = 0  # of all shared calls

    def join(self, backend: Backend, most: int, sizes: BatchSizes, rows: float, priority: int = 5) -> Player:
        """A request begins; its first round is expected to have so many rows."""
        sharing = backend.sharing
        assert sharing is not None
        now, ended = time.monotonic(), threading.Condition(self._lock)
        player = Player(backend, sharing, min(most, self.count), sizes, rows, now, ended, priority)
        with self._lock:
            self._players.append(player)
        return player

    def leave(self, player: Player) -> None:
        """A request ends, between two rounds: nobody waits for its next one any more."""
        with self._lock:
            self._players.remove(player)
            self._continue()

    def play(self, player: Player, branches: Sequence[Branch]) -> Sequence[LaneCall]:
        """Plays a round and returns the player's branches by lane. Raises the first error of the calls with them."""
        with self._lock:
            alone = len(self._players) == 1  # then no lane runs anything
            if alone:
                self._alone = player, time.monotonic()
        if not alone:
            return self._play_together(player, branches)
        try:
            calls = place(tuple(branches), range(player.most), self.count)
            player.backend.predict(calls)
        finally:
            with self._lock:
                self._alone, player.between = None, time.monotonic()
                self._continue()
        spans = player.backend.measurements.spans
        assert spans is not None, "calls are shared where the host waits for them"
        for lane, call in enumerate(calls):
            if call:
                self._busy(lane, spans[lane][1] - spans[lane][0])
        return calls

    def overdue(self, seconds: float) -> set[int]:
        """Lanes whose call has not ended for longer than that."""
        now = time.monotonic()
        with self._lock:
            late = {lane for lane, call in enumerate(self._running) if call and now - call.started > seconds}
            if self._alone is not None and now - self._alone[1] > seconds:
                late |= set(range(self._alone[0].most))
        return late

    def _play_together(self, player: Player, branches: Sequence[Branch]) -> Sequence[LaneCall]:
        entries = player.sharing.entries(branches)
        with self._lock:
            player.begin(branches, entries, self.count)
            insort(self._waiting, player, key=lambda one: one.priority)
            try:
                while player.playing:
                    player.ended.wait(self._deal() if player.waiting or player.on else None)
            finally:  # also on Ctrl-C: what still runs would write into the next image
                self._withdraw(player)
                while player.on:
                    player.ended.wait()
                player.between = time.monotonic()
        if player.error is not None:
            raise player.error
        player.shared_rounds += 1
        calls = tuple(tuple(call) for call in player.calls)
        player.sharing.note(calls, player.spans)
        return calls

    def _withdraw(self, player: Player) -> None:
        player.waiting.clear()
        if player in self._waiting:
            self._waiting.remove(player)

    def _continue(self) -> None:
        """Deals what waits; where a lane waits for more, one of those that wait looks again when that is over."""
        if self._waiting and self._deal() is not None:
            self._waiting[0].ended.notify()

    def _deal(self) -> float | None:
        """Starts calls on free lanes. Seconds after which to look again, where a lane waits for more rounds."""
        if self._alone is not None:
            return None
        waits = [self._fill(lane) for lane in range(self.count) if self._waiting and self._running[lane] is None]
        return min((wait for wait in waits if wait is not None), default=None) if self._waiting else None

    def _fill(self, lane: int) -> float | None:
        """Starts a call on a free lane, or returns the seconds that it waits for more."""
        able = [player for player in self._waiting if player.may_use(lane)]
        if not able:
            return None
        first, now = able[0], time.monotonic()
        able = [player for player in able if player.kind == first.kind]
        patience = PATIENCE * self._last[lane]
        coming = [p for p in self._players if p.between is not None and now - p.between < patience]
        there = sum(len(entry.sample) for player in self._waiting for _, entry in player.waiting)
        running = sum(call.rows for call in self._running if call)
        active = there + running + sum(player.rows for player in coming)
        share = min(first.sizes.largest, math.ceil(active / self.count))
        urgent = any(player.priority < first.priority for player in coming)
        if coming and (there < share or urgent):
            return max(0.0, patience - max(now - player.between for player in coming if player.between is not None))
        self._start(lane, able, share, now)
        return None

    def _start(self, lane: int, able: Sequence[Player], share: int, now: float) -> None:
        """One call of at most so many rows, but for one branch at least."""
        taken, rows, players = list[Entry](), 0, list[Player]()
        for player in able:
            while player.waiting and (not taken or rows + len(player.waiting[0][1].sample) <= share):
                branch, entry = player.waiting.popleft()
                player.calls[lane].append(branch)
                player.on.add(lane)
                taken.append(entry)
                rows += len(entry.sample)
            if lane in player.on:
                players.append(player)
            if not player.waiting:
                self._waiting.remove(player)
        call = self._running[lane] = SharedCall(now, rows, players)
        self.calls += 1
        self.rows += rows
        players[0].sharing.start(lane, taken, partial(self._finished, lane, call))

    def _finished(self, lane: int, call: SharedCall, span: tuple[float, float], error: Exception | None) -> None:
        """A call has ended; on the thread of its lane."""
        now, seconds = time.monotonic(), span[1] - span[0]
        with self._lock:
            self._running[lane], self._last[lane] = None, seconds
            self._busy(lane, seconds)
            for player in call.players:
                player.on.remove(lane)
                player.spans[lane] = span
                if error is not None:
                    player.error = player.error or error
                    self._withdraw(player)
                if not player.playing:
                    player.between = now
                    player.ended.notify()
            self._continue()
