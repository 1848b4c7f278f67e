"""Two ways to move latents, played on a clock."""

from __future__ import annotations

import pytest

from bench import moves


@pytest.mark.parametrize("link", moves.LINKS, ids=lambda link: link.name)
def test_two_ways_to_move_latents(link: moves.Link) -> None:
    """One device moves nothing; two hops cost two latencies, one hop costs one; more devices never cost less."""
    assert moves.gather(1, 1 << 15, link) == moves.all_gather(1, 1 << 15, link) == moves.COMBINE
    both = moves.gather(2, 0, link) - moves.COMBINE
    assert both == pytest.approx(2 * (link.latency + link.event))
    assert moves.all_gather(2, 0, link) - moves.COMBINE == pytest.approx(link.latency + link.event)
    for way in (moves.gather, moves.all_gather):
        seconds = [way(devices, 1 << 19, link) for devices in (1, 2, 4, 8)]
        assert seconds == sorted(seconds)
    assert len(moves.measure()) == len(moves.LINKS) * len(moves.LATENTS) * len(moves.DEVICES)
