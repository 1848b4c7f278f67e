"""OpenAI's image request and error shapes: what a client may ask for, and how it is told what is wrong."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import re
from collections.abc import AsyncGenerator, Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from fastapi import Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model, model_validator
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from engines.errors import EngineError, ParameterError
from engines.manifest import Defaults
from runtime.limits import Limits
from runtime.pipeline import MAX_SEED, MODES
from runtime.samplers import DRAFTS
from runtime.schedulers import SCHEDULERS

log = logging.getLogger(__name__)
TOGETHER = 8  # of the largest bodies, whose bytes may be arriving at the same time
CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
# of OpenAI's; whatever else is not a field of the request is unknown
UNSUPPORTED = {"style", "mask", "input_fidelity", "complexity", "svg", "frame_count", "frame_duration_ms"}
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00]*$")]


# the engine refuses other names; the document tells them in advance
Mode = Annotated[Name, Field(json_schema_extra={"enum": [*MODES]})]
Drafts = Annotated[Name, Field(json_schema_extra={"enum": ["auto", *DRAFTS]})]
Scheduler = Annotated[Name, Field(min_length=1, json_schema_extra={"enum": [*SCHEDULERS]})]


def nullable(schema: dict[str, Any]) -> None:
    """Says in the document that null means the default."""
    for field in schema["properties"].values():
        if "default" in field and "type" in field:
            field["type"] = [field["type"], "null"]
            if choices := field.get("enum", [field.pop("const")] if "const" in field else []):
                field["enum"] = [*choices, None]


class ImageRequest(BaseModel):
    """OpenAI's fields that this server honours, and the engine's own. Anything else is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    prompt: Text = Field(min_length=1)
    model: Name | None = None
    n: int = Field(1, ge=1)
    size: Annotated[Name, Field(json_schema_extra={"pattern": r"^(auto|\d{1,5}x\d{1,5})$"})] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100)
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    moderation: Literal["auto", "low"] = "auto"  # there is none
    user: Name | None = None
    safety_identifier: Name | None = None
    negative_prompt: Text | None = None
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(4.0, ge=0, le=100, allow_inf_nan=False)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    mode: Mode = "auto"
    k: int | None = Field(None, ge=1, le=64)  # a block's drafts are in memory at the same time; lanes end at 64 too
    drafts: Drafts = "auto"
    tolerance: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    blocks: int | None = Field(None, ge=1, le=64)
    iterations: int | None = Field(None, ge=1, le=1000)
    scheduler: Scheduler | None = None
    eta: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    clip_skip: int | None = Field(None, ge=0, le=64)
    lanes: int | None = Field(None, ge=1, le=64)
    timeline: bool = False

    event: ClassVar[str] = "image_generation"  # what events of a stream are called

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = UNSUPPORTED | {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in values.items() if value is not None or name not in optional}

    def arguments(self) -> dict[str, Any]:
        """What `Pipeline.generate` is called with beside the prompt."""
        width, height = parse_size(self.size)
        own = ("negative_prompt", "mode", "k", "drafts", "num_inference_steps", "guidance_scale", "seed", "scheduler",
               "tolerance", "blocks", "iterations", "eta", "clip_skip", "lanes", "timeline")  # fmt: skip
        return {name: getattr(self, name) for name in own} | {
            "width": width, "height": height, "num_images_per_prompt": self.n,
        }  # fmt: skip

    def encode(self, image: Image.Image) -> str:
        """A picture in the format that was asked for, as base64."""
        buffer = io.BytesIO()
        options = {} if self.output_format == "png" else {"quality": self.output_compression}
        image.save(buffer, self.output_format.upper(), **options)
        return base64.b64encode(buffer.getvalue()).decode()

    def facts(self, image: Image.Image) -> dict[str, str]:
        """What OpenAI's answers and events say of a picture beside its bytes."""
        size = f"{image.width}x{image.height}"
        return {"output_format": self.output_format, "size": size, "quality": "standard", "background": "opaque"}


Asked = TypeVar("Asked", bound=ImageRequest)


class EditRequest(ImageRequest):
    """A picture to start from beside that. It comes as a form, whose fields are texts."""

    image: bytes = Field(min_length=1, json_schema_extra={"format": "binary"})
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    event: ClassVar[str] = "image_edit"
    _picture: Image.Image

    def open(self, side: int) -> None:
        """Decodes the picture; ApiError when it is none, or larger than `side` pixels, which is looked at first."""
        try:
            with Image.open(io.BytesIO(self.image), formats=("PNG", "JPEG", "WEBP")) as picture:
                if max(picture.size) > side:
                    message = f"image: width and height end at {side} pixels here, this has {picture.size}"
                    raise ApiError(400, message, "image", "invalid_value")
                self._picture = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow's readers raise
            message = f"image: this is no readable PNG, JPEG or WebP file ({error})"
            raise ApiError(400, message, "image", "invalid_value") from None

    def arguments(self) -> dict[str, Any]:
        """See ImageRequest."""
        return super().arguments() | {"image": self._picture, "strength": self.strength}


