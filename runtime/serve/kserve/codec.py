"""Tensors → `Call`, and `Result` → tensors: what HTTP and gRPC have in common."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from engines.errors import NonFiniteError, ParameterError
from runtime.call import OPTIONS, Call, meant
from runtime.input_image import read_image
from runtime.pipeline import Result
from runtime.serve.kserve.tensor import TYPES, Tensor
from runtime.serve.limits import Limits

# names of inputs are those of `Call`, with the short ones that the protocol's users know
SHORT = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
SIZE, IMAGE = "size", "image"  # [width, height]; pixels, or a file
PRIORITY = "priority"  # a parameter of the request, as Triton has it
INPUTS = {
    name: option
    for name, option in OPTIONS.items()
    if option.http and option.http != "size" and name not in (IMAGE, PRIORITY)
} | {short: OPTIONS[name] for short, name in SHORT.items()}
NAMES = (*INPUTS, SIZE, IMAGE)
EDITS = (IMAGE, "strength")  # inputs of models that can start from an image
DATATYPES = {str: "BYTES", int: "INT64", float: "FP32", bool: "BOOL"}
KINDS = {str: "O", int: "iu", float: "fiu", bool: "b"}
FORMATS = ("PNG", "JPEG", "WEBP")
OUTPUTS = {"image": "UINT8", "latents": "FP32", "report": "BYTES"}


@dataclass(frozen=True)
class Inference:
    """A parsed request. `outputs` are the wanted ones by name, with their parameters; none means all."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


def to_call(inference: Inference, limits: Limits, defaults: Mapping[str, Any]) -> Call:
    """What the engine is asked for; ParameterError names the first input that cannot be used."""
    given: dict[str, Any] = {name: value for name, value in defaults.items() if value is not None}
    named: dict[str, str] = {}
    for name, tensor in inference.inputs.items():
        if name == SIZE:
            given["width"], given["height"] = _size(tensor)
            continue
        if name == IMAGE:
            given[IMAGE] = _image(tensor, limits.side)
            continue
        if name not in INPUTS:
            near = meant(name, NAMES)
            hint = f"did you mean {near}?" if near else f"use {', '.join(NAMES)}"
            raise ParameterError(name, f"there is no input {name}: {hint}")
        option = INPUTS[name]
        if option.name in named:
            raise ParameterError(name, f"{name} and {named[option.name]} are the same input: send one of them")
        named[option.name] = name
        given[option.name] = _value(name, tensor)
    if "prompt" not in given:
        raise ParameterError("prompt", "the input prompt is missing: send a BYTES tensor of shape [1]")
    priority = inference.parameters.get(PRIORITY, 0)
    if priority != 0 or isinstance(priority, bool):  # 0 is Triton's word for none
        given[PRIORITY] = OPTIONS[PRIORITY].check(priority)
    _check_limits(given, limits)
    return Call(**given)


def _value(name: str, tensor: Tensor) -> Any:
    """The one element of a tensor in the option's plain type."""
    kind = INPUTS[name].kind
    if tensor.array.dtype.kind not in KINDS[kind]:
        raise ParameterError(name, f"{name} must be {DATATYPES[kind]}, not {tensor.datatype}")
    if tensor.array.size != 1:
        raise ParameterError(name, f"{name} must have one element, shape [1], not {tensor.shape}")
    value = tensor.array.ravel()[0]
    if kind is not str:
        return kind(value)
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise ParameterError(name, f"{name} is not valid UTF-8 ({error.reason})") from None
    if "\x00" in text:
        raise ParameterError(name, f"{name} holds a zero character: leave it out")
    return text


def _size(tensor: Tensor) -> tuple[int, int]:
    if tensor.array.size != 2 or tensor.array.dtype.kind not in "iu":
        raise ParameterError(SIZE, f"size must be INT64 [width, height], not {tensor.datatype} of {tensor.shape}")
    width, height = (int(one) for one in tensor.array.ravel())
    return width, height


def _image(tensor: Tensor, side: int) -> Image.Image:
    """An image to start from: pixels as UINT8 (height, width, 3), or one file as BYTES; a leading 1 is allowed."""
    if tensor.datatype == "BYTES" and tensor.array.size == 1:
        return read_image(tensor.array.ravel()[0], side)
    array = tensor.array[0] if tensor.array.ndim > 3 and tensor.array.shape[0] == 1 else tensor.array
    if tensor.datatype != "UINT8" or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        forms = "UINT8 pixels of shape [height, width, 3], or a PNG, JPEG or WebP file as BYTES of shape [1]"
        raise ParameterError(IMAGE, f"image must be {forms}, not {tensor.datatype} of {tensor.shape}")
    if max(array.shape) > side:
        message = f"image: width and height end at {side} pixels here, this has {array.shape[1::-1]}"
        raise ParameterError(IMAGE, message)
    return Image.fromarray(array)


