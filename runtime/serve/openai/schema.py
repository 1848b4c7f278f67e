"""The bodies of OpenAI's image requests. The engine's own fields are those of `runtime.call.OPTIONS`."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, create_model, model_validator

from runtime.call import OPTIONS, Call, meant
from runtime.input_image import read_image
from runtime.option import Option
from runtime.png_text import png_info
from runtime.report import Report
from runtime.serve.limits import Limits
from runtime.serve.openai.errors import ApiError

CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
# OpenAI's, refused by name; whatever else is not a field of the request is unknown
UNSUPPORTED = {"mask", "input_fidelity", "complexity", "svg", "frame_count", "frame_duration_ms"}
IGNORED = {
    "quality": "num_inference_steps decides how much work goes into an image",
    "style": "the prompt alone decides what an image looks like",
}
EDIT_FIELDS = {"image", "strength"}  # of edits alone
HANDWRITTEN = {"prompt", "size"}  # of several options, or with OpenAI's own syntax
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[^\x00]*$")]


def nullable(schema: dict[str, Any]) -> None:
    """Says in the document that null means the default."""
    for field in schema["properties"].values():
        if "default" in field and "type" in field:
            field["type"] = [field["type"], "null"]
            if choices := field.get("enum", [field.pop("const")] if "const" in field else []):
                field["enum"] = [*choices, None]


class Body(BaseModel):
    """OpenAI's own fields; `body_model` adds the engine's. Any other field is refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    prompt: Text = Field(min_length=1, description=OPTIONS["prompt"].help)
    model: Name | None = None
    size: Annotated[Name, Field(json_schema_extra={"pattern": r"^(auto|\d{1,5}x\d{1,5})$"})] = Field(
        "auto", description=f"WIDTHxHEIGHT in pixels, or auto: {OPTIONS['width'].absent}"
    )
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="url is a data: URL; streams ignore it")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="quality of jpeg and webp")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] = Field("auto", description="ignored")
    style: Literal["vivid", "natural"] | None = Field(None, description="ignored")
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = Field(False, description="server-sent events: previews, then the finished image")
    metadata: bool = Field(True, description="whether a PNG says in text chunks how it was made, the prompt included")
    partial_images: int = Field(0, ge=0, le=3, description="previews of a stream")
    moderation: Literal["auto", "low"] = Field("auto", description="ignored: there is none")
    user: Name | None = None
    safety_identifier: Name | None = None

    event: ClassVar[str] = "image_generation"  # prefix of the types of a stream's events

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        optional = UNSUPPORTED | {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in values.items() if value is not None or name not in optional}

    def options(self) -> dict[str, Any]:
        """The arguments of `Call`."""
        width, height = parse_size(self.size)
        fields = type(self).model_fields
        given = {name: getattr(self, one.http) for name, one in OPTIONS.items() if one.http and one.http in fields}
        return given | {"width": width, "height": height}

    def call(self) -> Call:
        """What the engine is asked for; ParameterError for values that exclude each other."""
        return Call(**self.options())

    def warnings(self) -> tuple[str, ...]:
        """Of fields that are accepted and change nothing."""
        given = ((name, getattr(self, name), why) for name, why in IGNORED.items())
        plain = (None, "auto", "standard")
        return tuple(f"{name} {value!r} is ignored: {why}" for name, value, why in given if value not in plain)

    def encode(self, image: Image.Image, report: Report | None = None, number: int = 0) -> str:
        """An image in `output_format`, as base64; a PNG with what `report` says of the image of that number."""
        buffer = io.BytesIO()
        options: dict[str, Any] = {} if self.output_format == "png" else {"quality": self.output_compression}
        if report is not None and self.metadata and self.output_format == "png":
            options["pnginfo"] = png_info(report, number)
        image.save(buffer, self.output_format.upper(), **options)
        return base64.b64encode(buffer.getvalue()).decode()

    def datum(self, image: Image.Image, report: Report, number: int) -> dict[str, str]:
        """An image as an entry of `data`."""
        encoded = self.encode(image, report, number)
        if self.response_format == "url":
            return {"url": f"data:image/{self.output_format};base64,{encoded}"}
        return {"b64_json": encoded}

    def facts(self, image: Image.Image) -> dict[str, str]:
        """What OpenAI's answers and events say of an image beside its bytes."""
        size = f"{image.width}x{image.height}"
        return {"output_format": self.output_format, "size": size, "quality": "standard", "background": "opaque"}