class ApiError(HTTPException):
    """A request that is refused here, with the parameter that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def limited(base: type[Asked], limits: Limits, defaults: Defaults) -> type[Asked]:
    """The request as a server takes it: limits are in its messages and its JSON schema, defaults are the model's."""
    text = Annotated[Text, Field(max_length=limits.prompt)]
    steps = min(defaults.num_inference_steps, limits.steps)
    return create_model(
        f"Limited{base.__name__}", __base__=base,
        prompt=(text, Field(min_length=1)),
        negative_prompt=(text | None, None),
        n=(int, Field(1, ge=1, le=limits.n)),
        num_inference_steps=(int, Field(steps, ge=1, le=limits.steps)),
        guidance_scale=(float, Field(defaults.guidance_scale, ge=0, le=100, allow_inf_nan=False)),
    )  # fmt: skip


def error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status of any error and what its client is told; a line in the log when it is our fault."""
    if isinstance(error, ApiError):
        return error.status_code, error_body(error.status_code, error.detail, error.param, error.code)
    if isinstance(error, ParameterError):
        param = {"width": "size", "height": "size"}.get(error.param, error.param)
        return 400, error_body(400, str(error), param, "invalid_value")
    if isinstance(error, EngineError):
        log.error("request failed: %r", error)
        return 500, error_body(500, str(error), None, "engine_error")
    log.error("request failed: %r", error, exc_info=error)
    return 500, error_body(500, "unexpected error, see the server's log", None, None)


class Bodies:
    """Reads bodies in time, each up to its limit, and all at once up to so many of the largest."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._free = TOGETHER * max(limits.body, limits.upload)

    async def read(self, request: Request, most: int) -> bytes:
        """One body of up to so many bytes."""
        body, seconds = bytearray(), self.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._free -= len(chunk)
                    if len(body) > most:
                        raise ApiError(413, f"the body is larger than {most} bytes", None, "request_too_large")
                    if self._free < 0:
                        message = "too many large bodies arrive at once: try again"
                        raise ApiError(429, message, None, "too_many_uploads", {"Retry-After": "1"})
        except ClientDisconnect:
            raise ApiError(400, "the client went away before its request was complete") from None
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} s", None, "request_timeout") from None
        finally:
            self._free += len(body)
        return bytes(body)


async def read_json(request: Request, model: type[ImageRequest], bodies: Bodies) -> ImageRequest:
    """The body as a request of that model; ApiError names the first field that cannot be used."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        # not only a courtesy: other sites' pages may send forms and text to a local server, but not JSON
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", None, "unsupported_media_type")
    body = await bodies.read(request, bodies.limits.body)
    return checked(lambda: model.model_validate_json(body), bodies.limits)


async def read_form(request: Request, model: type[EditRequest], bodies: Bodies) -> EditRequest:
    """The same of a form with a file, as OpenAI's clients send it."""
    limits = bodies.limits
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send a form: Content-Type: multipart/form-data", None, "unsupported_media_type")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        # a browser sends forms of other sites' pages to a local server without asking; JSON it would not send
        raise ApiError(403, f"forms of pages of {origin} are not taken", None, "cross_origin")
    body = await bodies.read(request, limits.upload)

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    values: dict[str, Any] = {}
    try:
        parser = MultiPartParser(request.headers, once(), max_files=8, max_fields=50, max_part_size=limits.body)
        parser.spool_max_size = limits.upload  # nothing goes to the disk
        form = await parser.parse()
        try:
            for name, value in form.multi_items():
                key = name.removesuffix("[]")  # a list of one
                if key in values:
                    raise ApiError(400, f"{key}: send it once", key, "invalid_value")
                values[key] = value if isinstance(value, str) else await value.read()
        finally:
            await form.close()
    except (MultiPartException, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ApiError(400, f"the body is no form ({error})", None, "invalid_value") from None
    if isinstance(values.get("image"), str):
        raise ApiError(400, "image: send a file", "image", "invalid_value")
    asked = checked(lambda: model.model_validate(values, strict=False), limits)
    await asyncio.to_thread(asked.open, limits.side)
    return asked


def checked(validate: Callable[[], Asked], limits: Limits) -> Asked:
    """A request that can be honoured; ApiError names the first field that cannot."""
    try:
        asked = validate()
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        if param in UNSUPPORTED:
            message = f"{param}: this server does not support it: leave it out"
            raise ApiError(400, message, param, "unsupported_parameter") from None
        message = f"{'the body' if param is None else param}: {first['msg']}"
        raise ApiError(400, message, param, CODES.get(first["type"], "invalid_value")) from None
    if asked.stream and asked.n > 1:
        raise ApiError(400, "n: streaming makes one picture; send n=1, or stream=false", "n", "invalid_value")
    if asked.partial_images and not asked.stream:
        raise ApiError(400, "partial_images: only with stream=true", "partial_images", "invalid_value")
    side = max(size for size in parse_size(asked.size) if size is not None) if asked.size != "auto" else 0
    if side > limits.side:
        raise ApiError(400, f"size: width and height end at {limits.side} pixels here", "size", "invalid_value")
    return asked


def parse_size(size: str) -> tuple[int | None, int | None]:
    """ "WIDTHxHEIGHT" or "auto"."""
    if size == "auto":
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match:
        raise ApiError(400, f"size must be auto or WIDTHxHEIGHT, not {size!r}", "size", "invalid_value")
    return int(match[1]), int(match[2])
