"""Checkpoints in one file, as other tools save them: diffusers' `from_single_file`, component by component."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import pipelines
from diffusers.loaders.single_file import load_single_file_sub_model
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


class _Warnings(logging.Handler):
    """Keeps what diffusers warns of: the only sign of weights that belong to no layer."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`."""
        self.found.append(record.getMessage())


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

    ExportError for weights that are missing, or that belong to no layer.
    """
    library, heard, log = kind.__module__.split(".")[0], _Warnings(), logging.getLogger("diffusers")
    level = log.level
    log.addHandler(heard)
    log.setLevel(logging.WARNING)
    others = [handler for handler in log.handlers if handler is not heard]
    for handler in others:
        log.removeHandler(handler)
    try:
        with reading(f"{checkpoint} cannot be loaded: {name}"):
            module: torch.nn.Module = load_single_file_sub_model(
                library_name=library, class_name=kind.__name__, name=name, checkpoint=read(checkpoint),
                pipelines=pipelines, is_pipeline_module=False, cached_model_config_path=str(folder),
                local_files_only=True, torch_dtype=dtype or torch.float32,
            )  # fmt: skip
    finally:
        log.removeHandler(heard)
        log.setLevel(level)
        for handler in others:
            log.addHandler(handler)
    missing = sorted(key for key, tensor in module.state_dict().items() if tensor.is_meta)
    if missing:
        raise ExportError(
            f"{checkpoint} cannot be loaded: {name}: {len(missing)} tensors are missing in {checkpoint.name}, first "
            f"{missing[0]}"
        )
    unused = [line for line in heard.found if "were not used" in line]
    if unused:
        raise ExportError(f"{checkpoint} cannot be loaded: {name}: {' '.join(unused[0].split())[:300]}")
    return module


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
