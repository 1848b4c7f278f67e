"""Answers in OpenAI's shape, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse
from PIL import Image

from runtime.pipeline import Result
from runtime.report import Report
from runtime.serve.http.wait import wait_or_cancel
from runtime.serve.openai.errors import error_response, to_api_error
from runtime.serve.openai.schema import Body
from runtime.serve.request import Request
from runtime.serve.service import Previews, Service

# clients expect it; nothing is sold here
USAGE = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0,
         "input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}  # fmt: skip


def encode_answer(body: Body, result: Result) -> bytes:
    """The JSON of a whole answer."""
    data = [body.datum(image, result.report, n) for n, image in enumerate(result.images)]
    content = {
        "created": int(time.time()), "data": data,
        **body.facts(result.images[0]), "usage": USAGE, "report": result.report.to_dict(),
    }  # fmt: skip
    return json.dumps(content).encode()


def encode_event(
    body: Body, kind: str, image: Image.Image, created: int, report: Report | None = None, **more: Any
) -> bytes:
    """A server-sent event with an image: `partial_image` or `completed`."""
    more |= {} if report is None else {"report": report.to_dict()}
    content = {
        "type": f"{body.event}.{kind}", "b64_json": body.encode(image, report), "created_at": created,
        **body.facts(image), **more,
    }  # fmt: skip
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode()


async def whole(service: Service, body: Body, http: HttpRequest) -> bytes:
    """The answer; when the client disconnects first, the request is cancelled at the next round."""
    request = service.submit(
        body.call(), lambda result: encode_answer(body, result),
        request_id=http.state.request_id, warnings=body.warnings(),
    )  # fmt: skip
    content: bytes = await wait_or_cancel(asyncio.wrap_future(request.future), request, http)
    return content


async def stream(service: Service, body: Body, http: HttpRequest) -> StreamingResponse:
    """Server-sent events. The first is made before the status is sent, so that early errors are plain HTTP errors."""
    loop, events, created = asyncio.get_running_loop(), asyncio.Queue[bytes | None](), int(time.time())

    def send(event: bytes | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def preview(index: int, image: Image.Image) -> None:
        send(encode_event(body, "partial_image", image, created, partial_image_index=index))

    def finish(result: Result) -> None:
        send(encode_event(body, "completed", result.images[0], created, result.report, usage=USAGE))

    request = service.submit(
        body.call(), finish, Previews(body.partial_images, preview),
        request_id=http.state.request_id, warnings=body.warnings(),
    )  # fmt: skip
    request.future.add_done_callback(lambda _: send(None))
    first = await wait_or_cancel(asyncio.ensure_future(events.get()), request, http)
    if first is None:
        await asyncio.wrap_future(request.future)
    content = follow(request, first, events, http)
    return StreamingResponse(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def follow(
    request: Request, first: bytes | None, events: asyncio.Queue[bytes | None], http: HttpRequest
) -> AsyncIterator[bytes]:
    """The events of a request from the first one on, until None; an error is the last event."""
    event, outcome = first, 499
    try:
        while event is not None:
            yield event
            event = await next_event(request, events)
        await asyncio.wrap_future(request.future)
        outcome = 200
    except Exception as error:  # noqa: BLE001 - the status has been sent: this is the only place to report it
        outcome, content = error_response(to_api_error(error))
        yield f"event: error\ndata: {json.dumps({'type': 'error'} | content)}\n\n".encode()
    finally:
        http.scope["state"]["outcome"] = outcome
        request.cancel()


async def next_event(request: Request, events: asyncio.Queue[bytes | None]) -> bytes | None:
    """The next event; DeadlineError when none comes in time. Those that are there already come also after that."""
    try:
        async with asyncio.timeout(max(request.seconds_left, 0)):
            return await events.get()
    except TimeoutError:
        raise request.deadline_error() from None
