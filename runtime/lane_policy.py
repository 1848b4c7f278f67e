"""How many images at once, and which lanes each of them has: the rule of a loaded server, without state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Seconds = Callable[[int], float]  # how long an image takes on so many lanes, by its model calls
TOGETHER = 1.1  # lanes of one image wait for each other after every round, which the times of calls do not show


def at_once(images: Sequence[Seconds], lanes: int) -> int:
    """How many of the images that are there, being made or waiting, should share the lanes now.

    With g at once, lanes are dealt evenly and images leave at the sum of what g shares finish per second; the g that
    leaves the machine free soonest is taken, the smaller one of equals, which keeps an image's own latency low. One
    image has all lanes; where the model gains nothing from half of them, two images have half each.
    """

    def per_second(seconds: Seconds, share: int) -> float:
        return 1 / (seconds(share) * (TOGETHER if share > 1 else 1.0))

    def busy(number: int) -> float:
        share, extra = divmod(lanes, number)
        return sum(
            1 / ((number - extra) * per_second(one, share) + (extra * per_second(one, share + 1) if extra else 0.0))
            for one in images
        )

    choices = range(1, min(lanes, len(images)) + 1)
    return min(choices, key=busy) if len(choices) > 1 else len(choices)


def divide(lanes: int, desks: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Which lanes the image at each desk has. Desk n owns lane n; lanes of empty desks are dealt out in turn."""
    idle = [lane for lane in range(lanes) if lane not in desks]
    return {desk: (desk, *idle[turn :: len(desks)]) for turn, desk in enumerate(desks)}


@dataclass(frozen=True)
class Policy:
    """How many images at once, and which lanes each of them has."""

    at_once: Callable[[Sequence[Seconds], int], int]
    divide: Callable[[int, Sequence[int]], dict[int, tuple[int, ...]]]


ELASTIC = Policy(at_once, divide)


# what benchmarks compare it with
ALL_LANES = Policy(lambda images, lanes: min(1, len(images)), divide)
ONE_LANE = Policy(lambda images, lanes: min(lanes, len(images)), lambda lanes, desks: {desk: (desk,) for desk in desks})
