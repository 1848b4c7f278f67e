"""The pipeline behind its queue: a request becomes a job, and the job an answer or a stream of events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.pipeline import Pipeline, Result
from runtime.serve.health import Health
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.queue import Job, Jobs


class Service:
    """The pipeline behind its queue: one method per kind of answer."""

    def __init__(self, pipeline: Pipeline, limits: Limits) -> None:
        self.pipeline, self.limits = pipeline, limits
        self.jobs = Jobs(limits.queue, len(pipeline.devices))
        self.metrics = Metrics(
            lambda: self.jobs.depth,
            lambda: len(pipeline.lost),
            lambda: (list(map(str, pipeline.devices)), pipeline.lanes),
        )
        self.health = Health(pipeline, limits.lane_seconds, lambda: self.jobs.draining)

    def record(self, job: Job, result: Result) -> Result:
        """Counts what was made; returns it."""
        assert job.started is not None
        self.metrics.queued.observe(job.started - job.asked + result.report.seconds["wait"])
        self.metrics.made(result.report)
        return result

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Into the queue; QueueFullError, or ShutdownError."""
        return self.jobs.submit(work, self.limits.seconds)
