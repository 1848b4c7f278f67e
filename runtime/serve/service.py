"""The pipeline behind its queue: a request becomes a job, and the job an answer or a stream of events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from runtime.pipeline import Pipeline, Result
from runtime.serve.health import Health
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.openai.answers import USAGE, Previews, answer, generate
from runtime.serve.openai.errors import translated
from runtime.serve.openai.schema import ImageRequest
from runtime.serve.queue import Job, Jobs, QueueFullError, ShutdownError


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

    def whole(self, asked: ImageRequest, job: Job) -> bytes:
        """One answer with everything, made on the engine's thread."""
        return answer(asked, self._made(job, generate(self.pipeline, asked, job, lambda finished, steps: None)))

    def streamed(self, asked: ImageRequest, job: Job, send: Callable[[bytes], None]) -> None:
        """Events for partial pictures and the finished one, sent from the engine's thread."""
        previews, created = Previews(asked), int(time.time())

        def event(kind: str, image: Any, **more: Any) -> None:
            content = {
                "type": f"{asked.event}.{kind}", "b64_json": asked.encode(image), "created_at": created,
                **asked.facts(image), **more,
            }  # fmt: skip
            send(f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode())

        def show(finished: int, steps: int) -> None:
            if previews.due(finished, steps):
                event("partial_image", self.pipeline.preview()[0], partial_image_index=previews.shown - 1)

        result = self._made(job, generate(self.pipeline, asked, job, show))
        event("completed", result.images[0], usage=USAGE, report=result.report.to_dict())

    def _made(self, job: Job, result: Result) -> Result:
        assert job.started is not None
        self.metrics.queued.observe(job.started - job.asked + result.report.seconds["wait"])
        self.metrics.made(result.report)
        return result

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Into the queue, or ApiError 429 or 503."""
        try:
            return self.jobs.submit(work, self.limits.seconds)
        except (QueueFullError, ShutdownError) as error:
            raise translated(error) from None
