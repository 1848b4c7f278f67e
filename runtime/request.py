"""OpenAI's image request and error shapes: what a client may ask for, and how it is told what is wrong."""

from __future__ import annotations

import base64
import io
import re
from typing import Annotated, Any, Literal

from fastapi import Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from runtime.pipeline import MAX_SEED

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
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
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

    def arguments(self) -> dict[str, Any]:
        """What `Pipeline.generate` is called with beside the prompt."""
        width, height = parse_size(self.size)
        own = ("negative_prompt", "mode", "k", "drafts", "num_inference_steps", "guidance_scale", "seed", "scheduler",
               "tolerance", "blocks", "iterations", "eta")  # fmt: skip
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


class ApiError(HTTPException):
    """A request that is refused here, with the parameter that is to blame."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param, self.code = param, code


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
        asked = ImageRequest.model_validate_json(body)
    except ClientDisconnect:
        raise ApiError(400, "the client went away before its request was complete") from None
    except ValidationError as error:
        first = error.errors()[0]
        param = str(first["loc"][0]) if first["loc"] else None
        message = f"{'the body' if param is None else param}: {first['msg']}"
        raise ApiError(400, message, param, CODES.get(first["type"], "invalid_value")) from None
    if asked.stream and asked.n > 1:
        raise ApiError(400, "n: streaming makes one picture; send n=1, or stream=false", "n", "invalid_value")
    if asked.partial_images and not asked.stream:
        raise ApiError(400, "partial_images: only with stream=true", "partial_images", "invalid_value")
    return asked


def parse_size(size: str) -> tuple[int | None, int | None]:
    """ "WIDTHxHEIGHT" or "auto"."""
    if size == "auto":
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match:
        raise ApiError(400, f"size must be auto or WIDTHxHEIGHT, not {size!r}", "size", "invalid_value")
    return int(match[1]), int(match[2])
