"""How many requests at once, and which lanes each of them has: the rule of a loaded server, without state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

Seconds = Sequence[float]  # how long a request takes on 1, 2, … lanes, by its model calls; no faster on more
WAIT_FACTOR = 1.1  # lanes of one image wait for each other after every round, which the times of calls do not show

MOST_ROWS = 16  # in a call of several requests: the largest that calibration measures
AS_GOOD = 1.03  # seconds per row, times those of the best batch, that count as equal
REQUESTS_PER_LANE = 8  # that run at once, at most, where they share calls


@dataclass(frozen=True)
class BatchSizes:
    """How many rows, one per branch and image, a call of several requests should have.

    fills: the fewest that cost hardly more per row than the best batch does; requests are admitted until lanes have so
    many. largest: the most of which that is true.
    """

    fills: int = 1
    largest: int = MOST_ROWS


ANY_SIZES = BatchSizes()  # where nothing is known


@lru_cache(maxsize=8)
def batch_sizes(seconds: Callable[[int], float]) -> BatchSizes:
    """What suits a model of which a call of n rows takes `seconds(n)`."""
    per_row = {rows: seconds(rows) / rows for rows in range(1, MOST_ROWS + 1)}
    good = [rows for rows, one in per_row.items() if one <= AS_GOOD * min(per_row.values())]
    return BatchSizes(good[0], good[-1])


def at_once(requests: Sequence[Seconds], lanes: int) -> int:
    """How many of the requests that are there, running or waiting, should share the lanes now.

    With g at once, lanes are dealt evenly and requests leave at the sum of what g shares finish per second; the g that
    leaves the machine free soonest is taken, the smaller one of equals, which keeps a request's own latency low. A lone
    request has all lanes; where the model gains nothing from half of them, two requests have half each.
    """

    def per_second(seconds: Seconds, share: int) -> float:
        return 1 / (seconds[min(share, len(seconds)) - 1] * (WAIT_FACTOR if share > 1 else 1.0))

    def busy(number: int) -> float:
        share, extra = divmod(lanes, number)
        return sum(
            1 / ((number - extra) * per_second(one, share) + (extra * per_second(one, share + 1) if extra else 0.0))
            for one in requests
        )

    choices = range(1, min(lanes, len(requests)) + 1)
    return min(choices, key=busy) if len(choices) > 1 else len(choices)


def divide(lanes: int, owned: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Which lanes the owner of each owned lane has: that one first, and its share of those that nobody owns."""
    free = [lane for lane in range(lanes) if lane not in owned]
    return {lane: (lane, *free[turn :: len(owned)]) for turn, lane in enumerate(owned)}


@dataclass(frozen=True)
class Policy:
    """How many requests at once, and which lanes each of them has; `batches`: they share calls where lanes can."""

    at_once: Callable[[Sequence[Seconds], int], int]
    divide: Callable[[int, Sequence[int]], dict[int, tuple[int, ...]]]
    batches: bool = False


BATCHED = Policy(at_once, divide, batches=True)


# for lanes that cannot share calls
ELASTIC = Policy(at_once, divide)


# what benchmarks compare it with
ALL_LANES = Policy(lambda requests, lanes: min(1, len(requests)), divide)
ONE_LANE = Policy(
    lambda requests, lanes: min(lanes, len(requests)), lambda lanes, owned: {lane: (lane,) for lane in owned}
)