class Edit(Body):
    """A form with a file to start from. Its fields are texts."""

    image: bytes = Field(min_length=1, json_schema_extra={"format": "binary"}, description=OPTIONS["image"].help)
    event: ClassVar[str] = "image_edit"
    _decoded: Image.Image

    def open(self, side: int) -> None:
        """Decodes the image; ParameterError when it is none, or larger than `side` pixels, which is looked at first."""
        self._decoded = read_image(self.image, side)

    def options(self) -> dict[str, Any]:
        """See Body."""
        return super().options() | {"image": self._decoded}


Parsed = TypeVar("Parsed", bound=Body)


def body_model(base: type[Parsed], limits: Limits, defaults: Mapping[str, Any] | None = None) -> type[Parsed]:
    """The body as a server takes it: its limits and defaults are in its messages and in its JSON schema."""
    prompt = (Annotated[Text, Field(max_length=limits.prompt)], Field(min_length=1, description=OPTIONS["prompt"].help))
    highest = {"num_inference_steps": limits.steps, "num_images_per_prompt": limits.n}
    fields: dict[str, Any] = {"prompt": prompt}
    for option in OPTIONS.values():
        if option.http is None or option.http in HANDWRITTEN | {"image"}:
            continue
        if option.http in EDIT_FIELDS and not issubclass(base, Edit):
            continue
        default = (defaults or {}).get(option.name, option.default)
        bounds = (option.http_range[1], highest.get(option.name))
        high = min((bound for bound in bounds if bound is not None), default=None)
        fields[option.http] = field(option, default, high, limits.prompt)
    return create_model(f"{base.__name__}Fields", __base__=base, **fields)


def field(option: Option, default: Any, high: float | None, characters: int) -> tuple[Any, Any]:
    """An option as a field of a model: its type and pydantic's `Field`."""
    kind: Any = option.kind
    rules: dict[str, Any] = {}
    if option.choices:  # `Call` refuses other names; the document lists them
        kind = Annotated[Name, Field(min_length=1, json_schema_extra={"enum": [*option.choices]})]
    elif kind is str:
        kind = Annotated[Text, Field(max_length=characters)]
    elif kind in (int, float):
        rules = {"ge": option.http_range[0], "le": high}
        if kind is float:
            rules["allow_inf_nan"] = False
    if default is None:
        kind = kind | None
    return kind, Field(default, description=option.help, **rules)


def checked(model: type[Parsed], validate: Callable[[], Parsed], limits: Limits) -> Parsed:
    """A body that can be honoured; ApiError names the first field that cannot."""
    try:
        body = validate()
    except ValidationError as error:
        raise refusal(error, model) from None
    if body.stream and getattr(body, "n", 1) > 1:
        raise ApiError(400, "n: streaming makes one image; send n=1, or stream=false", "n", "invalid_value")
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images: only with stream=true", "partial_images", "invalid_value")
    side = max(size or 0 for size in parse_size(body.size))
    if side > limits.side:
        raise ApiError(400, f"size: width and height end at {limits.side} pixels here", "size", "invalid_value")
    return body


def refusal(error: ValidationError, model: type[Body]) -> ApiError:
    """What pydantic found first, in OpenAI's words."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param in UNSUPPORTED:
        message = f"{param}: this server does not support it: leave it out"
        return ApiError(400, message, param, "unsupported_parameter")
    message = f"{'the body' if param is None else param}: {first['msg']}"
    if first["type"] == "extra_forbidden" and param in EDIT_FIELDS:
        message = f"{param}: only /v1/images/edits takes it"
    elif first["type"] == "extra_forbidden" and param is not None:
        near = meant(param, model.model_fields, http=True)
        message = f"{param}: there is no such field" + (f": did you mean {near}?" if near else "")
    return ApiError(400, message, param, CODES.get(first["type"], "invalid_value"))


def parse_size(size: str) -> tuple[int | None, int | None]:
    """ "WIDTHxHEIGHT" or "auto"."""
    if size == "auto":
        return None, None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if not match:
        raise ApiError(400, f"size must be auto or WIDTHxHEIGHT, not {size!r}", "size", "invalid_value")
    return int(match[1]), int(match[2])


ImageBody = body_model(Body, Limits())
EditBody = body_model(Edit, Limits())
