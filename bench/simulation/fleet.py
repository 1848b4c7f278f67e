"""Replicas under load on a virtual clock: arrivals, routing, and the server's own rules for lanes.

Who is admitted and which lanes a request has is decided by `runtime.lane_policy`, as in a server. Between two events
every request goes on at the pace that its lanes give it by the table of call times, which is what rounds come to when
there are many of them. Where lanes share calls, a round of all requests that run takes as long as calls of their rows
dealt evenly; decoding holds the request's place, although a server lets others denoise meanwhile.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice

import numpy as np

from runtime.auto import round_sizes, rows_per_round, seconds_by_lanes
from runtime.lane_policy import REQUESTS_PER_LANE, WAIT_FACTOR, Policy, batch_sizes
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule

RETRIES = 2  # of a request whose replica is lost
BURST, CALM, IN_BURST, BURST_SECONDS = 3.0, 0.5, 0.2, 4.0  # times the mean rate; share of the time; mean length
DAY_SWING = 0.8  # of the mean rate, up and down
Calls = Callable[[int], float]


@dataclass(frozen=True)
class Kind:
    """What a request asks for: rounds of so many rows, and seconds by number of lanes when it runs alone.

    beside: seconds for everything that is not denoising, within `alone`.
    """

    rounds: int
    rows: float
    alone: tuple[float, ...]
    beside: float

    @classmethod
    def of(
        cls, mode: str, options: Options, schedule: Schedule, guidance_scale: float, lanes: int, call: Calls,
        beside: float,
    ) -> Kind:  # fmt: skip
        """From a table of call times."""
        sizes = round_sizes(mode, options, schedule, guidance_scale)
        rows = rows_per_round(mode, options, schedule, guidance_scale, 1)
        denoise = seconds_by_lanes(mode, options, schedule, guidance_scale, lanes, call, 1)
        return cls(sum(rounds for _, rounds in sizes), rows, tuple(one + beside for one in denoise), beside)


@dataclass(eq=False)
class Request:
    """One request; `left` is the share of it that is not done yet."""

    kind: Kind
    arrived: float
    left: float = 1.0
    pace: float = 0.0
    lost: int = 0  # how many replicas were lost under it
    latency: float = math.nan  # stays so where it failed


@dataclass
class Replica:
    """One server: its lanes, who runs on them, and who waits."""

    lanes: int
    policy: Policy
    call: Calls
    running: dict[int, Request] = field(default_factory=dict)  # by the lane that it owns, or its number
    queue: deque[Request] = field(default_factory=deque)
    clock: float = 0.0
    version: int = 0

    def __post_init__(self) -> None:
        self.sizes = batch_sizes(self.call)
        self.wanted = lru_cache(maxsize=4096)(self.policy.at_once)

    @property
    def ongoing(self) -> int:
        """What routing looks at."""
        return len(self.running) + len(self.queue)

    def pass_time(self, now: float) -> list[Request]:
        """Everyone goes on until `now`; returns who is finished."""
        for one in self.running.values():
            one.left -= (now - self.clock) * one.pace
        self.clock = now
        ended = [number for number, one in self.running.items() if one.left <= 1e-9]
        return [self.running.pop(number) for number in ended]

    def deal(self) -> float:
        """Admits who may run and sets everyone's pace; returns when the next one will be finished."""
        while self.queue and self._room():
            own = next(n for n in range(len(self.running) + 1) if n not in self.running)
            self.running[own] = self.queue.popleft()
        self.version += 1
        if not self.running:
            return math.inf
        if self.policy.batches:
            self._share_calls()
        else:
            divided = self.policy.divide(self.lanes, list(self.running))
            for own, one in self.running.items():
                one.pace = _pace(one.kind, len(divided[own]))
        return self.clock + min(one.left / one.pace for one in self.running.values())

    def _room(self) -> bool:
        """See Lanes._room."""
        there = islice(chain(self.running.values(), self.queue), 2 * self.lanes)
        if len(self.running) < self.wanted(tuple(one.kind.alone for one in there), self.lanes):
            return True
        rows = sum(one.kind.rows for one in self.running.values())
        room = len(self.running) < self.lanes * REQUESTS_PER_LANE and rows < self.lanes * self.sizes.fills
        return self.policy.batches and room

    def _share_calls(self) -> None:
        requests = list(self.running.values())
        if len(requests) == 1:
            requests[0].pace = _pace(requests[0].kind, self.lanes)
            return
        rows = sum(one.kind.rows for one in requests)
        share = min(self.sizes.largest, math.ceil(rows / self.lanes))
        seconds = self.call(share) * max(1.0, rows / (self.lanes * share))
        for one in requests:
            one.pace = 1 / (one.kind.rounds * seconds + one.kind.beside)


