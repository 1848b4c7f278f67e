"""`python -m bench moves`: two ways to move latents between GPUs, on a virtual clock.

The cost of a round beside its model calls.

Gather: one device holds the latents. It combines, sends each device its draft, and gets each ε back: two hops.
All-gather: every device holds all latents. Each sends its ε to all others and combines for itself: one hop.

A stream runs one thing after another, a device's link carries one copy at a time in each direction, and a hop takes
`latency` beside what its bytes take. With one stream per device the copies of an all-gather queue behind one another;
`streams` gives every copy a stream of its own, at the price of an event for each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DEVICES = (2, 4, 8)
LATENTS = {"SD 1.5": 32 << 10, "SDXL": 128 << 10, "SD 3": 512 << 10}  # bytes in fp16


@dataclass(frozen=True)
class Link:
    """Seconds and bytes per second of a copy between two devices; `event` is the cost of waiting for another stream."""

    name: str
    latency: float
    bandwidth: float
    event: float = 1.5e-6

    def busy(self, size: int) -> float:
        """Seconds that a copy occupies the link."""
        return size / self.bandwidth


# Typical values, not measured by this project.
NVLINK, PCIE = Link("NVLink", 6e-6, 200e9), Link("PCIe 4", 10e-6, 22e9)
STAGED, ETHERNET = Link("staged", 25e-6, 11e9), Link("100 Gb Ethernet", 40e-6, 11.5e9, event=10e-6)
LINKS = (NVLINK, PCIE, STAGED)
COMBINE = 4e-6


def gathered(calls: Sequence[float], latents: Sequence[int], size: int, link: Link) -> float:
    """Seconds of a round on devices of which the first holds the latents, from its first copy to the last ε's arrival.

    calls: seconds of each device's model call. latents: how many it gets, and sends back as many; one without any does
    nothing. size: bytes of a latent.
    """
    sent, arrived, ready = 0.0, calls[0], []  # at home without a copy
    for seconds, count in zip(calls[1:], latents[1:], strict=True):
        if count:
            sent += link.busy(size * count)
            ready.append((sent + link.event + link.latency + seconds, count))
    home = 0.0
    for end, count in sorted(ready):
        home = max(home, end) + link.busy(size * count)
        arrived = max(arrived, home + link.latency + link.event)
    return arrived


def gather(devices: int, size: int, link: Link, combine: float = COMBINE) -> float:
    """Seconds of a round beside its model calls, which take equally long."""
    return combine + gathered([0.0] * devices, [1] * devices, size, link)


def all_gather(devices: int, size: int, link: Link, combine: float = COMBINE, *, streams: bool = False) -> float:
    """Seconds of a round beside its model calls, with one stream per device or one per copy."""
    busy, copies = link.busy(size), devices - 1
    hop = link.latency + link.event if streams else copies * link.latency
    return combine + copies * (busy + link.event) + hop


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--call-seconds", type=float, default=0.01, help="of one model call")


def measure(call_seconds: float = 0.01) -> list[dict[str, Any]]:
    """Every number of devices, latent and link; the gain is the share of a round with calls of `call_seconds`."""
    rows = []
    for link in LINKS:
        for name, size in LATENTS.items():
            for devices in DEVICES:
                ways = {
                    "gather": gather(devices, size, link),
                    "all_gather": all_gather(devices, size, link),
                    "all_gather_streams": all_gather(devices, size, link, streams=True),
                }
                best = min(ways["all_gather"], ways["all_gather_streams"])
                gain = (ways["gather"] - best) / (call_seconds + ways["gather"])
                rows.append(
                    {"link": link.name, "latent": name, "devices": devices, "gain": gain}
                    | {way: seconds * 1e6 for way, seconds in ways.items()}
                )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Microseconds per round."""
    lines = [
        "| link | latent | devices | gather | all-gather | with a stream per copy | gained, calls of 10 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['link']} | {r['latent']} | {r['devices']} | {r['gather']:.0f} µs | {r['all_gather']:.0f} µs "
        f"| {r['all_gather_streams']:.0f} µs | {r['gain']:.2%} |"
        for r in rows
    ]
    return "\n".join(lines)
