"""How many replicas a model should have: so many that the accepted work takes each lane the wanted time."""

from __future__ import annotations

from typing import Any


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
