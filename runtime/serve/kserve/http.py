"""The protocol over HTTP, with Triton's binary tensor extension and its shape of errors: {"error": MESSAGE}."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import zlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest

from engines.errors import ParameterError
from runtime.serve.access import Access
from runtime.serve.http.body import Bodies, BodyError
from runtime.serve.http.wait import wait_or_cancel
from runtime.serve.kserve.codec import Inference
from runtime.serve.kserve.model import VERSION, Model, status_of
from runtime.serve.kserve.refused import FIXED, NO_LOGS, NO_TRACES, Refused
from runtime.serve.kserve.regions import CUDA, SYSTEM, Regions
from runtime.serve.kserve.tensor import MOST_TENSORS, SHORT, Tensor, from_raw, from_values

log = logging.getLogger(__name__)
HEADER = "inference-header-content-length"
LISTED_BYTES = 16  # of memory that an element of a list takes before and while it becomes JSON
ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # `deflate` means zlib's format, RFC 9110
Handler = Callable[[HttpRequest], Awaitable[Any]]


def add_routes(app: FastAPI, model: Model, access: Access) -> None:
    """Every path that Triton's HTTP client calls: answered, or refused in the shape that it can read."""
    bodies: Bodies = app.state.bodies

    async def infer(http: HttpRequest) -> Response:
        name_checked(http, model)
        limits = model.service.limits
        content = await decompressed(await bodies.read(http, limits.upload), http.headers, limits.upload)
        # a thread, where parsing would keep the event loop from other clients
        parsing, quick = partial(parse, content, http.headers, model.regions, limits.body), model.regions.quick
        inference, binary = parsing() if quick and len(content) <= SHORT else await asyncio.to_thread(parsing)
        packing = encoding(http.headers)
        call = await model.call(inference, pixel_bytes=1 if binary["image"] else LISTED_BYTES)
        wrapped = model.submit(
            inference, call, request_id=http.state.request_id, seconds=model.seconds(inference.parameters),
            place=lambda outputs: packed(*answer(model, inference, outputs, binary), packing),
        )  # fmt: skip
        body, headers = await wait_or_cancel(asyncio.wrap_future(wrapped.future), wrapped, http)
        return Response(body, headers=headers)

    def route(method: str, path: str, handler: Handler) -> None:
        # a plain route of Starlette: FastAPI's reads parameters and writes the document, of which this needs neither
        app.router.add_route(path, guarded(handler, access), methods=[method], include_in_schema=False)

    for versioned in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        route("POST", f"{versioned}/infer", infer)
    add_information(route, model)
    add_regions(route, bodies, model)
    add_refusals(route)


def guarded(handler: Handler, access: Access) -> Callable[[HttpRequest], Awaitable[Response]]:
    """A handler whose errors have Triton's shape; a dict or a list is answered as JSON."""

    async def guard(http: HttpRequest) -> Response:
        origin = http.headers.get("origin")
        if http.method == "POST" and not access.has_origin(origin, http.headers.get("host")):
            # a browser sends other sites' plain texts to a local server without asking
            return to_json(
                {"error": f"pages of {origin} may not ask: start the server with --allow-origin {origin}"}, 403
            )
        try:
            made = await handler(http)
        except BodyError as error:
            return refusal(error, error.status)
        except Exception as error:
            status = status_of(error)
            if status is None:
                raise
            if status[0] >= 500:
                log.error("request failed: %r", error)
            return refusal(error, status[0])
        return made if isinstance(made, Response) else to_json(made)

    return guard


def refusal(error: Exception, status: int) -> Response:
    """An error in Triton's shape."""
    retry = getattr(error, "retry_after", None)
    return to_json({"error": str(error)}, status, {"Retry-After": str(retry)} if retry else None)


def to_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON in ASCII: a client's own text, which errors repeat, need not be valid Unicode."""
    return Response(json.dumps(content), status, headers, "application/json")


async def decompressed(body: bytes, headers: Mapping[str, str], most: int) -> bytes:
    """The body as it was before its Content-Encoding, of up to so many bytes; BodyError, ParameterError."""
    name = headers.get("content-encoding", "identity").strip().lower()
    if name == "identity":
        return body
    if name not in ENCODINGS:
        raise ParameterError("body", f"the body may be compressed with {' or '.join(ENCODINGS)}, not with {name!r}")

    def unpack() -> bytes:
        reader = zlib.decompressobj(ENCODINGS[name])
        try:
            content = reader.decompress(body, most + 1)
        except zlib.error as error:
            raise ParameterError("body", f"the body is no valid {name} ({error})") from None
        if len(content) > most:
            raise BodyError(413, f"the body is larger than {most} bytes when it is decompressed")
        if not reader.eof or reader.unused_data:
            raise ParameterError("body", f"the body is no valid {name}: it ends too soon, or something follows")
        return content

    return await asyncio.to_thread(unpack)


