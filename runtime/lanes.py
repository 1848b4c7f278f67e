"""Several requests at once: who waits, who has which lanes, and where the calls of a round run.

Where lanes can run rounds of several requests in one call, requests are admitted until calls are full, and
`runtime.batching` deals their rounds over all lanes.

Elsewhere lanes are divided. A request holds lanes by a `Lease`, from the queue to its report. When it is admitted it
owns one lane until it is finished, and borrows lanes that nobody owns. Before each of its rounds it gives back what
others own by now and takes what has become free: so a lone request has all lanes, and a new one never waits for a whole
image while the rule in `runtime.lane_policy` wants it admitted.

A sampler's operations do not depend on any of this, only where a round's calls run.
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count as numbers

from engines.base import Backend, Branch, LaneCall
from engines.errors import DeviceError
from runtime.batching import Batcher, Player
from runtime.lane_policy import ANY_SIZES, BATCHED, REQUESTS_PER_LANE, BatchSizes, Seconds
from runtime.sampling.place import place

POLL = 0.05  # seconds after which a waiting request asks whether it is still wanted
Check = Callable[[], None]


class Lease:
    """A request's hold on lanes. It waits in the queue, then owns lane `own` and plays rounds on the lanes in `held`.

    backend: that of the owned lane, on whose device the request's latents are; set when it is admitted, like `own`.
    seconds: how long it takes by number of lanes, see `lane_policy`. most: how many lanes it never exceeds.
    generation: of the lanes when it was admitted; they are replaced when one is lost.
    rounds, lane_rounds: how many rounds it played, and the sum of the lanes that it held in them.
    priority, turn: lower ones come first; `turn` is that in the queue.
    used: all lanes that it held in any of its rounds.
    rows, sizes: of its calls, where they are shared; `player` is its part in that. Then it owns no lane, `own` is a
    number that no other has, and the lanes that it held in a round are those that its branches ran on; all of them
    while it is alone.
    """

    own: int
    backend: Backend

    def __init__(
        self, lanes: Lanes, seconds: Seconds, before_round: Check, most: int, rows: float, sizes: BatchSizes,
        priority: int, *, first: bool,
    ) -> None:  # fmt: skip
        self._lanes = lanes
        self.seconds, self.before_round, self.most = seconds, before_round, most
        self.rows, self.sizes = rows, sizes
        self.priority, self.turn = priority, (not first, priority)
        self.player: Player | None = None
        self.held: tuple[int, ...] = ()
        self.version = -1  # of the division that `held` is of
        self.since: float | None = None  # when the round began that is being played
        self.generation = lanes.generation
        self.rounds = self.lane_rounds = 0
        self.used: set[int] = set()
        self._noted: tuple[int, ...] = ()  # the last of `held` that is in `used`

    def admit(self, own: int, backend: Backend, generation: int) -> None:
        """The end of waiting."""
        self.own, self.backend, self.generation = own, backend, generation

    def play(self, branches: Sequence[Branch]) -> Sequence[LaneCall]:
        """Plays a round on the lanes that it may have now and returns the calls by lane; may raise to cancel."""
        self.before_round()
        lanes = self._lanes
        if self.player is not None:
            calls = lanes.batcher.play(self.player, branches)
            on = [lane for lane, call in enumerate(calls) if call]
            self.used.update(on)
            self.rounds += 1
            self.lane_rounds += len(on) if lanes.running > 1 else min(lanes.count, self.most)
            return calls
        if self.version != lanes.version:
            lanes.update(self)
        held = self.held
        if held is not self._noted:
            self.used.update(held)
            self._noted = held
        calls = place(tuple(branches), held, lanes.count)
        self.since = time.monotonic()
        try:
            self.backend.predict(calls)
        finally:
            self.since = None
        lanes.count_busy(self.backend, calls)
        self.rounds += 1
        self.lane_rounds += len(held)
        return calls


class Lanes:
    """The lanes of a model and the queue in front of them.

    `backend(n)` opens the backend of lane n's owner, and a further one on the same lanes for n beyond the last lane.
    """

    def __init__(self, count: int, backend: Callable[[int], Backend]) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Lease] = deque()
        self._leases: dict[int, Lease] = {}  # by the lane that they own, or the number of their backend
        self._alone = False
        self._wanting_alone = self._closing = self._visitors = 0
        self.policy = BATCHED
        self.version = 0  # of the division of lanes among leases
        self.generation = 0
        self._open(count, backend)

    def _open(self, count: int, backend: Callable[[int], Backend]) -> None:
        self.count, self._backends, self._backend = count, [backend(lane) for lane in range(count)], backend
        self.held_seconds = [0.0] * count
        self.busy_seconds = [0.0] * count
        self.batcher = Batcher(count, self._count_shared)
        self._taken: dict[int, tuple[Lease, float]] = {}  # by lane: by whom, and since when

    @contextmanager
    def lease(
        self, seconds: Seconds, before_round: Check = lambda: None, *, first: bool = False, most: int | None = None,
        rows: float = 1.0, sizes: BatchSizes = ANY_SIZES, priority: int = 5,
    ) -> Iterator[Lease]:  # fmt: skip
        """Lanes for one request that takes `seconds[n - 1]` on n lanes, at most `most`; waits in the queue for them.

        `before_round` is called also while it waits, and may raise to cancel. `first` puts it in front of the queue.
        `rows` is how many its rounds have on average, one per branch and image; `sizes` are those that suit the model.
        Those of a lower `priority` come first in the queue. Where calls are shared their rounds do, too, so that they
        are admitted as if those of a higher one were not there.
        """
        lease = Lease(self, seconds, before_round, most or self.count, rows, sizes, priority, first=first)
        self._admit(lease)
        try:
            if lease.player is None:
                self._wait_for_own_lane(lease)
            yield lease
            lease.backend.settle()
        except BaseException:
            if lease.own in lease.held:  # else another request is still on it, and nothing of this one ever was
                with suppress(DeviceError):  # the first error counts
                    lease.backend.settle()
            raise
        finally:
            self._release(lease)

    @contextmanager
    def alone(self, wait: bool) -> Iterator[bool]:
        """Admits no request meanwhile; True when none has lanes. With `wait` it waits until none has.

        With `wait` everything may be closed inside: it also waits for visitors and keeps new ones out.
        """
        with self._changed:
            free = wait or not (self._leases or self._queue or self._wanting_alone)
            if free:
                self._wanting_alone += 1  # nobody is admitted from here on
                self._closing += wait
                while self._leases or self._alone or (wait and self._visitors):
                    self._changed.wait()
                self._alone = True
        try:
            yield free
        finally:
            with self._changed:
                if free:
                    self._alone = False
                    self._wanting_alone -= 1
                    self._closing -= wait
                    self._changed.notify_all()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """For networks beside the lanes, without a lease: nothing is closed meanwhile."""
        with self._changed:
            while self._closing:
                self._changed.wait()
            self._visitors += 1
        try:
            yield
        finally:
            with self._changed:
                self._visitors -= 1
                self._changed.notify_all()

    def replace(self, count: int, backend: Callable[[int], Backend]) -> None:
        """Other lanes, while no request has any; those that wait keep their place in the queue."""
        assert not self._leases
        self._open(count, backend)
        self.generation += 1

    def update(self, lease: Lease) -> None:
        """Gives back lanes that belong to others now, and takes those that are free."""
        with self._changed:
            given = [lane for lane in lease.held if lane not in self._share(lease)]
        if given:
            lease.backend.settle()  # nothing of this request may run any more on a lane that another one takes
        with self._changed:
            self._give_back(lease, given)
            self._take(lease)
            if given:
                self._changed.notify_all()

    def overdue(self, seconds: float) -> tuple[int, ...]:
        """Lanes of requests for which nothing has ended for longer than that: by the host's clock, or the device's."""
        now = time.monotonic()
        with self._changed:
            late = [
                one
                for one in self._leases.values()
                if (one.since is not None and now - one.since > seconds) or one.backend.measurements.stalled() > seconds
            ]
            held = {lane for lease in late for lane in lease.held}
        return tuple(sorted(held | self.batcher.overdue(seconds)))

    def count_busy(self, backend: Backend, calls: Sequence[LaneCall]) -> None:
        """Adds up how long the lanes of the last round were busy."""
        spans = backend.measurements.spans
        if spans is None:
            return
        for lane, call in enumerate(calls):
            if call:
                start, end = spans[lane]
                self.busy_seconds[lane] += end - start  # by the one request that has the lane

    def busy(self) -> list[float]:
        """Seconds of model calls by lane; where the host does not know them, seconds that requests had the lane."""
        return [known or held for known, held in zip(self.busy_seconds, self.held_seconds, strict=True)]

    def copied(self) -> dict[str, int]:
        """Copies between devices by kind."""
        total: Counter[str] = Counter()
        for backend in self._backends:
            total.update(backend.measurements.copied)
        return dict(total)

    def counts(self) -> dict[str, int]:
        """What backends keep for rounds that come again, by kind."""
        total: Counter[str] = Counter()
        for backend in self._backends:
            total.update(backend.measurements.counts)
        return dict(total)

    def shared(self) -> dict[str, int]:
        """Calls for several requests, and their rows: one per branch and image."""
        return {"calls": self.batcher.calls, "rows": self.batcher.rows}

    @property
    def shares(self) -> bool:
        """Whether requests share calls."""
        return self.policy.batches and self._backends[0].sharing is not None

    @property
    def most_running(self) -> int:
        """Requests that have lanes at the same time, at most."""
        return self.count * (REQUESTS_PER_LANE if self.shares else 1)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that have lanes."""
        return len(self._leases)

    def _admit(self, lease: Lease) -> None:
        """Waits in the queue until the policy admits the lease, which then owns the first lane that nobody owns."""
        with self._changed:
            insort(self._queue, lease, key=lambda one: one.turn)
            try:
                while self._wanting_alone or self._queue[0] is not lease or not self._room(lease):
                    self._changed.wait(POLL)
                    lease.before_round()
                own = next(n for n in numbers() if n not in self._leases)
                if own == len(self._backends):
                    self._backends.append(self._backend(own))
                lease.admit(own, self._backends[own], self.generation)
                if self.shares:
                    lease.player = self.batcher.join(lease.backend, lease.most, lease.sizes, lease.rows, lease.priority)
                self._leases[own] = lease
                self.version += 1
            finally:
                self._queue.remove(lease)
                self._changed.notify_all()

    def _wait_for_own_lane(self, lease: Lease) -> None:
        """Whoever borrowed it gives it back after the round that it plays."""
        with self._changed:
            self._take(lease)
            while lease.own not in lease.held:
                self._changed.wait(POLL)
                lease.before_round()
                self._take(lease)

    def _release(self, lease: Lease) -> None:
        if lease.player is not None:
            self.batcher.leave(lease.player)
        with self._changed:
            del self._leases[lease.own]
            self.version += 1
            self._give_back(lease, lease.held)
            self._changed.notify_all()

    def _room(self, lease: Lease) -> bool:
        """Whether the lease may have lanes now: beside those that share calls, until calls are full."""
        running = self._leases.values()
        if any((one.player is not None) != self.shares for one in running):  # of another policy
            return False
        if len(running) < self._wanted():
            return True
        full = self.count * lease.sizes.fills
        rows = sum(one.rows for one in running if one.priority <= lease.priority)
        return self.shares and len(running) < self.most_running and rows < full

    def _count_shared(self, lane: int, seconds: float) -> None:
        self.busy_seconds[lane] += seconds

    def _wanted(self) -> int:
        """How many requests the policy wants to have lanes; it looks at a few of the queue."""
        there = [lease.seconds for lease in (*self._leases.values(), *self._queue)]
        return self.policy.at_once(there[: 2 * self.count], self.count)

    def _share(self, lease: Lease) -> tuple[int, ...]:
        return self.policy.divide(self.count, list(self._leases))[lease.own][: lease.most]

    def _take(self, lease: Lease) -> None:
        mine, now = self._share(lease), time.monotonic()
        for lane in mine:
            self._taken.setdefault(lane, (lease, now))
        lease.held = tuple(sorted(lane for lane, (who, _) in self._taken.items() if who is lease))
        if set(lease.held) == set(mine):  # else some are in a round of another: look again before the next round
            lease.version = self.version

    def _give_back(self, lease: Lease, lanes: Sequence[int]) -> None:
        now = time.monotonic()
        for lane in lanes:
            _, since = self._taken.pop(lane)
            self.held_seconds[lane] += now - since
        lease.held = tuple(lane for lane in lease.held if lane not in lanes)
