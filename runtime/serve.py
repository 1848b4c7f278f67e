"""`python -m runtime.serve`: OpenAI's image API and a page to try it, in front of one pipeline.

The event loop never waits for the engine: pictures are made on one worker thread, in the order of the requests, and
given up between two rounds when nobody waits for them any more. Every error is answered in OpenAI's shape.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.jobs import CancelledError, DeadlineError, Job, Jobs, QueueFullError
from runtime.metrics import Metrics
from runtime.pipeline import MODES, Pipeline, Result
from runtime.request import MAX_BODY, ApiError, ImageRequest, parse_size, read_request

__all__ = ["MAX_BODY", "Limits", "make_app"]

log = logging.getLogger("runtime.serve")
PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STATUSES = {
    400: "A field cannot be used; `param` names it.", 401: "A key is needed.", 404: "There is no such model.",
    413: "The body is too large.", 415: "The body is not JSON.", 429: "The queue is full; see Retry-After.",
    500: "The engine failed.", 504: "The request became too old.",
}  # fmt: skip
KEYS_VARIABLE = "DRIFFUSION_API_KEYS"


@dataclass(frozen=True)
class Limits:
    """What a server allows. `keys` are accepted as bearer tokens; none means that everyone may ask."""

    queue: int = 32
    seconds: float = 120.0
    keys: tuple[str, ...] = ()


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Any exception as {"error": {"message", "type", "param", "code"}}; a line in the log when it is our fault."""
    status, message, param, code = 500, str(error), getattr(error, "param", None), None
    if isinstance(error, ApiError):
        status, message, code = error.status_code, error.detail, error.code
    elif isinstance(error, HTTPException):  # the router's own
        status, message = error.status_code, f"{request.method} {request.url.path}: {error.detail}"
        code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    elif isinstance(error, ParameterError):
        status, param, code = 400, {"width": "size", "height": "size"}.get(error.param, error.param), "invalid_value"
    else:
        log.error("request failed: %r", error)  # uvicorn adds the traceback of what is no EngineError
        known = isinstance(error, EngineError)
        message, code = (message, "engine_error") if known else ("unexpected error, see the server's log", None)
    return JSONResponse(error_body(status, message, param, code), status, getattr(error, "headers", None))


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def translated(error: Exception) -> Exception:
    """What the queue says, as an HTTP status."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), None, "queue_full", {"Retry-After": str(error.retry_after)})
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), None, "deadline_exceeded")
    if isinstance(error, CancelledError):
        return ApiError(499, "the client went away", None, "cancelled")
    return error


def generate(pipeline: Pipeline, asked: ImageRequest, job: Job, show: Callable[[int], None]) -> Result:
    """The pictures of a request, given up between rounds when the job says so; `show(finished steps)` may look."""

    def progress(finished: int) -> None:
        job.check()
        show(finished)

    return pipeline.generate(asked.prompt, progress=progress, **asked.arguments())


def answer(asked: ImageRequest, result: Result) -> bytes:
    """The whole answer, encoded on the engine's thread, so that the event loop only has bytes to send."""
    content = {
        "created": int(time.time()), "data": [{"b64_json": asked.encode(image)} for image in result.images],
        **asked.facts(result.images[0]), "report": result.report.to_dict(),
    }  # fmt: skip
    return json.dumps(content).encode()


class Previews:
    """Says when a request's partial pictures are due: evenly over its steps, at the first round end after each."""

    def __init__(self, asked: ImageRequest) -> None:
        steps, wanted = asked.num_inference_steps, asked.partial_images
        self._due = [steps * (n + 1) / (wanted + 1) for n in range(wanted)]
        self._steps = steps
        self.shown = 0

    def due(self, finished: int) -> bool:
        """Whether to show one now; the finished picture is none."""
        if finished >= self._steps or self.shown == len(self._due) or finished < self._due[self.shown]:
            return False
        self.shown += 1
        return True


