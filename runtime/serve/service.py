"""The pipeline behind its queue: what every protocol calls. A protocol parses a call, and encodes results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from engines.errors import ParameterError
from runtime.call import OPTIONS, Call, Callbacks
from runtime.pipeline import Pipeline, Result
from runtime.serve.health import Health
from runtime.serve.limits import Limits
from runtime.serve.metrics import Metrics
from runtime.serve.queue import RequestQueue
from runtime.serve.request import Request


@dataclass
class Previews:
    """`send(index, image)` gets up to `count` previews of the first image, evenly over the steps."""

    count: int
    send: Callable[[int, Image.Image], None]
    sent: int = 0

    def due(self, finished: int, steps: int) -> bool:
        """Whether a preview is due; the finished image is none. Rounds may finish several steps at once."""
        return self.sent < self.count and steps * (self.sent + 1) / (self.count + 1) <= finished < steps

    def show(self, image: Image.Image) -> None:
        """Sends the next preview."""
        self.send(self.sent, image)
        self.sent += 1


class Service:
    """A loaded pipeline with queue, limits, health and metrics. It knows no protocol.

    Errors are QueueFullError, DrainingError, DeadlineError and CancelledError of `runtime.serve.request`, and
    EngineError with its kinds. `defaults` are of options that a request leaves out, by the names of `Call`.
    """

    def __init__(self, pipeline: Pipeline, limits: Limits, scheduler: str | None = None) -> None:
        self.pipeline, self.limits = pipeline, limits
        model = pipeline.manifest.defaults
        self.defaults: dict[str, Any] = {
            "num_inference_steps": min(model.num_inference_steps, limits.steps),
            "guidance_scale": model.guidance_scale,
            "scheduler": scheduler,
        }
        self.queue = RequestQueue(limits.queue, len(pipeline.devices), pipeline.lanes.most_running)
        self.metrics = Metrics(
            lambda: self.queue.depth,
            lambda: len(pipeline.lost),
            lambda: (list(map(str, pipeline.devices)), pipeline.lanes),
        )
        self.health = Health(pipeline, limits.lane_seconds, lambda: self.queue.draining)

    def submit(
        self,
        call: Call,
        encode: Callable[[Result], Any],
        previews: Previews | None = None,
        *,
        request_id: str | None = None,
        seconds: float | None = None,
        warnings: tuple[str, ...] = (),
    ) -> Request:
        """Queues a call. The request's future gets `encode(result)`; QueueFullError, DrainingError or, for a priority
        where there are none, ParameterError at once.

        `encode` and `previews.send` run on a thread of the engine, so that an event loop only has bytes to send.
        `seconds` is the client's own deadline, where its protocol has one; the server's limit holds beside it.
        `warnings` go into the report.
        """

        def work(request: Request) -> Any:
            return encode(self._generate(request, previews, warnings))

        if call.priority != OPTIONS["priority"].default and not self.limits.priorities:
            message = "this server takes no priorities: start it with --priorities, or leave priority out"
            raise ParameterError("priority", message)
        limit = self.limits.seconds if seconds is None else min(seconds, self.limits.seconds)
        request = Request(call, work, limit, request_id)
        self.queue.submit(request)
        return request

    def _generate(self, request: Request, previews: Previews | None, warnings: tuple[str, ...]) -> Result:
        def progress(finished: int, steps: int) -> None:
            if previews and previews.due(finished, steps):
                previews.show(self.pipeline.preview()[0])

        made = self.pipeline.run(request.call, Callbacks(progress=progress, before_round=request.check))
        report = replace(made.report, request_id=request.id, warnings=(*warnings, *made.report.warnings))
        assert request.started is not None
        self.metrics.queued.observe(request.started - request.accepted + report.seconds["wait"])
        self.metrics.made(report)
        return replace(made, report=report)
