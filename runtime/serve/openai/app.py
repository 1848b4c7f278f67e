"""The FastAPI application: OpenAI's image API, health, metrics and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from engines.errors import EngineError
from runtime.call import MODES
from runtime.serve.openai.answers import stream, whole
from runtime.serve.openai.body import Bodies, read_form, read_json
from runtime.serve.openai.document import described, operation
from runtime.serve.openai.errors import ApiError, answer_error, to_api_error
from runtime.serve.openai.middleware import AccessMiddleware
from runtime.serve.openai.schema import EditRequest, ImageRequest, limited
from runtime.serve.service import Service

PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(service: Service) -> FastAPI:
    """The application around a loaded pipeline."""
    pipeline, limits, bodies = service.pipeline, service.limits, Bodies(service.limits)
    app = FastAPI(title="DRiffusion engine", docs_url=None, redoc_url=None)  # those pages would load from a CDN
    for kind in (HTTPException, EngineError):  # others end in `AccessMiddleware`
        app.add_exception_handler(kind, answer_error)

    app.add_middleware(
        AccessMiddleware, keys=limits.keys, count=lambda outcome: service.metrics.requests.labels(outcome).inc()
    )

    defaults = pipeline.manifest.defaults
    model, edit = limited(ImageRequest, limits, defaults), limited(EditRequest, limits, defaults)

    async def images(asked: ImageRequest, request: Request) -> Response:
        if asked.model not in (None, pipeline.manifest.model):
            message = f"the model {asked.model!r} does not exist; this server has {pipeline.manifest.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        try:
            if asked.stream:
                return await stream(service, asked, request)
            return Response(await whole(service, asked, request), media_type="application/json")
        except Exception as error:
            raise to_api_error(error) from error

    @app.post("/v1/images/generations", **operation("application/json", model))
    async def generations(request: Request) -> Response:
        """Makes n images of a prompt, or with `stream` one image and previews of it."""
        return await images(await read_json(request, model, bodies), request)

    @app.post("/v1/images/edits", **operation("multipart/form-data", edit))
    async def edits(request: Request) -> Response:
        """The same, starting from an image: the last `strength` of the steps are made, with the noise for them."""
        return await images(await read_form(request, edit, bodies), request)

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
        """Whether every lane works: free ones play a tiny round for it. Nobody is answered before a first image."""
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