class Service:
    """The pipeline behind its queue: one method per kind of answer."""

    def __init__(self, pipeline: Pipeline, limits: Limits) -> None:
        self.pipeline, self.limits = pipeline, limits
        self.jobs = Jobs(limits.queue)
        self.metrics = Metrics(lambda: self.jobs.depth, lambda: len(pipeline.lost))

    def whole(self, asked: ImageRequest, job: Job) -> bytes:
        """One answer with everything, made on the engine's thread."""
        return answer(asked, self._made(job, generate(self.pipeline, asked, job, lambda finished: None)))

    def streamed(self, asked: ImageRequest, job: Job, send: Callable[[bytes], None]) -> None:
        """Events for partial pictures and the finished one, sent from the engine's thread."""
        previews, created = Previews(asked), int(time.time())

        def event(kind: str, image: Any, **more: Any) -> None:
            content = {
                "type": f"image_generation.{kind}", "b64_json": asked.encode(image), "created_at": created,
                **asked.facts(image), **more,
            }  # fmt: skip
            send(f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode())

        def show(finished: int) -> None:
            if previews.due(finished):
                event("partial_image", self.pipeline.preview()[0], partial_image_index=previews.shown - 1)

        result = self._made(job, generate(self.pipeline, asked, job, show))
        usage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
        event("completed", result.images[0], usage=usage, report=result.report.to_dict())

    def _made(self, job: Job, result: Result) -> Result:
        assert job.started is not None
        self.metrics.queued.observe(job.started - job.asked)
        self.metrics.made(result.report)
        return result

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Into the queue, or ApiError 429."""
        try:
            return self.jobs.submit(work, self.limits.seconds)
        except QueueFullError as error:
            raise translated(error) from None


def make_app(pipeline: Pipeline, limits: Limits | None = None) -> FastAPI:
    """The application around a loaded pipeline."""
    service = Service(pipeline, limits or Limits())
    app = FastAPI(title="DRiffusion engine", docs_url=None, redoc_url=None)  # those pages would load from a CDN
    for kind in (HTTPException, EngineError, Exception):
        app.add_exception_handler(kind, answer_error)

    app.add_middleware(Known, keys=service.limits.keys)

    schema = {"application/json": {"schema": ImageRequest.model_json_schema()}}
    refusals = {code: {"description": text} for code, text in STATUSES.items()}

    @app.post(
        "/v1/images/generations", response_model=None, responses=refusals,  # type: ignore[arg-type]
        openapi_extra={"requestBody": {"required": True, "content": schema}},
    )  # fmt: skip
    async def generations(request: Request, asked: Annotated[ImageRequest, Depends(read_request)]) -> Response:
        """Makes n pictures of a prompt, or with `stream` one picture and previews of it."""
        if asked.model not in (None, pipeline.manifest.model):
            message = f"the model {asked.model!r} does not exist; this server has {pipeline.manifest.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        parse_size(asked.size)
        try:
            if asked.stream:
                return await stream(service, asked, request)
            content = await whole(service, asked, request)
        except Exception as error:
            final = translated(error)
            status = (
                final.status_code if isinstance(final, ApiError) else 400 if isinstance(error, ParameterError) else 500
            )
            service.metrics.requests.labels(str(status)).inc()
            raise final from error
        service.metrics.requests.labels("200").inc()
        return Response(content, media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model of this server, with what the page needs to know."""
        manifest, fields = pipeline.manifest, ImageRequest.model_fields
        shown = ("num_inference_steps", "guidance_scale", "mode", "seed")
        entry = {
            "id": manifest.model, "object": "model", "created": 0, "owned_by": "local", "modes": list(MODES),
            "devices": list(map(str, pipeline.devices)), "default_size": f"{manifest.width}x{manifest.height}",
            "examples": list(manifest.examples),
            "defaults": {name: fields[name].default for name in shown},
        }  # fmt: skip
        return {"object": "list", "data": [entry]}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """Whether every lane works; `serve` answers nobody before the engine has made a picture."""
        if pipeline.lost:
            return JSONResponse({"status": "degraded", "lost": list(pipeline.lost)}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    return app


class Known:
    """Gives every request an id, asks for a key where there are some, and logs what was answered."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path, start = Headers(scope=scope), scope["path"], time.monotonic()
        number = headers.get("x-request-id", "")
        if not (re.fullmatch(r"[!-~]{1,100}", number)):
            number = uuid.uuid4().hex
        statuses: list[int] = []

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        target: ASGIApp = self._app
        if self._keys and path.startswith("/v1/") and not has_key(headers.get("authorization", ""), self._keys):
            message = "send one of this server's keys as Authorization: Bearer KEY"
            target = JSONResponse(error_body(401, message, None, "invalid_api_key"), 401)
        try:
            await target(scope, receive, labelled)
        finally:
            if path.startswith("/v1/"):
                facts = (number, scope["method"], path, statuses[0] if statuses else 0, time.monotonic() - start)
                log.info("request=%s method=%s path=%s status=%d seconds=%.3f", *facts)


def has_key(header: str, keys: tuple[str, ...]) -> bool:
    """Whether a bearer token is one of the keys; takes as long for a near miss as for any other."""
    given = header.removeprefix("Bearer ").encode()
    return sum(hmac.compare_digest(given, key.encode()) for key in keys) > 0


async def whole(service: Service, asked: ImageRequest, request: Request) -> bytes:
    """The answer, unless the client goes away first, which ends the work before its next round."""
    job = service.submit(lambda job: service.whole(asked, job))
    content: bytes = await unless_gone(asyncio.wrap_future(job.future), job, request)
    return content


async def unless_gone(wanted: asyncio.Future[Any], job: Job, request: Request) -> Any:
    """What is waited for; when the client goes away first, its job is cancelled, and then what becomes of that."""
    gone = asyncio.ensure_future(request.receive())  # the body has been read: the next message is the disconnection
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            job.cancel()
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

    job = service.submit(lambda job: service.streamed(asked, job, send))
    job.future.add_done_callback(lambda _: send(None))
    first = await unless_gone(asyncio.ensure_future(events.get()), job, request)
    if first is None:
        await asyncio.wrap_future(job.future)

    async def body() -> AsyncIterator[bytes]:
        event = first
        try:
            while event is not None:
                yield event
                event = await events.get()
            await asyncio.wrap_future(job.future)
            service.metrics.requests.labels("200").inc()
        except (EngineError, DeadlineError) as error:
            final = translated(error)
            status = final.status_code if isinstance(final, ApiError) else 500
            service.metrics.requests.labels(str(status)).inc()
            content = {"type": "error"} | error_body(status, str(error), None, None)
            yield f"event: error\ndata: {json.dumps(content)}\n\n".encode()
        finally:
            job.cancel()

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def listen(host: str, port: int) -> socket.socket:
    """The port, taken before seconds are spent on loading; who connects meanwhile waits for the answer."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with --port") from error


