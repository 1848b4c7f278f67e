"""`python -m runtime.serve`: OpenAI's image API and a page to try it, in front of one pipeline.

The event loop never waits for the engine: pictures are made on one worker thread, in the order of the requests.
Every error is answered in OpenAI's shape.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import logging
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.pipeline import MAX_SEED, MODES, Pipeline

log = logging.getLogger("runtime.serve")
PAGE = Path(__file__).parent / "page.html"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
MAX_BODY = 1 << 20  # bytes
CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=32_000, pattern=r"^[^\x00]*$")]


class ImageRequest(BaseModel):
    """OpenAI's fields that this server honours, and the engine's own. Anything else is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Text = Field(min_length=1)
    model: Name | None = None
    n: int = Field(1, ge=1, le=10)
    size: Name = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    user: Name | None = None
    negative_prompt: Text = ""
    num_inference_steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(4.0, ge=0, le=100, allow_inf_nan=False)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    mode: Name = "auto"
    k: int | None = Field(None, ge=1, le=64)  # a block's drafts are in memory at the same time; lanes end at 64 too
    drafts: Name = "auto"
    tolerance: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    blocks: int | None = Field(None, ge=1, le=64)
    iterations: int | None = Field(None, ge=1, le=1000)
    scheduler: Name | None = None
    eta: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)


class ApiError(HTTPException):
    """A request that is refused here, with the parameter that is to blame."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


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
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(content, status, getattr(error, "headers", None))


async def read_request(request: Request) -> ImageRequest:
    """The body, read up to the limit and checked; ApiError names the first field that cannot be used."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        # not only a courtesy: other sites' pages may send forms and text to a local server, but not JSON
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", None, "unsupported_media_type")
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise ApiError(413, f"the body is larger than {MAX_BODY} bytes", None, "request_too_large")
        return ImageRequest.model_validate_json(body)
    except ClientDisconnect:
        raise ApiError(400, "the client went away before its request was complete") from None
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = f"{'the body' if param is None else param}: {first['msg']}"
        raise ApiError(400, message, param, CODES.get(first["type"], "invalid_value")) from None


def parse_size(size: str) -> tuple[int | None, int | None]:
    """ "WIDTHxHEIGHT" or "auto"."""
    if size == "auto":
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match:
        raise ApiError(400, f"size must be auto or WIDTHxHEIGHT, not {size!r}", "size", "invalid_value")
    return int(match[1]), int(match[2])


def encode_image(image: Image.Image, output_format: str, compression: int) -> str:
    """The picture in a file format, as base64."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": compression}
    image.save(buffer, output_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode()


def make_pictures(pipeline: Pipeline, request: ImageRequest) -> JSONResponse:
    """The whole answer, encoded here too, so that the event loop only has bytes to send."""
    width, height = parse_size(request.size)
    result = pipeline.generate(
        request.prompt, negative_prompt=request.negative_prompt, mode=request.mode, k=request.k,
        drafts=request.drafts, num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale, seed=request.seed, scheduler=request.scheduler,
        tolerance=request.tolerance, blocks=request.blocks, iterations=request.iterations, eta=request.eta,
        width=width, height=height, num_images_per_prompt=request.n,
    )  # fmt: skip
    pictures = [encode_image(image, request.output_format, request.output_compression) for image in result.images]
    content = {
        "created": int(time.time()), "data": [{"b64_json": picture} for picture in pictures],
        "output_format": request.output_format, "size": f"{result.images[0].width}x{result.images[0].height}",
        "quality": "standard", "background": "opaque", "report": result.report.to_dict(),
    }  # fmt: skip
    return JSONResponse(content)


def make_app(pipeline: Pipeline) -> FastAPI:
    """The application around a loaded pipeline."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="engine")
    app = FastAPI(title="DRiffusion engine", openapi_url=None)  # its documentation pages would load from a CDN
    for kind in (HTTPException, EngineError, Exception):
        app.add_exception_handler(kind, answer_error)

    @app.post("/v1/images/generations")
    async def generations(request: Annotated[ImageRequest, Depends(read_request)]) -> JSONResponse:
        """Makes n pictures of a prompt."""
        if request.model not in (None, pipeline.manifest.model):
            message = f"the model {request.model!r} does not exist; this server has {pipeline.manifest.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return await asyncio.get_running_loop().run_in_executor(worker, make_pictures, pipeline, request)

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

    @app.get("/")
    async def page() -> HTMLResponse:
        """The playground."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    return app


def listen(host: str, port: int) -> socket.socket:
    """The port, taken before seconds are spent on loading; who connects meanwhile waits for the answer."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise EngineError(f"cannot listen on {host}:{port}: {error}: choose another with --port") from error


def serve(model: str, devices: str, build: Path, host: str, port: int) -> None:
    """Loads, then answers until a signal; requests in flight are finished, unless Ctrl-C is pressed again."""
    with listen(host, port) as listener:
        pipeline = Pipeline.load(model, devices, build)
        pipeline.generate("", num_inference_steps=1)  # or the first request would pay for first-time allocations
        log.info("%s on %s", pipeline.manifest.model, ", ".join(map(str, pipeline.devices)))
        address = f"[{host}]" if ":" in host else host
        log.info("http://%s:%d (Ctrl-C stops)", address, listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(make_app(pipeline), log_config=None))
        with suppress(KeyboardInterrupt):
            server.run([listener])
        if server.force_exit:
            os._exit(1)  # the engine's thread may be in the middle of a long picture
        pipeline.close()


def main() -> int:
    """The command line; exit code 1 with one message when it cannot serve, 0 after Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu*LANES, cuda:0,cuda:1, cuda:0*LANES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free one")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as for Ctrl-C
    try:
        with suppress(KeyboardInterrupt):  # while it loads
            serve(**vars(options))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
