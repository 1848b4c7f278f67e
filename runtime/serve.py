"""`python -m runtime.serve`: OpenAI's image API and a page to try it, in front of one pipeline.

The event loop never waits for the engine: pictures are made on worker threads that share the lanes, begun in the order
of the requests, and given up between two rounds when nobody waits for them any more. Every error is answered in
OpenAI's shape.
"""

from __future__ import annotations

import argparse
import hmac
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.errors import EngineError
from engines.store import BUILD
from runtime.connection import limited_connection
from runtime.limits import Limits
from runtime.logs import REQUEST, Formatter
from runtime.pipeline import MODES, Pipeline
from runtime.request import ApiError, Bodies, EditRequest, ImageRequest, error_body, limited, read_form, read_json, told
from runtime.service import Service, stream, translated, whole

log = logging.getLogger("runtime.serve")
PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
STATUSES = {
    400: "A field cannot be used; `param` names it.", 401: "A key is needed.",
    403: "Another site's page sent a form.", 404: "There is no such model.",
    408: "The body did not arrive in time.", 413: "The body is too large.", 415: "The body is of another type.",
    429: "The queue is full, or too many bodies arrive; see Retry-After.", 500: "The engine failed.",
    503: "The server is shutting down, or too many connect; see Retry-After.", 504: "The request became too old.",
}  # fmt: skip
ERROR_SCHEMA = {
    "type": "object", "required": ["error"], "additionalProperties": False,
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "param", "code"],
        "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
    }},
}  # fmt: skip
LATE_SECONDS = 5.0  # for the last bytes, and for the lanes to stop
KEYS_VARIABLE = "DRIFFUSION_API_KEYS"


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Any exception as {"error": {"message", "type", "param", "code"}}."""
    headers = getattr(error, "headers", None)
    if isinstance(error, HTTPException) and not isinstance(error, ApiError):  # the router's own
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", None, code)
    status, content = told(error)
    return JSONResponse(content, status, headers)


def make_app(service: Service) -> FastAPI:
    """The application around a loaded pipeline."""
    pipeline, limits, bodies = service.pipeline, service.limits, Bodies(service.limits)
    app = FastAPI(title="DRiffusion engine", docs_url=None, redoc_url=None)  # those pages would load from a CDN
    for kind in (HTTPException, EngineError):  # others end in `Known`
        app.add_exception_handler(kind, answer_error)

    app.add_middleware(Known, keys=limits.keys, count=lambda outcome: service.metrics.requests.labels(outcome).inc())

    defaults = pipeline.manifest.defaults
    model, edit = limited(ImageRequest, limits, defaults), limited(EditRequest, limits, defaults)

    async def pictures(asked: ImageRequest, request: Request) -> Response:
        if asked.model not in (None, pipeline.manifest.model):
            message = f"the model {asked.model!r} does not exist; this server has {pipeline.manifest.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        try:
            if asked.stream:
                return await stream(service, asked, request)
            return Response(await whole(service, asked, request), media_type="application/json")
        except Exception as error:
            raise translated(error) from error

    @app.post("/v1/images/generations", **operation("application/json", model))
    async def generations(request: Request) -> Response:
        """Makes n pictures of a prompt, or with `stream` one picture and previews of it."""
        return await pictures(await read_json(request, model, bodies), request)

    @app.post("/v1/images/edits", **operation("multipart/form-data", edit))
    async def edits(request: Request) -> Response:
        """The same, starting from a picture: the last `strength` of the steps are made, with the noise for them."""
        return await pictures(await read_form(request, edit, bodies), request)

    @app.get("/v1/models", responses=described(401))
    async def models() -> dict[str, Any]:
        """The one model of this server, with what the page needs to know."""
        manifest = pipeline.manifest
        shown = ("num_inference_steps", "guidance_scale", "mode", "seed")
        entry = {
            "id": manifest.model, "object": "model", "created": 0, "owned_by": "local", "modes": list(MODES),
            "devices": list(map(str, pipeline.devices)), "lanes": len(pipeline.devices),
            "default_size": f"{manifest.sizes.width}x{manifest.sizes.height}",
            "examples": list(manifest.examples),
            "defaults": {name: model.model_fields[name].default for name in shown},
            "limits": limits.public(), "edits": manifest.image_to_image,
        }  # fmt: skip
        return {"object": "list", "data": [entry]}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "live"}

    @app.get("/health/ready", responses={503: {"description": "Nothing should be sent here; the body says why."}})
    async def ready() -> JSONResponse:
        """Whether every lane works: free ones play a tiny round for it. Nobody is answered before a first picture."""
        trouble = await service.health.trouble()
        return JSONResponse(trouble, 503) if trouble else JSONResponse({"status": "ready"} | service.health.given_up)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    return app


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors of an operation, for the document."""
    error = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": STATUSES[status], "content": error} for status in statuses}