def serve(model: str, devices: str, build: Path, host: str, port: int, limits: Limits) -> None:
    """Loads, then answers until a signal; requests in flight are finished, unless Ctrl-C is pressed again."""
    with listen(host, port) as listener:
        pipeline = Pipeline.load(model, devices, build)
        pipeline.generate("", num_inference_steps=1)  # or the first request would pay for first-time allocations
        log.info("%s on %s", pipeline.manifest.model, ", ".join(map(str, pipeline.devices)))
        address = f"[{host}]" if ":" in host else host
        log.info("http://%s:%d (Ctrl-C stops)", address, listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(make_app(pipeline, limits), log_config=None))
        with suppress(KeyboardInterrupt):
            server.run([listener])
        if server.force_exit:
            os._exit(1)  # the engine's thread may be in the middle of a long picture
        pipeline.close()


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment."""
    try:
        lines = path.read_text().splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the API keys cannot be read: {error}") from error
    keys = tuple(key.strip() for key in [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")] if key.strip())
    if path and not keys:
        raise EngineError(f"{path} holds no API key: write one per line, or leave --api-keys out")
    return keys


def main() -> int:
    """The command line; exit code 1 with one message when it cannot serve, 0 after Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--queue", type=int, default=Limits.queue, help="requests that may wait; more get 429")
    parser.add_argument("--timeout", type=float, default=Limits.seconds, help="seconds until a request gets 504")
    parser.add_argument("--api-keys", type=Path, help=f"file with one key per line; also ${KEYS_VARIABLE}, by commas")
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as for Ctrl-C
    try:
        limits = Limits(options.pop("queue"), options.pop("timeout"), read_keys(options.pop("api_keys")))
        with suppress(KeyboardInterrupt):  # while it loads
            serve(**options, limits=limits)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
