"""The FastAPI application: OpenAI's image API, health, metrics and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from engines.errors import EngineError
from runtime.call import MODES
from runtime.serve.access import Access
from runtime.serve.http.body import Bodies, BodyError
from runtime.serve.openai.answers import stream, whole
from runtime.serve.openai.body import read_form, read_json
from runtime.serve.openai.document import described, operation
from runtime.serve.openai.errors import ApiError, answer_error, to_api_error
from runtime.serve.openai.middleware import AccessMiddleware
from runtime.serve.openai.schema import Body, Edit, body_model
from runtime.serve.service import Service

PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
PAGE_DEFAULTS = ("num_inference_steps", "guidance_scale", "mode", "tolerance", "seed", "scheduler")
Handler = Callable[..., Any]


def make_app(service: Service, access: Access) -> FastAPI:
    """The application around a loaded pipeline. It never redirects, so that no answer repeats a Host header."""
    # FastAPI's own pages for the document would load scripts from a CDN
    app = FastAPI(title="DRiffusion engine", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.bodies = Bodies(service.limits)  # of all protocols together
    for kind in (HTTPException, EngineError, BodyError):  # others end in `AccessMiddleware`
        app.add_exception_handler(kind, answer_error)
    count = service.metrics.requests
    app.add_middleware(AccessMiddleware, access=access, count=lambda outcome: count.labels(outcome).inc())
    if access.origins:  # outside of it: preflights carry no key, and pages are to read refusals, too
        app.add_middleware(
            CORSMiddleware, allow_origins=access.origins, allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-Request-ID"),
            expose_headers=("X-Request-ID", "Retry-After"),
        )  # fmt: skip
    body = body_model(Body, service.limits, service.defaults)
    add_images(app, service, access, body, body_model(Edit, service.limits, service.defaults))
    add_models(app, service, body)
    add_operation(app, service)
    return app


def readable(app: FastAPI, path: str, **options: Any) -> Callable[[Handler], Handler]:
    """A route for GET, and for HEAD outside of the document."""

    def decorate(handler: Handler) -> Handler:
        app.head(path, include_in_schema=False, **options)(handler)
        return app.get(path, **options)(handler)

    return decorate


def add_images(app: FastAPI, service: Service, access: Access, body: type[Body], edit: type[Edit]) -> None:
    """Generations and edits."""
    bodies = app.state.bodies

    async def images(parsed: Body, http: HttpRequest) -> Response:
        check_model(service, parsed.model)
        try:
            if parsed.stream:
                return await stream(service, parsed, http)
            return Response(await whole(service, parsed, http), media_type="application/json")
        except Exception as error:
            raise to_api_error(error) from error

    @app.post("/v1/images/generations", **operation("application/json", body))
    async def generations(request: HttpRequest) -> Response:
        """Makes n images of a prompt, or with `stream` one image and previews of it."""
        return await images(await read_json(request, body, bodies), request)

    @app.post("/v1/images/edits", **operation("multipart/form-data", edit))
    async def edits(request: HttpRequest) -> Response:
        """The same, starting from an image: the last `strength` of the steps are made, with the noise for them."""
        return await images(await read_form(request, edit, bodies, access), request)


def check_model(service: Service, name: str | None) -> None:
    """ApiError for any model but the one of this server."""
    own = service.pipeline.manifest.model
    if name not in (None, own):
        message = f"the model {name!r} does not exist; this server has {own!r}"
        raise ApiError(404, message, "model", "model_not_found")


def add_models(app: FastAPI, service: Service, body: type[Body]) -> None:
    """The one model of a server, in OpenAI's list and by its name."""

    def entry() -> dict[str, Any]:
        manifest, devices = service.pipeline.manifest, list(map(str, service.pipeline.devices))
        return {
            "id": manifest.model, "object": "model", "created": 0, "owned_by": "local", "modes": list(MODES),
            "devices": devices, "lanes": len(devices),
            "default_size": f"{manifest.sizes.width}x{manifest.sizes.height}",
            "examples": list(manifest.examples),
            "defaults": {name: body.model_fields[name].default for name in PAGE_DEFAULTS},
            "limits": service.limits.public(), "edits": manifest.image_to_image,
        }  # fmt: skip

    @readable(app, "/v1/models", responses=described(401, 403))
    async def models() -> dict[str, Any]:
        """The models of this server, which has one, with what the page needs to know."""
        return {"object": "list", "data": [entry()]}

    @readable(app, "/v1/models/{model:path}", responses=described(401, 403, 404))
    async def model(model: str) -> dict[str, Any]:
        """One model."""
        check_model(service, model)
        return entry()


def add_operation(app: FastAPI, service: Service) -> None:
    """Health, metrics and the page."""

    @readable(app, "/health/live", responses=described(403))
    async def live() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "live"}

    unready = {503: {"description": "Nothing should be sent here; the body says why."}}

    @readable(app, "/health/ready", responses=unready | described(403))
    async def ready() -> JSONResponse:
        """Whether every lane works: free ones play a tiny round for it. The server listens once it has warmed up."""
        trouble = await service.health.trouble()
        return JSONResponse(trouble, 503) if trouble else JSONResponse({"status": "ready"} | service.health.given_up)

    @readable(app, "/metrics", response_class=PlainTextResponse, responses=described(403))
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @readable(app, "/", response_class=HTMLResponse, responses=described(403))
    async def page() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)
