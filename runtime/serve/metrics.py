"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from runtime.lanes import Lanes
from runtime.report import Report

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One registry per server, so that several servers in one process do not mix."""

    def __init__(
        self, depth: Callable[[], float], lost: Callable[[], float], lanes: Callable[[], tuple[Sequence[str], Lanes]]
    ) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "driffusion_requests", "Requests for images by outcome, as HTTP statuses; 499: the client went away.",
            ["outcome"], registry=registry,
        )  # fmt: skip
        self.queued = Histogram(
            "driffusion_queue_seconds", "Time from a request to its first round, text encoding left out.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._stages = Histogram(
            "driffusion_stage_seconds", "Time by stage of a request.", ["stage"], buckets=SECONDS, registry=registry
        )
        self._images = Counter("driffusion_images", "Images by mode.", ["mode"], registry=registry)
        self._rounds = Counter("driffusion_rounds", "Rounds of model calls.", registry=registry)
        self._evaluations = Counter("driffusion_evaluations", "Noise predictions after guidance.", registry=registry)
        self._calls = Counter("driffusion_calls", "Runs of the network.", registry=registry)
        self._critical = Counter(
            "driffusion_critical_seconds", "Longest model call of every round, added up.", registry=registry
        )
        self._accepted = Histogram(
            "driffusion_accepted_drift", "Relative distance of accepted drafts, by request: median, p90 and max.",
            ["quantile"], buckets=(1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1), registry=registry,
        )  # fmt: skip
        self._staged = Gauge(
            "driffusion_staged_pairs", "Pairs of GPUs whose copies go through host memory.", registry=registry
        )
        Gauge("driffusion_queue_depth", "Requests waiting or being made.", registry=registry).set_function(depth)
        Gauge("driffusion_lost_lanes", "Lanes that stopped working.", registry=registry).set_function(lost)
        registry.register(LaneCollector(lanes))
        registry.register(GpuCollector())

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
        for quantile, distance in (report.accepted or {}).items():
            self._accepted.labels(quantile).observe(distance)

    def text(self) -> bytes:
        """The whole exposition."""
        return generate_latest(self._registry)


class LaneCollector(Collector):
    """What lanes did. The share of the time that a lane is busy is the rate of its busy seconds."""

    def __init__(self, lanes: Callable[[], tuple[Sequence[str], Lanes]]) -> None:
        self._lanes = lanes

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        names, lanes = self._lanes()
        busy = CounterMetricFamily(
            "driffusion_lane_busy_seconds",
            "Time in model calls; on GPUs, whose rounds nobody waits for, time that an image had the lane.",
            labels=["lane"],
        )
        for name, seconds in zip(names, lanes.busy(), strict=False):
            busy.add_metric([name], seconds)
        yield busy
        copies = CounterMetricFamily("driffusion_copies", "Copies of latents between GPUs.", labels=["kind"])
        for kind, number in lanes.copied().items():
            copies.add_metric([kind], number)
        yield copies
        kept = GaugeMetricFamily("driffusion_kept", "What lanes keep for rounds that come again.", labels=["kind"])
        for kind, number in lanes.counts().items():
            kept.add_metric([kind], number)
        yield kept
        shared = CounterMetricFamily(
            "driffusion_shared",
            "Model calls while several requests run, and rows in them.",
            labels=["kind"],
        )
        for kind, number in lanes.shared().items():
            shared.add_metric([kind], number)
        yield shared
        yield GaugeMetricFamily("driffusion_requests_running", "Requests that have lanes.", lanes.running)


class GpuCollector(Collector):
    """What NVIDIA's management library tells of the GPUs that it sees; nothing where there is none."""

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        try:
            import pynvml as nvml

            nvml.nvmlInit()
        except ImportError:
            return
        except nvml.NVMLError:
            return
        told: dict[str, Callable[[Any], float]] = {
            "memory_used_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
            "memory_total_bytes": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
            "utilization_ratio": lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
            "power_watts": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
        }
        try:
            gpus = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
            for name, read in told.items():
                family = GaugeMetricFamily(f"driffusion_gpu_{name}", "As NVML tells it.", labels=["gpu"])
                for number, gpu in enumerate(gpus):
                    with suppress(nvml.NVMLError):  # not every GPU tells everything
                        family.add_metric([str(number)], read(gpu))
                yield family
        finally:
            nvml.nvmlShutdown()
