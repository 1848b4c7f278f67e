"""Answers in OpenAI's shape, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from runtime.pipeline import Pipeline, Result
from runtime.serve.openai.errors import error_response, to_api_error
from runtime.serve.openai.schema import ImageRequest
from runtime.serve.queue import CancelledError, Job
from runtime.serve.service import Service

# clients expect it; nothing is sold here
USAGE = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0,
         "input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}  # fmt: skip


def generate(pipeline: Pipeline, asked: ImageRequest, job: Job, show: Callable[[int, int], None]) -> Result:
    """The images of a request, given up between rounds when the job says so; `show(finished, steps)` may look."""

    return pipeline.generate(asked.prompt, progress=show, before_round=job.check, **asked.arguments())


def answer(asked: ImageRequest, result: Result) -> bytes:
    """The whole answer, encoded on the engine's thread, so that the event loop only has bytes to send."""
    content = {
        "created": int(time.time()), "data": [{"b64_json": asked.encode(image)} for image in result.images],
        **asked.facts(result.images[0]), "usage": USAGE, "report": result.report.to_dict(),
    }  # fmt: skip
    return json.dumps(content).encode()


class Previews:
    """Says when a request's partial images are due: evenly over its steps, at the first round end after each."""

    def __init__(self, asked: ImageRequest) -> None:
        self._wanted = asked.partial_images
        self.shown = 0

    def due(self, finished: int, steps: int) -> bool:
        """Whether to show one now; the finished image is none."""
        next_one = steps * (self.shown + 1) / (self._wanted + 1)
        if finished >= steps or self.shown == self._wanted or finished < next_one:
            return False
        self.shown += 1
        return True


def make_whole(service: Service, asked: ImageRequest, job: Job) -> bytes:
    """One answer with everything, made on the engine's thread."""
    result = generate(service.pipeline, asked, job, lambda finished, steps: None)
    return answer(asked, service.record(job, result))


def make_stream(service: Service, asked: ImageRequest, job: Job, send: Callable[[bytes], None]) -> None:
    """Events for partial images and the finished one, sent from the engine's thread."""
    previews, created = Previews(asked), int(time.time())

    def event(kind: str, image: Any, **more: Any) -> None:
        content = {
            "type": f"{asked.event}.{kind}", "b64_json": asked.encode(image), "created_at": created,
            **asked.facts(image), **more,
        }  # fmt: skip
        send(f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode())

    def show(finished: int, steps: int) -> None:
        if previews.due(finished, steps):
            event("partial_image", service.pipeline.preview()[0], partial_image_index=previews.shown - 1)

    result = service.record(job, generate(service.pipeline, asked, job, show))
    event("completed", result.images[0], usage=USAGE, report=result.report.to_dict())


async def whole(service: Service, asked: ImageRequest, request: Request) -> bytes:
    """The answer, unless the client goes away first, which ends the work before its next round."""
    job = service.submit(lambda job: make_whole(service, asked, job))
    content: bytes = await wait_or_cancel(asyncio.wrap_future(job.future), job, request)
    return content


async def wait_or_cancel(wanted: asyncio.Future[Any], job: Job, request: Request) -> Any:
    """What is waited for, unless the client goes away first, or the deadline comes.

    Then the job is cancelled, and nobody waits for the round that it may be in.
    """
    wanted.add_done_callback(lambda one: one.cancelled() or one.exception())  # looked at, also when nobody waits
    gone = asyncio.ensure_future(request.receive())  # the body has been read: the next message is the disconnection
    try:
        await asyncio.wait({wanted, gone}, timeout=max(job.left, 0), return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            reason = CancelledError() if gone.done() else job.late()
            job.cancel(reason)
            raise reason
        return await wanted
    except asyncio.CancelledError:  # the server is going down
        job.cancel()
        raise
    finally:
        gone.cancel()


async def stream(service: Service, asked: ImageRequest, request: Request) -> StreamingResponse:
    """Server-sent events. The first is made before the status is sent, so that early errors are plain HTTP errors."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()

    def send(event: bytes | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    job = service.submit(lambda job: make_stream(service, asked, job, send))
    job.future.add_done_callback(lambda _: send(None))
    first = await wait_or_cancel(asyncio.ensure_future(events.get()), job, request)
    if first is None:
        await asyncio.wrap_future(job.future)

    async def following() -> bytes | None:
        try:
            async with asyncio.timeout(max(job.left, 0)):
                return await events.get()  # what is there already comes also after the deadline
        except TimeoutError:
            raise job.late() from None

    async def body() -> AsyncIterator[bytes]:
        event = first
        outcome = 499
        try:
            while event is not None:
                yield event
                event = await following()
            await asyncio.wrap_future(job.future)
            outcome = 200
        except Exception as error:  # noqa: BLE001 - this is the only place where it can be told
            outcome, content = error_response(to_api_error(error))
            yield f"event: error\ndata: {json.dumps({'type': 'error'} | content)}\n\n".encode()
        finally:
            request.scope["state"]["outcome"] = outcome
            job.cancel()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
