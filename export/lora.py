"""LoRA files, fused into the weights of a pipeline's components."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open

from engines.errors import ExportError
from export.foreign import reading

_DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight")  # how training tools name one half of a layer
# what stands in the names of tensors of other adapters, which diffusers cannot fuse
_OTHERS = {
    "LoHa": (".hada_w1_a", ".hada_w2_a"),
    "LoKr": (".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w2_a"),
    "full differences": (".diff", ".diff_b"),
    "OFT": (".oft_diag", ".oft_blocks", ".oft_r.weight"),
    "GLoRA": (".a1.weight", ".b1.weight"),
    "(IA)³": (".on_input",),
    "a textual inversion": ("emb_params", "string_to_param", "clip_l", "clip_g"),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file to fuse, and how strongly."""

    file: Path
    scale: float


def tensor_names(file: Path) -> list[str]:
    """The names in the header of a safetensors file."""
    with reading(f"{file} cannot be loaded"), safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def check_lora(file: Path) -> None:
    """ExportError with the name of the format where a file is another adapter, in whole or in part."""
    names = tensor_names(file)
    for format_, marks in _OTHERS.items():
        found = [name for name in names if name.endswith(marks)]
        if found:
            raise ExportError(
                f"{file} is no LoRA alone: {len(found)} of its {len(names)} tensors are {format_} (first {found[0]}), "
                "which cannot be fused"
            )
    if not any(name.endswith(_DOWN) for name in names):
        raise ExportError(f"{file} is no LoRA: none of its {len(names)} tensors is half of one")


def fuse(pipeline: Any, loras: Iterable[Lora], whose: str) -> None:
    """Adds LoRAs to the weights of a pipeline, in order; diffusers and peft do it. `whose` names the model."""
    for number, lora in enumerate(loras):
        name = f"lora{number}"
        refusal = f"{lora.file} does not fit {whose}"
        diffusers_logging.set_verbosity(logging.CRITICAL)  # what it logs as an error it raises as well
        try:
            with reading(refusal):
                pipeline.load_lora_weights(lora.file.parent, weight_name=lora.file.name, adapter_name=name)
        finally:
            diffusers_logging.set_verbosity_error()
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        parameters = [key for module in modules for key, _ in module.named_parameters()]
        found = sum(key.endswith(f"lora_A.{name}.weight") for key in parameters)
        wanted = sum(key.endswith(_DOWN) for key in tensor_names(lora.file))
        if not found or found < wanted:
            raise ExportError(f"{refusal}: {found or 'none'} of its {wanted} layers are in this model")
        with reading(refusal):
            pipeline.fuse_lora(adapter_names=[name], lora_scale=lora.scale)
            pipeline.unload_lora_weights()
