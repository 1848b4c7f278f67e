"""OpenAI's image requests: what a client may ask for."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model, model_validator

from engines.manifest import Defaults
from runtime.call import MAX_SEED, MODES
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.schedulers import SCHEDULERS
from runtime.serve.limits import Limits
from runtime.serve.openai.errors import ApiError

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
        """An image in the format that was asked for, as base64."""
        buffer = io.BytesIO()
        options = {} if self.output_format == "png" else {"quality": self.output_compression}
        image.save(buffer, self.output_format.upper(), **options)
        return base64.b64encode(buffer.getvalue()).decode()

    def facts(self, image: Image.Image) -> dict[str, str]:
        """What OpenAI's answers and events say of an image beside its bytes."""
        size = f"{image.width}x{image.height}"
        return {"output_format": self.output_format, "size": size, "quality": "standard", "background": "opaque"}


Asked = TypeVar("Asked", bound=ImageRequest)


class EditRequest(ImageRequest):
    """An image to start from beside that. It comes as a form, whose fields are texts."""

    image: bytes = Field(min_length=1, json_schema_extra={"format": "binary"})
    strength: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    event: ClassVar[str] = "image_edit"
    _decoded: Image.Image

    def open(self, side: int) -> None:
        """Decodes the image; ApiError when it is none, or larger than `side` pixels, which is looked at first."""
        try:
            with Image.open(io.BytesIO(self.image), formats=("PNG", "JPEG", "WEBP")) as opened:
                if max(opened.size) > side:
                    message = f"image: width and height end at {side} pixels here, this has {opened.size}"
                    raise ApiError(400, message, "image", "invalid_value")
                self._decoded = opened.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow's readers raise
            message = f"image: this is no readable PNG, JPEG or WebP file ({error})"
            raise ApiError(400, message, "image", "invalid_value") from None

    def arguments(self) -> dict[str, Any]:
        """See ImageRequest."""
        return super().arguments() | {"image": self._decoded, "strength": self.strength}


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
        raise ApiError(400, "n: streaming makes one image; send n=1, or stream=false", "n", "invalid_value")
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
