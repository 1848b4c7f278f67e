"""The rule that shares lanes among requests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.lane_policy import WAIT_FACTOR, Seconds, at_once, divide

# seconds by number of lanes
PERFECT = tuple(1 / lanes for lanes in range(1, 65))
USUAL = tuple(0.2 + 0.8 / lanes for lanes in range(1, 65))
GREEDY = tuple(1 / lanes**1.5 for lanes in range(1, 65))  # faster than in proportion


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("seconds", [PERFECT, USUAL, GREEDY])
def test_a_lone_image_is_alone_and_nobody_shares_less_than_a_lane(seconds: Seconds, lanes: int) -> None:
    assert at_once([], lanes) == 0
    assert at_once([seconds], lanes) == 1
    for waiting in (2, 3, 5, 40):
        assert 1 <= at_once([seconds] * waiting, lanes) <= min(lanes, waiting)


def test_images_share_where_lanes_help_less_than_in_proportion() -> None:
    assert [at_once([USUAL] * n, 4) for n in (1, 2, 3, 4, 9)] == [1, 2, 3, 4, 4]
    assert at_once([PERFECT] * 4, 4) == 4, "lanes of one image wait for each other"
    assert at_once([GREEDY] * 4, 4) == 1
    assert at_once([(1.0, 0.4, 0.4, 0.4)] * 4, 4) == 2, "two lanes are all that it can use"
    assert at_once([(1.0, 0.4)] * 4, 4) == 2, "or may use"


def test_the_rule_leaves_the_machine_free_soonest(rng: np.random.Generator) -> None:
    for _ in range(50):
        lanes, count = int(rng.integers(2, 9)), int(rng.integers(2, 7))
        tables = [np.sort(rng.uniform(0.1, 1, lanes))[::-1] for _ in range(count)]
        requests = [tuple(map(float, table)) for table in tables]

        def busy(number: int, lanes: int = lanes, tables: list[Any] = tables) -> float:
            shares = [lanes // number + (turn < lanes % number) for turn in range(number)]
            slower = [WAIT_FACTOR if share > 1 else 1.0 for share in shares]
            rates = [sum(1 / (t[n - 1] * slow) for n, slow in zip(shares, slower, strict=True)) for t in tables]
            return float(sum(1 / rate for rate in rates))

        best = min(busy(number) for number in range(1, min(lanes, count) + 1))
        assert busy(at_once(requests, lanes)) == pytest.approx(best)


def test_lanes_are_divided_without_rest() -> None:
    assert divide(4, [2]) == {2: (2, 0, 1, 3)}
    assert divide(4, [0, 1]) == {0: (0, 2), 1: (1, 3)}
    for owned in ([0], [3, 1], [2, 0, 1], [0, 1, 2, 3, 4]):
        shares = divide(5, owned)
        assert sorted(lane for share in shares.values() for lane in share) == list(range(5))
        assert all(lane in share for lane, share in shares.items())
        assert max(map(len, shares.values())) - min(map(len, shares.values())) <= 1
