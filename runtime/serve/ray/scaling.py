"""How many replicas a model should have, by the accepted work, and how many ingresses, by the nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

NODES_SECONDS = 1.0  # for which a count of the nodes holds


class DeviceSeconds:
    """A policy of Ray Serve's autoscaler.

    Replicas say what their requests cost: the model calls of a request on one lane, by measured call times, which
    know its steps, its size and its rounds. Requests that wait for a replica cost what those cost on average.
    `seconds` is the work that a lane should have.
    """

    def __init__(self, seconds: float, lanes: int) -> None:
        self._per_replica, self._mean = seconds * lanes, seconds

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """The number of replicas before Ray's delays and bounds; see `ray.serve.config.AutoscalingContext`."""
        metrics = ctx.aggregated_metrics or {}
        work = sum(metrics.get("device_seconds", {}).values())
        requests = sum(metrics.get("requests", {}).values())
        if requests >= 1:
            self._mean = work / requests
        waiting = ctx.total_queued_requests or 0.0
        return (work + waiting * self._mean) / self._per_replica, {}


class OnePerNode:
    """A policy of Ray Serve's autoscaler: as many as there are nodes, so that none waits for a node that is gone."""

    def __init__(self, count: Callable[[], int] | None = None) -> None:
        self._count = count or _nodes
        self._known, self._until = 0, 0.0

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """See `DeviceSeconds`. Serve's controller asks many times a second."""
        if time.monotonic() >= self._until:
            self._known, self._until = self._count(), time.monotonic() + NODES_SECONDS
        return float(self._known), {}


def _nodes() -> int:
    from runtime.serve.ray.application import nodes

    return len(nodes())
