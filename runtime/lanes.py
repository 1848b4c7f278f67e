"""Several images at once on disjoint lanes: who waits, who is seated, and which lanes a round may use.

Every lane has a desk. An image takes one when it is its turn, owns the desk's lane until it is finished, and borrows
lanes whose desks are empty. Before each of its rounds it gives back what has been taken in the meantime and takes what
has become free: so a lone image has all lanes, and one that comes in never waits for a whole image while the rule
in `runtime.share` wants it seated. A sampler's operations do not depend on any of this, only where a round's calls run.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from engines.base import Backend, Call
from engines.errors import DeviceError
from runtime.lane_policy import ELASTIC, Seconds
from runtime.sampling.place import place

POLL = 0.05  # seconds after which an image that waits asks whether it is still wanted
Check = Callable[[], None]


class Seat:
    """An image's place: a backend whose rounds run on the lanes that the image has at that moment.

    `calls` counts runs of the network, `rounds` and `lane_rounds` say on how many lanes they were, on average.
    """

    def __init__(self, owner: Lanes, desk: int, backend: Backend, seconds: Seconds, check: Check, most: int) -> None:
        self._owner, self._backend, self.check = owner, backend, check
        self.desk, self.seconds, self.most = desk, seconds, most
        self.held: tuple[int, ...] = ()
        self.version = -1  # of the division that `held` is of
        self.since: float | None = None  # when the round began that is being played
        self.generation = owner.generation
        self.dealt: Sequence[Call] = ()  # of the last round
        self.calls = self.rounds = self.lane_rounds = 0
        self.bind, self.write, self.read = backend.bind, backend.write, backend.read
        self.combine, self.distances, self.timed = backend.combine, backend.distances, backend.timed
        self.dead, self.settle, self.close = backend.dead, backend.settle, backend.close

    @property
    def lanes(self) -> int:
        """All lanes: plans are cut for them, and rounds dealt again where there are fewer."""
        return self._owner.count

    @property
    def critical_path_seconds(self) -> float | None:
        """See Backend.critical_path_seconds."""
        return self._backend.critical_path_seconds

    @property
    def staged(self) -> tuple[tuple[int, int], ...]:
        """See Backend.staged."""
        return self._backend.staged

    @property
    def spans(self) -> Sequence[tuple[float, float]] | None:
        """See Backend.spans."""
        return self._backend.spans

    @property
    def copied(self) -> Mapping[str, int]:
        """See Backend.copied."""
        return self._backend.copied

    @property
    def counts(self) -> Mapping[str, int]:
        """See Backend.counts."""
        return self._backend.counts

    def stalled(self) -> float:
        """See Backend.stalled."""
        return self._backend.stalled()

    def predict(self, calls: Sequence[Call]) -> None:
        """See Backend.predict. Asks first whether the image is still wanted."""
        self.check()
        self._owner.update(self)
        held = self.held
        if len(held) < self._owner.count:
            own = place([branch for call in calls for branch in call], len(held))
            shared: list[Call] = [()] * self._owner.count
            for lane, call in zip(held, own, strict=True):
                shared[lane] = call
            calls = shared
        self.since = time.monotonic()
        try:
            self._backend.predict(calls)
        finally:
            self.since = None
        self.dealt = calls
        self._owner.count_round(self._backend, calls)
        self.calls += sum(1 for call in calls if call)
        self.rounds += 1
        self.lane_rounds += len(held)


class Lanes:
    """The lanes of a model and the queue in front of them. `backend(desk)` opens the backend of a desk."""

    def __init__(self, count: int, backend: Callable[[int], Backend]) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Seconds]] = deque()  # of one each, so that every one is itself
        self._seats: dict[int, Seat] = {}
        self._alone = False
        self._wanting_alone = self._closing = self._visitors = 0
        self.policy = ELASTIC
        self.version = 0
        self.generation = 0
        self._open(count, backend)

    def _open(self, count: int, backend: Callable[[int], Backend]) -> None:
        self.count, self._backends = count, [backend(desk) for desk in range(count)]
        self.held_seconds = [0.0] * count
        self.busy_seconds = [0.0] * count
        self._taken: dict[int, tuple[Seat, float]] = {}  # by lane: by whom, and since when

    @contextmanager
    def seat(
        self, seconds: Seconds, before_round: Check = lambda: None, *, first: bool = False, most: int | None = None
    ) -> Iterator[Seat]:
        """A seat for one image that takes `seconds(lanes)`; waits in line for it, or in front of the line.

        `before_round` is called also while it waits, and may raise to give up. It never has more than `most` lanes.
        """
        seat = self._sit(seconds, before_round, first, most or self.count)
        try:
            self._own(seat)
            yield seat
            seat.settle()
        except BaseException:
            with suppress(DeviceError):  # the first error counts
                seat.settle()
            raise
        finally:
            self._leave(seat)

    @contextmanager
    def alone(self, wait: bool) -> Iterator[bool]:
        """Keeps everyone from sitting down; True when nobody is seated, for which it waits if it is told to.

        Who waits may close everything: visitors, too, are waited for, and kept out.
        """
        with self._changed:
            free = wait or not (self._seats or self._waiting or self._wanting_alone)
            if free:
                self._wanting_alone += 1  # nobody sits down from here on
                self._closing += wait
                while self._seats or self._alone or (wait and self._visitors):
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
        """For networks beside the lanes, without a seat: nothing is closed meanwhile."""
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
        """Other lanes, while nobody is seated; who waits keeps the place in the line."""
        assert not self._seats
        self._open(count, backend)
        self.generation += 1

    def update(self, seat: Seat) -> None:
        """Gives back lanes that belong to others now, and takes those that are free."""
        if seat.version == self.version:
            return
        with self._changed:
            given = [lane for lane in seat.held if lane not in self._share(seat)]
        if given:
            seat.settle()  # nothing of this image may run any more on a lane that another one takes
        with self._changed:
            self._give_back(seat, given)
            self._take(seat)
            if given:
                self._changed.notify_all()

    def overdue(self, seconds: float) -> tuple[int, ...]:
        """Lanes of rounds that have taken longer than that already."""
        now = time.monotonic()
        with self._changed:
            late = [s for s in self._seats.values() if s.since is not None and now - s.since > seconds]
            return tuple(sorted(lane for seat in late for lane in seat.held))

    def count_round(self, backend: Backend, calls: Sequence[Call]) -> None:
        """Adds up how long the lanes of the last round were busy."""
        for lane, call in enumerate(calls):
            if call and backend.spans is not None:
                start, end = backend.spans[lane]
                self.busy_seconds[lane] += end - start  # by the one image that has the lane

    def busy(self) -> list[float]:
        """Seconds of model calls by lane; where the host does not know them, seconds that images had the lane."""
        return [known or held for known, held in zip(self.busy_seconds, self.held_seconds, strict=True)]

    def copied(self) -> dict[str, int]:
        """Copies between devices by kind."""
        total: Counter[str] = Counter()
        for backend in self._backends:
            total.update(backend.copied)
        return dict(total)

    @property
    def waiting(self) -> int:
        """Images in the line."""
        return len(self._waiting)

    @property
    def seated(self) -> int:
        """Images being made."""
        return len(self._seats)

    def _sit(self, seconds: Seconds, check: Check, first: bool, most: int) -> Seat:
        ticket = (seconds,)
        with self._changed:
            if first:
                self._waiting.appendleft(ticket)
            else:
                self._waiting.append(ticket)
            try:
                while self._wanting_alone or self._waiting[0] is not ticket or len(self._seats) >= self._wanted():
                    self._changed.wait(POLL)
                    check()
                desk = next(desk for desk in range(self.count) if desk not in self._seats)
                seat = Seat(self, desk, self._backends[desk], seconds, check, most)
                self._seats[desk] = seat
                self.version += 1
            finally:
                self._waiting = deque(one for one in self._waiting if one is not ticket)
                self._changed.notify_all()
        return seat

    def _own(self, seat: Seat) -> None:
        """Waits for the lane of the desk, which whoever borrowed it gives back after the round that it plays."""
        with self._changed:
            self._take(seat)
            while seat.desk not in seat.held:
                self._changed.wait(POLL)
                seat.check()
                self._take(seat)

    def _leave(self, seat: Seat) -> None:
        with self._changed:
            del self._seats[seat.desk]
            self.version += 1
            self._give_back(seat, seat.held)
            self._changed.notify_all()

    def _wanted(self) -> int:
        there = [seat.seconds for seat in self._seats.values()] + [seconds for (seconds,) in self._waiting]
        return self.policy.at_once(there[: 2 * self.count], self.count)

    def _share(self, seat: Seat) -> tuple[int, ...]:
        return self.policy.divide(self.count, list(self._seats))[seat.desk][: seat.most]

    def _take(self, seat: Seat) -> None:
        mine, now = self._share(seat), time.monotonic()
        for lane in mine:
            self._taken.setdefault(lane, (seat, now))
        seat.held = tuple(sorted(lane for lane, (who, _) in self._taken.items() if who is seat))
        if set(seat.held) == set(mine):  # else some are in a round of another: look again before the next round
            seat.version = self.version

    def _give_back(self, seat: Seat, lanes: Sequence[int]) -> None:
        now = time.monotonic()
        for lane in lanes:
            _, since = self._taken.pop(lane)
            self.held_seconds[lane] += now - since
        seat.held = tuple(lane for lane in seat.held if lane not in lanes)
