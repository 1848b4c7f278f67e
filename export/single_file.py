"""Checkpoints in one file, as other tools save them: diffusers' `from_single_file`, component by component."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers.loaders
import torch
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import snapshot_download

from engines.errors import ExportError
from export.foreign import first_line, reading
from export.lora import tensor_names

SUFFIXES = (".safetensors", ".ckpt")
_CONFIGS = ("*.json", "*.txt", "*.model")


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Its tensors, which stay on disk until they are used; no code in a file is run."""
    with reading(f"{checkpoint} cannot be loaded"):
        found: dict[str, torch.Tensor] = load_single_file_checkpoint(str(checkpoint))
        return found


def check(checkpoint: Path, *, allow_pickle: bool) -> None:
    """ExportError for a file that is no checkpoint of a whole model."""
    if checkpoint.suffix != ".safetensors":
        if not allow_pickle:
            raise ExportError(f"{checkpoint} is a pickle: convert it to safetensors, or insist with --allow-pickle")
        return
    names = tensor_names(checkpoint)
    if any("lora" in name or "hada_" in name or "lokr_" in name for name in names):
        raise ExportError(f"{checkpoint} is a LoRA or the like: name its model, and give this file as LORA= (--lora)")
    if not any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in names):
        raise ExportError(f"{checkpoint} holds no whole model: none of its {len(names)} tensors is of a denoiser")


def config_folder(checkpoint: Path) -> Path:
    """The configs of the published model that a checkpoint has the layout of, from the hub or its cache.

    ExportError with the way to give them where they cannot be had.
    """
    tensors = read(checkpoint)
    with reading(f"{checkpoint} cannot be loaded"):
        layout = infer_diffusers_model_type(tensors)
    refuse_layout(checkpoint, layout)
    name = DIFFUSERS_DEFAULT_PIPELINE_PATHS[layout]["pretrained_model_name_or_path"]
    try:
        return Path(snapshot_download(name, allow_patterns=list(_CONFIGS)))
    except Exception as error:
        raise ExportError(
            f"{checkpoint} has the layout of {name}, whose configuration cannot be had ({first_line(error)}): give the "
            "folder of a diffusers model of that layout with CONFIG=FOLDER (--config FOLDER)"
        ) from error


def refuse_layout(checkpoint: Path, layout: str) -> None:
    """Layouts that diffusers tells from the tensors and that no family covers."""
    if layout == "xl_refiner":
        raise ExportError(f"{checkpoint} is the SDXL refiner, which starts from another model's latents")
    if "inpaint" in layout or layout in ("controlnet", "upscale"):
        raise ExportError(f"{checkpoint} is for {layout.replace('_', ' ')}, which is not exported")


def component(checkpoint: Path, folder: Path, name: str, kind: Any, dtype: torch.dtype | None) -> torch.nn.Module:
    """One component with the checkpoint's weights, or the folder's where the checkpoint has none of it.

    ExportError for weights that are missing, of another shape, or that belong to no layer.
    """
    what = f"{checkpoint} cannot be loaded: {name}"
    if issubclass(kind, diffusers.loaders.FromOriginalModelMixin):
        with reading(what):
            expected, found = _shapes(checkpoint, folder, name, kind)
        complete(what, checkpoint.name, expected, found)
    with reading(what):
        module: torch.nn.Module = load_single_file_sub_model(
            library_name=kind.__module__.split(".")[0], class_name=kind.__name__, name=name,
            checkpoint=read(checkpoint), pipelines=pipelines, is_pipeline_module=False,
            cached_model_config_path=str(folder), local_files_only=True, torch_dtype=dtype or torch.float32,
        )  # fmt: skip
    tensors = module.state_dict()
    given = {key: tensor for key, tensor in tensors.items() if not tensor.is_meta}
    complete(what, checkpoint.name, _shapes_of(tensors), _shapes_of(given))
    return module


Shapes = Mapping[str, tuple[int, ...]]


def _shapes(checkpoint: Path, folder: Path, name: str, kind: Any) -> tuple[Shapes, Shapes]:
    """The shapes of a model of diffusers by its config, and those that the checkpoint gives under diffusers' names."""
    config = kind.load_config(folder, subfolder=name, local_files_only=True)
    with torch.device("meta"):
        expected = kind.from_config(config).state_dict()
    found = read(checkpoint)
    if not set(expected) <= set(found):
        found = SINGLE_FILE_LOADABLE_CLASSES[kind.__name__]["checkpoint_mapping_fn"](config=config, checkpoint=found)
    return _shapes_of(expected), _shapes_of(found)


def _shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def complete(what: str, file: str, expected: Shapes, found: Shapes, buffers: Iterable[str] = ()) -> None:
    """ExportError unless a file has exactly the tensors that are expected, beside those called `buffers`."""

    def refuse(keys: set[str], says: str) -> None:
        if keys:
            tensors = "1 tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"
            raise ExportError(f"{what}: {tensors} {says}, first {min(keys)}")

    refuse(set(expected) - set(found) - set(buffers), f"missing in {file}")
    for key in sorted(set(expected) & set(found)):
        if expected[key] != found[key]:
            shapes = ["×".join(map(str, shape)) for shape in (found[key], expected[key])]
            raise ExportError(f"{what}: {key} is {shapes[0]} in {file} and {shapes[1]} by config.json")
    refuse(set(found) - set(expected) - set(buffers), f"in {file} that config.json has no layer for")


def check_prediction(checkpoint: Path, scheduler: Any, folder: Path) -> None:
    """Some checkpoints mark that they predict v; diffusers goes by the config alone."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    names = tensor_names(checkpoint) if checkpoint.suffix == ".safetensors" else list(read(checkpoint))
    if "v_pred" in names and kind != "v_prediction":
        more = " and rescale_betas_zero_snr true" if "ztsnr" in names else ""
        raise ExportError(
            f"{checkpoint} says that it predicts v, and {folder}/scheduler/scheduler_config.json says {kind}: write "
            f'prediction_type "v_prediction"{more} there'
        )