def encoding(headers: Mapping[str, str]) -> str | None:
    """How the answer is compressed: as the client asks, naming one way alone. Lists of all ways that a client could
    read ask for nothing: compressing pixels takes longer than sending them.
    """
    name = headers.get("accept-encoding", "").strip().lower()
    return name if name in ENCODINGS else None


def packed(body: bytes, length: int | None, name: str | None) -> tuple[bytes, dict[str, str]]:
    """The answer's body as it is sent, and its headers; `length` is that of its JSON where binary data follow."""
    headers = {"Content-Type": "application/json"}
    if length is not None:
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(length)}
    if name is None:
        return body, headers
    writer = zlib.compressobj(level=1, wbits=ENCODINGS[name])
    return writer.compress(body) + writer.flush(), headers | {"Content-Encoding": name, "Vary": "Accept-Encoding"}


def name_checked(http: HttpRequest, model: Model) -> None:
    """UnknownModelError for the path of another model."""
    model.check(http.path_params["name"], http.path_params.get("version", ""))


def add_information(route: Callable[[str, str, Handler], None], model: Model) -> None:
    """Health, metadata, configuration, statistics, the repository's index."""

    async def live(http: HttpRequest) -> Any:
        return Response()

    async def ready(http: HttpRequest) -> Any:
        if "name" in http.path_params:
            name_checked(http, model)
        trouble = await model.service.health.trouble()
        return to_json({"error": trouble.get("message", trouble["status"])}, 503) if trouble else Response()

    async def server(http: HttpRequest) -> Any:
        return {"name": "driffusion", "version": VERSION, "extensions": list(model.extensions)}

    def of_model(make: Callable[[], Any]) -> Handler:
        async def handler(http: HttpRequest) -> Any:
            if "name" in http.path_params:
                name_checked(http, model)
            return make()

        return handler

    route("GET", "/v2/health/live", live)
    route("GET", "/v2/health/ready", ready)
    route("GET", "/v2", server)
    stats = of_model(lambda: {"model_stats": [model.statistics()]})
    route("GET", "/v2/models/stats", stats)
    index = of_model(lambda: [{"name": model.name, "version": VERSION, "state": "READY", "reason": ""}])
    route("POST", "/v2/repository/index", index)
    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        route("GET", path, of_model(lambda: model.metadata))
        route("GET", f"{path}/ready", ready)
        route("GET", f"{path}/config", of_model(lambda: model.config))
        route("GET", f"{path}/stats", stats)


def add_regions(route: Callable[[str, str, Handler], None], bodies: Bodies, model: Model) -> None:
    """Shared memory of both kinds."""
    regions = model.regions

    async def register_system(http: HttpRequest) -> Any:
        given = await object_of(http, bodies)
        key, size = given.get("key"), given.get("byte_size")
        regions.register_system(http.path_params["region"], key, given.get("offset", 0), size)
        return Response()

    async def register_cuda(http: HttpRequest) -> Any:
        given = await object_of(http, bodies)
        handle = decoded(given.get("raw_handle"))
        device, size = given.get("device_id"), given.get("byte_size")
        await asyncio.to_thread(regions.register_cuda, http.path_params["region"], handle, device, size)
        return Response()

    def add(root: str, kind: str, register: Handler) -> None:
        async def status(http: HttpRequest) -> Any:
            return regions.status(kind, http.path_params.get("region", ""))

        async def unregister(http: HttpRequest) -> Any:
            await asyncio.to_thread(regions.unregister, kind, http.path_params.get("region", ""))
            return Response()

        for path in (root, f"{root}/region/{{region:path}}"):
            route("GET", f"{path}/status", status)
            route("POST", f"{path}/unregister", unregister)
        route("POST", f"{root}/region/{{region:path}}/register", register)

    add("/v2/systemsharedmemory", SYSTEM, register_system)
    add("/v2/cudasharedmemory", CUDA, register_cuda)