def _check_limits(given: Mapping[str, Any], limits: Limits) -> None:
    """ParameterError for what is beyond the server's limits, which are narrower than the options' ranges."""
    highest = {"num_inference_steps": limits.steps, "num_images_per_prompt": limits.n, "width": limits.side,
               "height": limits.side}  # fmt: skip
    for name, value in given.items():
        option = OPTIONS[name]
        bounds = [one for one in (option.http_range[1], highest.get(name)) if one is not None]
        if bounds and not isinstance(value, str) and value > min(bounds):
            raise ParameterError(name, f"{name} ends at {min(bounds)} here, not {value}")
        if option.kind is str and isinstance(value, str) and len(value) > limits.prompt:
            raise ParameterError(name, f"{name} ends at {limits.prompt} characters here, this has {len(value)}")


def check_outputs(inference: Inference) -> None:
    """ParameterError for outputs that do not exist or cannot be given as asked, before any work is done."""
    for name, parameters in inference.outputs.items():
        if name not in OUTPUTS:
            raise ParameterError(name, f"there is no output {name}: use {', '.join(OUTPUTS)}")
        if parameters.get("classification"):
            raise ParameterError(name, f"{name} has no classes: leave the parameter classification (class_count) out")
        file_format(name, parameters, inference.parameters)
        if name == "latents" and parameters.get("datatype", "FP32") not in ("FP32", "FP16"):
            raise ParameterError(name, "the datatype of latents must be FP32 or FP16")


def file_format(name: str, parameters: Mapping[str, Any], common: Mapping[str, Any]) -> str | None:
    """Of the output image: the file format, or None for pixels. The output's own parameter counts first."""
    chosen = parameters.get("format", common.get("format", "raw"))
    if not isinstance(chosen, str) or chosen.upper() not in ("RAW", *FORMATS):
        raise ParameterError(name, f"the format of {name} must be raw, {', '.join(FORMATS).lower()}, not {chosen!r}")
    return None if chosen.upper() == "RAW" else chosen.upper()


def to_outputs(inference: Inference, result: Result) -> list[Tensor]:
    """The wanted outputs, in the order in which they were asked for.

    image: UINT8 (images, height, width, 3), or BYTES (images,) of files where a `format` was asked for.
    latents: FP32 or FP16 (images, channels, height, width). report: BYTES (1,), JSON.
    """
    made = []
    for name, parameters in (inference.outputs or {name: {} for name in OUTPUTS}).items():
        if name == "image":
            made.append(image_tensor(result.images, file_format(name, parameters, inference.parameters)))
        elif name == "latents":
            made.append(_latents(result, parameters.get("datatype", "FP32")))
        else:
            made.append(_texts(name, [json.dumps(result.report.to_dict()).encode()]))
    return made


def _latents(result: Result, datatype: str) -> Tensor:
    with np.errstate(over="ignore"):
        array = result.latents.astype(TYPES[datatype])
    if not np.isfinite(array).all():
        raise NonFiniteError("the latents exceed FP16: ask for them as FP32")
    return Tensor("latents", datatype, array)


def image_tensor(images: list[Image.Image], file_format: str | None) -> Tensor:
    """Images as pixels, or as files."""
    if file_format is None:
        pixels = [np.asarray(one) for one in images]
        return Tensor("image", "UINT8", np.stack(pixels) if len(pixels) > 1 else pixels[0][None])
    files = []
    for one in images:
        buffer = io.BytesIO()
        one.save(buffer, file_format, **({} if file_format == "PNG" else {"quality": 100}))
        files.append(buffer.getvalue())
    return _texts("image", files)


def _texts(name: str, elements: list[bytes]) -> Tensor:
    array = np.empty(len(elements), object)
    array[:] = elements
    return Tensor(name, "BYTES", array)


def metadata(model: str, *, edits: bool) -> dict[str, Any]:
    """The model's metadata. Every input but prompt is optional; `edits`: whether it can start from an image."""
    inputs = [
        {"name": name, "datatype": DATATYPES[option.kind], "shape": [1]}
        for name, option in INPUTS.items() if edits or name not in EDITS
    ]  # fmt: skip
    inputs.append({"name": SIZE, "datatype": "INT64", "shape": [2]})
    if edits:
        inputs.append({"name": IMAGE, "datatype": "UINT8", "shape": [-1, -1, 3]})
    shapes = {"image": [-1, -1, -1, 3], "latents": [-1, -1, -1, -1], "report": [1]}
    outputs = [{"name": name, "datatype": kind, "shape": shapes[name]} for name, kind in OUTPUTS.items()]
    return {"name": model, "versions": ["1"], "platform": "driffusion", "inputs": inputs, "outputs": outputs}


def config(model: str, *, edits: bool) -> dict[str, Any]:
    """The model's configuration in Triton's words."""
    facts = metadata(model, edits=edits)
    names = {"BYTES": "TYPE_STRING"}

    def entry(one: dict[str, Any]) -> dict[str, Any]:
        kind = one["datatype"]
        return {"name": one["name"], "data_type": names.get(kind, f"TYPE_{kind}"), "dims": one["shape"]}

    return {
        "name": model, "platform": "driffusion", "backend": "driffusion", "max_batch_size": 0,
        "input": [entry(one) | {"optional": one["name"] != "prompt"} for one in facts["inputs"]],
        "output": [entry(one) for one in facts["outputs"]],
        "model_transaction_policy": {"decoupled": False},  # one answer; previews only where a stream asks for them
    }  # fmt: skip
