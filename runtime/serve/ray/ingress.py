"""The ingress: owns the HTTP requests of a cluster, and asks replicas for their answers by handle.

A request whose replica dies is asked again of another one, with what is left of its time and the same seed, so that the
image is the same. Clients that have previews of it already get the ones that follow.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from prometheus_client import CollectorRegistry, Counter, generate_latest
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.call import CHOSEN_SEEDS
from runtime.serve.http.body import Bodies, BodyError
from runtime.serve.openai.body import parse_form
from runtime.serve.openai.errors import ApiError, answer_error, error_response, to_api_error
from runtime.serve.openai.middleware import AccessMiddleware
from runtime.serve.ray.gathered import add_gathered
from runtime.serve.ray.message import Asked, Part
from runtime.serve.ray.settings import Settings
from runtime.serve.request import DeadlineError, QueueFullError

log = logging.getLogger("runtime.serve")
RETRIES = 2  # of a request whose replica died
GRACE_SECONDS = 2.0  # that a replica has to say itself that the time is over
RETRY_SECONDS = 5
DEATHS = (RayActorError, ObjectLostError)  # the actor, or the node that held a part of its answer
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class DiedError(ApiError):
    """No replica lived long enough."""

    def __init__(self) -> None:
        message = f"the replicas that were asked for this died, {RETRIES + 1} in a row: try again"
        super().__init__(503, message, None, "replica_died", {"Retry-After": str(RETRY_SECONDS)})


class Ingress:
    """The deployment. `handles` are those of the models, in the order of the settings; the first is the default."""

    def __init__(self, settings: Settings, *handles: Any) -> None:
        self._settings, self._limits = settings, settings.served
        self.handles: Mapping[str, Any] = dict(zip((one.name for one in settings.models), handles, strict=True))
        self._bodies = Bodies(self._limits)
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "driffusion_cluster_requests", "Requests of clients for images by outcome, as HTTP statuses.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self._retries = Counter(
            "driffusion_cluster_retries", "Requests asked again because their replica died.", registry=registry
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """See `ray.serve.ingress`."""
        app = Starlette()
        app.router.redirect_slashes = False
        for kind in (ApiError, BodyError):
            app.add_exception_handler(kind, answer_error)
        add_gathered(app, self.handles, self._ask)
        app.router.routes.append(Route("/{path:path}", self._forward, methods=list(METHODS)))
        count = self._requests
        return _once(AccessMiddleware(app, self._settings.access, lambda outcome: count.labels(outcome).inc()))

    def metrics(self) -> tuple[str, bytes]:
        """The ingress' name, and Prometheus' text of what only it knows."""
        return serve.get_replica_context().replica_id.unique_id, generate_latest(self._registry)

    async def _ask(self, name: str, http: HttpRequest) -> Part:
        """The whole answer of a model to a request without a body."""
        parts = [part async for part in self._parts(name, self._asked(http, b""), time.monotonic())]
        return parts[0]._replace(body=b"".join(part.body for part in parts))

    def _asked(self, http: HttpRequest, body: bytes) -> Asked:
        seed = secrets.randbelow(CHOSEN_SEEDS)
        return Asked(
            uuid.uuid4().hex, self._limits.seconds, seed, http.method, http.url.path, http.scope["query_string"],
            _with_id(http), body,
        )  # fmt: skip

    async def _forward(self, http: HttpRequest) -> Response:
        """The answer of a replica of the model that the request names."""
        accepted = time.monotonic()
        body = await self._bodies.read(http, self._limits.upload)
        answer = self._parts(await self._model(http, body), self._asked(http, body), accepted)
        first = await _unless_gone(anext(answer), http)
        if first is None:
            await answer.aclose()
            raise ApiError(499, "the client went away", None, "cancelled")
        return Relayed(first, answer)

    async def _parts(self, name: str, asked: Asked, accepted: float) -> AsyncGenerator[Part]:
        """The parts of one answer, whichever replicas they come from; an ApiError can only be before the first."""
        sent, handle = 0, self.handles[name].options(method_name="answer", stream=True)
        for attempt in range(RETRIES + 1):
            left = self._limits.seconds - (time.monotonic() - accepted)
            parts = handle.remote(asked._replace(seconds=round(max(left, 0.0), 3)))
            try:
                async for part in self._from_one(parts, left, again=sent):
                    sent += 1
                    yield part
                return
            except DEATHS as error:
                log.warning("request=%s: its replica died (%s), attempt %d", asked.id, type(error).__name__, attempt)
                self._retries.inc()
                failure: Exception = DiedError()
            except BackPressureError as error:
                failure = QueueFullError(error.args[0], 1)
            except DeploymentUnavailableError as error:
                failure = ApiError(503, str(error), None, "unavailable", {"Retry-After": str(RETRY_SECONDS)})
            except DeadlineError as error:
                failure = error
            finally:
                parts.cancel()
            if not isinstance(failure, DiedError):
                break
        if not sent:
            raise to_api_error(failure)
        yield Part(_event(failure), more=False)

    async def _from_one(self, parts: Any, left: float, again: int) -> AsyncIterator[Part]:
        """One replica's parts, without the first `again`, which the client has; DeadlineError, and Ray's."""
        end, number = asyncio.get_running_loop().time() + left + GRACE_SECONDS, 0
        while True:
            try:
                async with asyncio.timeout_at(end):
                    part: Part = await anext(parts)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise DeadlineError(f"no replica answered within {self._limits.seconds:g} s: try later") from None
            number += 1
            if again and part.status >= 400:  # too late for a status
                yield Part(_event(part.body), more=False)
                return
            if number > again:
                yield part

    async def _model(self, http: HttpRequest, body: bytes) -> str:
        """The name of the model that a request is for; ApiError when there is none of that name."""
        default, name = next(iter(self.handles)), None
        path, kind = http.url.path, http.headers.get("content-type", "").lower()
        for root in ("/v1/models/", "/v2/models/"):
            if path.startswith(root):
                rest = path.removeprefix(root)
                name = rest if root == "/v1/models/" else rest.split("/")[0]
        if path.startswith("/v1/images/") and len(self.handles) > 1:
            if kind.startswith("application/json"):
                name = _named(body)
            elif kind.startswith("multipart/form-data"):
                name = (await parse_form(http, body, self._limits)).get("model")
        if name is None or len(self.handles) == 1:  # a single model's replica says itself what it has
            return default
        if name not in self.handles:
            known = ", ".join(map(repr, self.handles))
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {known}", "model", "model_not_found"
            )
        return str(name)


class Relayed(Response):
    """An answer of which the first part is there. When the client goes away, the replica hears of it."""

    def __init__(self, first: Part, rest: AsyncGenerator[Part]) -> None:
        super().__init__()
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        http, part = HttpRequest(scope, receive), self._first
        try:
            await send({"type": "http.response.start", "status": part.status, "headers": list(part.headers)})
            while True:
                await send({"type": "http.response.body", "body": part.body, "more_body": part.more})
                if not part.more:
                    return
                following = await _unless_gone(anext(self._rest), http)
                if following is None:
                    scope["state"]["outcome"] = 499
                    return
                part = following
        finally:
            await self._rest.aclose()


async def _unless_gone(wanted: Any, http: HttpRequest) -> Part | None:
    """What is wanted, or None when the client disconnects before it is there."""
    task = asyncio.ensure_future(wanted)
    gone = asyncio.ensure_future(http.receive())  # the body has been read
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            part: Part = task.result()
            return part
        return None
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def _once(app: ASGIApp) -> ASGIApp:
    """Without the header x-request-id, which Ray's proxy adds to every answer."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers["x-request-id"]
            await send(message)

        await app(scope, receive, sent)

    return wrapped


def _with_id(http: HttpRequest) -> tuple[tuple[bytes, bytes], ...]:
    """The request's headers, with its id."""
    others = [(name, value) for name, value in http.headers.raw if name != b"x-request-id"]
    return (*others, (b"x-request-id", http.state.request_id.encode()))


def _named(body: bytes) -> Any:
    """The model of a JSON body; None where it is none, of which the replica speaks."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        return None
    name = given.get("model") if isinstance(given, dict) else None
    return name if isinstance(name, str) else None


def _event(failure: Exception | bytes) -> bytes:
    """OpenAI's error event."""
    content = json.loads(failure) if isinstance(failure, bytes) else error_response(to_api_error(failure))[1]
    return f"event: error\ndata: {json.dumps({'type': 'error'} | content)}\n\n".encode()