async def object_of(http: HttpRequest, bodies: Bodies) -> dict[str, Any]:
    """A body of JSON; ParameterError, BodyError."""
    try:
        given = json.loads(await bodies.read(http, bodies.limits.body))
    except (ValueError, RecursionError) as error:
        raise ParameterError("body", f"the body is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise ParameterError("body", "the body must be a JSON object")
    return given


def decoded(raw_handle: Any) -> bytes:
    """The bytes of {"b64": TEXT}; ParameterError."""
    text = raw_handle.get("b64") if isinstance(raw_handle, dict) else None
    try:
        if not isinstance(text, str):
            raise ValueError
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ParameterError("raw_handle", 'raw_handle must be {"b64": the handle in base64}') from None


def add_refusals(route: Callable[[str, str, Handler], None]) -> None:
    """What this server does not offer, by the paths that clients ask for it."""

    def refusing(message: str) -> Handler:
        async def refuse(http: HttpRequest) -> Any:
            raise Refused(message)

        return refuse

    fixed = refusing(FIXED)
    for verb in ("load", "unload"):
        route("POST", f"/v2/repository/models/{{name:path}}/{verb}", fixed)
    trace = refusing(NO_TRACES)
    logs = refusing(NO_LOGS)
    for path, handler in (
        ("/v2/trace/setting", trace),
        ("/v2/models/{name}/trace/setting", trace),
        ("/v2/logging", logs),
    ):
        for method in ("GET", "POST"):
            route(method, path, handler)


def parse(
    content: bytes, headers: Mapping[str, str], regions: Regions, most: int
) -> tuple[Inference, Mapping[str, bool]]:
    """The request, and by output whether it goes as binary data; ParameterError. Its JSON has up to `most` bytes."""
    length = len(content)
    if (given := headers.get(HEADER)) is not None:
        if not given.isascii() or not given.isdigit() or len(given) > 20 or int(given) > length:
            raise ParameterError(HEADER, f"Inference-Header-Content-Length must be a number up to {length}")
        length = int(given)
    if length > most:
        raise ParameterError("body", f"the JSON of a request ends at {most} bytes here: send tensors as binary data")
    try:
        head = json.loads(content[:length])
    except (ValueError, RecursionError) as error:
        raise ParameterError("body", f"the head of the request is no JSON: {error}") from None
    inputs, place = {}, length
    for one in _objects(head, "inputs"):
        tensor, place = _input(one, content, place, regions)
        if tensor.name in inputs:
            raise ParameterError(tensor.name, f"the input {tensor.name} comes twice")
        inputs[tensor.name] = tensor
    if place != len(content):
        raise ParameterError("body", f"{len(content) - place} bytes follow the last input's")
    parameters = _parameters(head)
    every = parameters.get("binary_data_output", False) is True
    outputs: dict[str, dict[str, Any]] = {}
    for one in _objects(head, "outputs"):
        if (name := _name(one)) in outputs:
            raise ParameterError(name, f"the output {name} comes twice")
        outputs[name] = _parameters(one)
    binary = _Default(every, {name: its.get("binary_data", every) is True for name, its in outputs.items()})
    identifier = head.get("id", "")
    if not isinstance(identifier, str):
        raise ParameterError("id", "id must be a text")
    return Inference(inputs, outputs, parameters, identifier), binary


class _Default(dict[str, bool]):
    """Of outputs that were not named: the request's own setting."""

    def __init__(self, every: bool, known: Mapping[str, bool]) -> None:
        super().__init__(known)
        self._every = every

    def __missing__(self, name: str) -> bool:
        return self._every


def _objects(head: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(head, dict):
        raise ParameterError("body", "the head of the request must be a JSON object")
    listed = head.get(name, [])
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ParameterError(name, f"{name} must be a list of objects")
    if len(listed) > MOST_TENSORS:
        raise ParameterError(name, f"a request has up to {MOST_TENSORS} {name}, not {len(listed)}")
    return listed


def _name(one: Mapping[str, Any]) -> str:
    name = one.get("name")
    if not isinstance(name, str):
        raise ParameterError("name", "every input and output needs a name")
    return name


def _parameters(one: Mapping[str, Any]) -> dict[str, Any]:
    found = one.get("parameters", {})
    if not isinstance(found, dict):
        raise ParameterError("parameters", "parameters must be an object")
    return found


def _input(one: dict[str, Any], content: bytes, place: int, regions: Regions) -> tuple[Tensor, int]:
    """A tensor, and where the bytes of the next one begin."""
    name, datatype, shape = _name(one), one.get("datatype"), one.get("shape")
    if not isinstance(datatype, str):
        raise ParameterError(name, f"{name} needs a datatype")
    if (shared := regions.read(name, _parameters(one))) is not None:
        return from_raw(name, datatype, shape, shared), place
    size = _parameters(one).get("binary_data_size")
    if size is None:
        return from_values(name, datatype, shape, one.get("data")), place
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(content) - place:
        raise ParameterError(name, f"binary_data_size of {name} must be a number up to {len(content) - place}")
    return from_raw(name, datatype, shape, memoryview(content)[place : place + size]), place + size


def answer(
    model: Model, inference: Inference, outputs: list[Tensor], binary: Mapping[str, bool]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON where binary data follow it."""
    listed, tail = [], list[memoryview]()
    for tensor in outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if (shared := model.in_region(inference, tensor)) is not None:
            entry["parameters"] = shared
        elif binary[tensor.name]:
            tail.append(tensor.raw())
            entry["parameters"] = {"binary_data_size": tail[-1].nbytes}
        else:
            entry["data"] = tensor.listed()
        listed.append(entry)
    head = {"model_name": model.name, "model_version": VERSION, "outputs": listed}
    if inference.id:
        head["id"] = inference.id
    encoded = json.dumps(head).encode()
    model.check_answer(len(encoded) + sum(one.nbytes for one in tail))
    return b"".join([encoded, *tail]), len(encoded) if tail else None