def _pace(kind: Kind, lanes: int) -> float:
    seconds = kind.alone[min(lanes, len(kind.alone)) - 1]
    return 1 / ((seconds - kind.beside) * (WAIT_FACTOR if lanes > 1 else 1.0) + kind.beside)


@dataclass(frozen=True)
class Loss:
    """At `at` seconds the first `share` of all replicas is gone."""

    at: float
    share: float


def play(
    arrivals: Sequence[tuple[float, Kind]], replicas: Sequence[Replica], loss: Loss | None = None, seed: int = 0
) -> list[Request]:
    """Every request with its latency. Each goes to the less loaded of two different replicas, taken at random.

    What a lost replica had is begun anew on another one, at most `RETRIES` times.
    """
    choice, alive = np.random.default_rng(seed), list(range(len(replicas)))
    requests = [Request(kind, at) for at, kind in arrivals]
    # ends before losses before arrivals; (time, order, what, version)
    events: list[tuple[float, int, int, int]] = [(one.arrived, 2, n, 0) for n, one in enumerate(requests)]
    if loss is not None:
        events.append((loss.at, 1, 0, 0))
    heapq.heapify(events)

    def changed(which: int, now: float) -> None:
        replica = replicas[which]
        for one in replica.pass_time(now):
            one.latency = now - one.arrived
        end = replica.deal()
        if end < math.inf:
            heapq.heappush(events, (end, 0, which, replica.version))

    def route(one: Request, now: float) -> None:
        first = int(choice.integers(len(alive)))
        other = (first + 1 + int(choice.integers(len(alive) - 1))) % len(alive) if len(alive) > 1 else first
        which = min(alive[first], alive[other], key=lambda n: replicas[n].ongoing)
        replicas[which].queue.append(one)
        changed(which, now)

    while events:
        now, order, what, version = heapq.heappop(events)
        if order == 0 and version == replicas[what].version:
            changed(what, now)
        elif order == 1 and loss is not None:
            gone, alive = alive[: round(loss.share * len(alive))], alive[round(loss.share * len(alive)) :]
            for which in gone:
                replicas[which].version += 1  # nothing ends there any more
                homeless = [*replicas[which].pass_time(now), *replicas[which].running.values(), *replicas[which].queue]
                for one in homeless:
                    one.left, one.lost = 1.0, one.lost + 1
                    if alive and one.lost <= RETRIES:
                        route(one, now)
        elif order == 2 and alive:
            route(requests[what], now)
    return requests


def arrivals(process: str, rate: float, kinds: Sequence[Kind], count: int, seed: int) -> list[tuple[float, Kind]]:
    """So many requests at a mean rate per second: `poisson`, `bursts` of three times the rate, or a `day` in short."""
    random = np.random.default_rng((seed, count))
    if process == "poisson":
        times = np.cumsum(random.exponential(1 / rate, count))
    elif process == "bursts":
        times = _bursts(random, rate, count)
    elif process == "day":
        # one day is as long as all requests take: uniform in the integral of 1 + swing · sin
        whole = np.linspace(0, 1, 4096)
        integral = whole + DAY_SWING * (1 - np.cos(2 * np.pi * whole)) / (2 * np.pi)
        times = np.interp(np.sort(random.random(count)), integral / integral[-1], whole) * count / rate
    else:
        raise ValueError(process)
    chosen = random.integers(len(kinds), size=count)
    return [(float(at), kinds[n]) for at, n in zip(times, chosen, strict=True)]


def _bursts(random: np.random.Generator, rate: float, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Poisson arrivals whose rate changes between two values at exponential times."""
    found: list[float] = []
    at, burst = 0.0, False
    while len(found) < count:
        mean = BURST_SECONDS if burst else BURST_SECONDS * (1 - IN_BURST) / IN_BURST
        length, now = random.exponential(mean), rate * (BURST if burst else CALM)
        found += list(at + np.sort(random.random(random.poisson(now * length))) * length)
        at, burst = at + length, not burst
    return np.array(found[:count])
