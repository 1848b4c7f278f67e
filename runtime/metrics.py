"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from runtime.report import Report

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server, so that several servers in one process do not mix."""

    def __init__(self, depth: Callable[[], float], lost: Callable[[], float]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("driffusion_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self.queued = Histogram(
            "driffusion_queue_seconds", "Time from a request to its first stage.", buckets=SECONDS, registry=registry
        )
        self._stages = Histogram(
            "driffusion_stage_seconds", "Time by stage of a request.", ["stage"], buckets=SECONDS, registry=registry
        )
        self._images = Counter("driffusion_images", "Pictures by mode.", ["mode"], registry=registry)
        self._rounds = Counter("driffusion_rounds", "Rounds of model calls.", registry=registry)
        self._evaluations = Counter("driffusion_evaluations", "Noise predictions after guidance.", registry=registry)
        self._calls = Counter("driffusion_calls", "Runs of the network.", registry=registry)
        self._critical = Counter(
            "driffusion_critical_seconds", "Longest model call of every round, added up.", registry=registry
        )
        self._accepted = Histogram(
            "driffusion_accepted_drift", "Median relative distance of accepted drafts, by request.",
            buckets=(1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1), registry=registry,
        )  # fmt: skip
        self._staged = Gauge(
            "driffusion_staged_pairs", "Pairs of GPUs whose copies go through host memory.", registry=registry
        )
        Gauge("driffusion_queue_depth", "Requests waiting or being made.", registry=registry).set_function(depth)
        Gauge("driffusion_lost_lanes", "Lanes that stopped working.", registry=registry).set_function(lost)

    def made(self, report: Report) -> None:
        """One answered request."""
        for stage, seconds in report.seconds.items():
            self._stages.labels(stage).observe(seconds)
        self._images.labels(report.mode).inc(report.images)
        self._rounds.inc(report.rounds)
        self._evaluations.inc(report.evaluations)
        self._calls.inc(report.calls)
        self._critical.inc(report.critical_seconds or 0.0)
        self._staged.set(len(report.staged))
        if report.accepted:
            self._accepted.observe(report.accepted["median"])

    def text(self) -> bytes:
        """The whole exposition."""
        return generate_latest(self._registry)
