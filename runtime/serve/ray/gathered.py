"""What a cluster answers from all of its models or replicas: the models, readiness, statistics, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi import Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.routing import Route

from runtime.serve.ray.message import Part

SECONDS = 5.0  # that replicas have for what all of them are asked
Ask = Callable[[str, HttpRequest], Awaitable[Part]]


def add_gathered(app: Starlette, handles: Mapping[str, Any], ask: Ask) -> None:
    """The routes. `ask(model, request)` is the whole answer of one replica of a model."""

    def route(path: str, handler: Callable[[HttpRequest], Awaitable[Response]], *methods: str) -> None:
        app.router.routes.append(Route(path, handler, methods=list(methods or ("GET", "HEAD"))))

    async def models(http: HttpRequest) -> Response:
        return await merged(
            http, lambda found: {"object": "list", "data": [one for each in found for one in each["data"]]}
        )

    async def index(http: HttpRequest) -> Response:
        return await merged(http, lambda found: [one for each in found for one in each])

    async def merged(http: HttpRequest, merge: Callable[[Sequence[Any]], Any]) -> Response:
        parts = await asyncio.gather(*(ask(name, http) for name in handles))
        for part in parts:
            if part.status != 200:
                return Response(part.body, part.status, {k.decode(): v.decode() for k, v in part.headers})
        if http.method == "HEAD":
            return Response()
        return JSONResponse(merge([json.loads(part.body) for part in parts]))

    async def live(http: HttpRequest) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(http: HttpRequest) -> Response:
        missing = [name for name in unready(await running(handles)) if http.path_params.get("name", name) == name]
        if not missing:
            return JSONResponse({"status": "ready"})
        message = f"no replica of {', '.join(missing)} is ready"
        v2 = http.url.path.startswith("/v2")
        return JSONResponse({"error": message} if v2 else {"status": "starting", "message": message}, 503)

    async def statistics(http: HttpRequest) -> Response:
        names = [http.path_params["name"]] if "name" in http.path_params else list(handles)
        if names[0] not in handles:
            return JSONResponse({"error": f"there is no model {names[0]!r}: this server has {', '.join(handles)}"}, 404)
        found = [added(await everyone(handles[name], "statistics")) for name in names]
        return JSONResponse({"model_stats": [one for one in found if one]})

    async def metrics(http: HttpRequest) -> Response:
        context = serve.get_replica_context()
        asked = {name: handles[name] for name in handles}
        asked[""] = serve.get_deployment_handle(context.deployment, context.app_name)
        found = await asyncio.gather(*(everyone(handle, "metrics") for handle in asked.values()))
        texts = [(name, *one) for name, several in zip(asked, found, strict=True) for one in several]
        return Response(joined(texts), media_type="text/plain; version=0.0.4; charset=utf-8")

    route("/v1/models", models)
    route("/v2/repository/index", index, "POST")
    for root in ("", "/v2"):
        route(f"{root}/health/live", live)
        route(f"{root}/health/ready", ready)
    route("/metrics", metrics)
    route("/v2/models/stats", statistics)
    for versioned in ("/v2/models/{name}", "/v2/models/{name}/versions/1"):
        route(f"{versioned}/ready", ready)
        route(f"{versioned}/stats", statistics)


async def everyone(handle: Any, method: str) -> list[Any]:
    """What the replicas of a deployment answer in time, dead and late ones left out; there may be none."""
    try:
        found = await handle.broadcast(method).results_async(timeout_s=SECONDS, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError):
        return []
    return [one for one in found if not isinstance(one, BaseException)]


async def running(handles: Mapping[str, Any]) -> dict[str, int]:
    """By model, how many replicas Ray's controller finds healthy by the engines' own readiness."""
    status = await asyncio.to_thread(serve.status)
    deployments = status.applications[serve.get_replica_context().app_name].deployments
    found = {}
    for name, handle in handles.items():
        there = deployments.get(handle.deployment_name)
        found[name] = 0 if there is None else sum(n for state, n in there.replica_states.items() if state == "RUNNING")
    return found


def unready(replicas: Mapping[str, int]) -> Iterator[str]:
    """The models of which no replica is ready."""
    return (name for name, number in replicas.items() if not number)


def added(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Triton's statistics of all replicas of a model: sums, and the latest time."""
    total: dict[str, Any] = {}
    for one in several:
        for name, value in one.items():
            if isinstance(value, Mapping):
                total[name] = added([total[name], value] if name in total else [value])
            elif isinstance(value, int) and name in total:
                total[name] = max(total[name], value) if name == "last_inference" else total[name] + value
            else:
                total[name] = value
    return total


def joined(texts: Iterable[tuple[str, str, bytes]]) -> bytes:
    """One exposition of several: (model, replica, text), which become labels of every sample."""
    families: dict[str, Metric] = {}
    for model, replica, text in texts:
        for family in text_string_to_metric_families(text.decode()):
            kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica} | ({"model": model} if model else {})
                kept.samples.append(sample._replace(labels=labels))

    class Kept(Collector):
        def collect(self) -> Iterable[Metric]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Kept())
    return generate_latest(registry)
