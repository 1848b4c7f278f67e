"""`python -m runtime.serve`: OpenAI's image API and a page to try it, in front of one pipeline.

The event loop never waits for the engine: pictures are made on one worker thread, in the order of the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import logging
import re
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.pipeline import MAX_SEED, Pipeline, Result
from runtime.samplers import SAMPLERS

log = logging.getLogger("runtime.serve")
PAGE = Path(__file__).parent / "page.html"
MAX_STEPS = 1000
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


class ImageRequest(BaseModel):
    """OpenAI's fields that this server honours, and the engine's own. Anything else is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=32_000)
    model: str | None = None
    n: int = Field(1, ge=1, le=10)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    user: str | None = None
    negative_prompt: str = Field("", max_length=32_000)
    num_inference_steps: int = Field(50, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(4.0, ge=0, le=100, allow_inf_nan=False, strict=False)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    mode: str = "sequential"
    k: int | None = Field(None, ge=1, le=1000)
    drafts: str = "frozen"
    scheduler: str | None = None


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """{"error": {"message", "type", "param", "code"}}."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


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
    image.save(buffer, FORMATS[output_format], **options)
    return base64.b64encode(buffer.getvalue()).decode()


def make_app(pipeline: Pipeline) -> FastAPI:
    """The application around a loaded pipeline."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="engine")
    state = {"ready": False}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.get_running_loop().run_in_executor(worker, warm_up)
        yield
        worker.shutdown(wait=True, cancel_futures=True)

    def warm_up() -> None:
        """One tiny round, so that the first request does not pay for first-time allocations."""
        pipeline.generate("", num_inference_steps=1)
        state["ready"] = True

    app = FastAPI(title="DRiffusion engine", lifespan=lifespan)

    @app.post("/v1/images/generations")
    async def generations(request: ImageRequest) -> dict[str, Any]:
        """Makes n pictures of a prompt."""
        if request.model not in (None, pipeline.manifest.model):
            message = f"the model {request.model!r} does not exist; this server has {pipeline.manifest.model!r}"
            raise ApiError(404, message, "model", "model_not_found")
        width, height = parse_size(request.size)

        def work() -> tuple[Result, list[str]]:
            result = pipeline.generate(
                request.prompt, negative_prompt=request.negative_prompt, mode=request.mode, k=request.k,
                drafts=request.drafts, num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale, seed=request.seed, scheduler=request.scheduler,
                width=width, height=height, num_images_per_prompt=request.n,
            )  # fmt: skip
            return result, [
                encode_image(image, request.output_format, request.output_compression) for image in result.images
            ]

        result, pictures = await asyncio.get_running_loop().run_in_executor(worker, work)
        return {
            "created": int(time.time()),
            "data": [{"b64_json": picture} for picture in pictures],
            "output_format": request.output_format,
            "size": f"{result.images[0].width}x{result.images[0].height}",
            "quality": "standard",
            "background": "opaque",
            "report": result.report.to_dict(),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model of this server, with what the page needs to know."""
        manifest = pipeline.manifest
        entry = {
            "id": manifest.model, "object": "model", "created": 0, "owned_by": "local", "modes": list(SAMPLERS),
            "devices": list(map(str, pipeline.devices)), "default_size": f"{manifest.width}x{manifest.height}",
            "examples": list(manifest.examples),
            "defaults": {
                name: ImageRequest.model_fields[name].default
                for name in ("num_inference_steps", "guidance_scale", "mode", "seed")
            },
        }  # fmt: skip
        return {"object": "list", "data": [entry]}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        """The process answers."""
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """The engine has made a picture and takes requests."""
        return JSONResponse({"status": "ready"}) if state["ready"] else error_response(503, "not ready yet")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        """The playground."""
        return PAGE.read_text(encoding="utf-8")

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error_response(error.status, str(error), error.param, error.code)

    @app.exception_handler(ParameterError)
    async def on_parameter(_: Request, error: ParameterError) -> JSONResponse:
        param = "size" if error.param in ("width", "height") else error.param
        return error_response(400, str(error), param, "invalid_value")

    @app.exception_handler(EngineError)
    async def on_engine(_: Request, error: EngineError) -> JSONResponse:
        log.error("request failed: %s", error)
        return error_response(500, str(error), None, "engine_error")

    @app.exception_handler(RequestValidationError)
    async def on_validation(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        location = [str(part) for part in first["loc"] if part != "body"]
        param = location[0] if location else None
        if first["type"] == "extra_forbidden":
            return error_response(400, f"unknown parameter: {param!r}", param, "unknown_parameter")
        message = (
            f"{param}: {first['msg']}" if param else f"the body is not valid JSON for this request: {first['msg']}"
        )
        return error_response(400, message, param, "invalid_value")

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return error_response(error.status_code, message, None, "not_found" if error.status_code == 404 else None)

    return app


def main() -> int:
    """The command line; exit code 1 with one message when the model cannot be loaded."""
    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=__doc__)
    parser.add_argument("--model", default="shapes", help="an exported model's name, or its bundle folder")
    parser.add_argument("--devices", default="auto", help="auto, cpu, cpu@THREADS or cpu*LANES")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        pipeline = Pipeline.load(options.model, options.devices, options.build)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    log.info("%s on %s", pipeline.manifest.model, ", ".join(map(str, pipeline.devices)))
    uvicorn.run(make_app(pipeline), host=options.host, port=options.port, log_level="info")
    pipeline.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