def operation(kind: str, model: type[ImageRequest]) -> dict[str, Any]:
    """What makes pictures, for the document."""
    answered = {"type": "object", "required": ["created", "data"]}
    made = {"application/json": {"schema": answered}, "text/event-stream": {}}
    body = {"required": True, "content": {kind: {"schema": model.model_json_schema()}}}
    return {
        "response_model": None, "openapi_extra": {"requestBody": body},
        "responses": described(*STATUSES) | {200: {"description": "The pictures, or events.", "content": made}},
    }  # fmt: skip


class Known:
    """Gives every request an id, refuses those without a key or on too many connections, counts and logs answers.

    Unexpected errors are answered here: what Starlette has for them lies outside, where nothing is counted.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], count: Callable[[str], None]) -> None:
        self._app, self._keys, self._count = app, keys, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path, start = Headers(scope=scope), scope["path"], time.monotonic()
        number = headers.get("x-request-id", "")
        if not (re.fullmatch(r"[!-~]{1,100}", number)):
            number = uuid.uuid4().hex
        REQUEST.set(number)
        state = scope["state"] = {**scope.get("state", {}), "outcome": 499}  # unless it is answered

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["outcome"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = number
            await send(message)

        target: ASGIApp = self._app
        if state.get("crowded") and not path.startswith("/health/"):
            message, more = "there are too many connections: try again", {"Retry-After": "1", "Connection": "close"}
            target = JSONResponse(error_body(503, message, None, "too_many_connections"), 503, more)
        elif self._keys and path.startswith("/v1/") and not has_key(headers.get("authorization", ""), self._keys):
            message = "send one of this server's keys as Authorization: Bearer KEY"
            target = JSONResponse(error_body(401, message, None, "invalid_api_key"), 401)
        try:
            await target(scope, receive, labelled)
        except Exception as error:
            if state["outcome"] != 499:  # it is too late for another answer: the connection ends
                state["outcome"] = 500
                raise
            await (await answer_error(Request(scope), error))(scope, receive, labelled)
        finally:
            if path.startswith("/v1/"):
                facts = (scope["method"], path, state["outcome"], time.monotonic() - start)
                log.info("method=%s path=%s status=%d seconds=%.3f", *facts)
            if path.startswith("/v1/images/"):
                self._count(str(state["outcome"]))


def has_key(header: str, keys: tuple[str, ...]) -> bool:
    """Whether a bearer token is one of the keys; takes as long for a near miss as for any other."""
    given = header.removeprefix("Bearer ")
    sent = given.encode("latin-1"), given.encode()  # by curl, whose bytes are UTF-8; by a browser, whose are Latin-1
    return sum(hmac.compare_digest(token, key.encode()) for token in sent for key in keys) > 0


def listen(host: str, port: int) -> socket.socket:
    """The port, taken before seconds are spent on loading; who connects meanwhile waits for the answer."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with --port") from error
    # connections inherit it; without, the end of every answer waits 40 ms for the client to confirm its beginning
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """Answers until a signal; then it refuses what is new and finishes what it took, unless Ctrl-C is pressed again."""

    def __init__(self, service: Service) -> None:
        connection, late = limited_connection(service.limits), int(LATE_SECONDS)
        config = uvicorn.Config(make_app(service), http=connection, log_config=None, timeout_graceful_shutdown=late)
        super().__init__(config)
        self._service = service
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end, or hurries it."""
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, daemon=True).start()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    def _drain(self) -> None:
        seconds = self._service.limits.drain
        end = time.monotonic() + seconds
        log.info("Shutting down: %d requests are finished first, within %g s", self._service.jobs.depth, seconds)
        late = self._service.jobs.drain(seconds)
        if late:
            log.warning("%d requests were given up after %g s", late, seconds)
        self.config.timeout_graceful_shutdown = math.ceil(max(end - time.monotonic(), LATE_SECONDS))  # to send answers
        self.should_exit = True


def serve(model: str, devices: str, build: Path, host: str, port: int, limits: Limits) -> None:
    """Loads, then answers until a signal. The exit code is 1 when Ctrl-C was pressed again or a lane hangs."""
    with listen(host, port) as listener:
        pipeline = Pipeline.load(model, devices, build)
        usual = max(pipeline.manifest.sizes.width, pipeline.manifest.sizes.height)
        if usual > limits.side:
            message = f"--max-side {limits.side} rules out the usual pictures of {pipeline.manifest.model}"
            raise EngineError(f"{message}: choose at least {usual}")
        pipeline.generate("", num_inference_steps=1)  # or the first request would pay for first-time allocations
        log.info("%s on %s", pipeline.manifest.model, ", ".join(map(str, pipeline.devices)))
        address = f"[{host}]" if ":" in host else host
        log.info("http://%s:%d (Ctrl-C stops)", address, listener.getsockname()[1])
        service = Service(pipeline, limits)
        server = Server(service)
        server.run([listener])
        closing = threading.Thread(target=pipeline.close, daemon=True)
        if not server.force_exit and not service.jobs.depth:
            closing.start()
            closing.join(LATE_SECONDS)
        if closing.ident is None or closing.is_alive():
            os._exit(1)  # a thread of the engine may be in a long round, or in one that never ends


def read_keys(path: Path | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, UnicodeDecodeError) as error:
        raise EngineError(f"the API keys cannot be read: {error}") from error
    keys = tuple(key.strip() for key in [*lines, *os.environ.get(KEYS_VARIABLE, "").split(",")] if key.strip())
    if path and not keys:
        raise EngineError(f"{path} holds no API key: write one per line, or leave --api-keys out")
    return keys


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--api-keys", type=Path, help=f"file with one key per line; also ${KEYS_VARIABLE}, by commas")
    for option, name, text in (
        ("--queue", "queue", "requests that may wait; more get 429"),
        ("--timeout", "seconds", "seconds until a request gets 504, or 408 while it arrives"),
        ("--connections", "connections", "open connections; requests on more get 503"),
        ("--drain", "drain", "seconds to finish what was accepted, after SIGTERM or Ctrl-C"),
        ("--lane-timeout", "lane_seconds", "seconds of one round after which the server is no longer ready"),
        ("--max-body", "body", "bytes of a request"),
        ("--max-upload", "upload", "bytes of a request with a picture"),
        ("--max-prompt", "prompt", "characters of a prompt"),
        ("--max-side", "side", "pixels of width and of height"),
        ("--max-steps", "steps", "num_inference_steps"),
        ("--max-n", "n", "pictures of one request"),
    ):
        default = getattr(Limits, name)
        kind = at_least_zero if isinstance(default, float) or name == "queue" else at_least_one
        parser.add_argument(option, dest=name, type=kind(type(default)), default=default, help=f"{text}; {default}")
    return parser


def at_least_zero(kind: type[float]) -> Callable[[str], float]:
    """A finite number that is not negative, for the command line."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
        return value

    return number


def at_least_one(kind: type[float]) -> Callable[[str], float]:
    """A whole number of at least 1, for the command line."""

    def number(text: str) -> float:
        value = kind(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
        return value

    return number


def main() -> int:
    """The command line; exit code 1 with one message when it cannot serve, 0 after Ctrl-C or SIGTERM."""
    options = vars(arguments().parse_args())
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as for Ctrl-C
    try:
        keys = read_keys(options.pop("api_keys"))
        own = {field.name: options.pop(field.name) for field in fields(Limits) if field.name in options}
        with suppress(KeyboardInterrupt):  # while it loads
            serve(**options, limits=Limits(**own, keys=keys))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
