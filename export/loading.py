"""From a folder or a hub name to the components of a diffusers pipeline, loaded by diffusers itself.

Components are loaded when a network needs them and let go of after it, because all of a large model at once may be more
than a machine has. Nothing but safetensors is read unless the user insists, and no code from a folder is ever run.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from engines.errors import ExportError
from export import UNUSED
from export.families import Family, family_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight")  # how training tools name one half of a layer
_LOADING = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Lora:
    """A LoRA file to fuse, and how strongly."""

    file: Path
    scale: float


@dataclass(frozen=True)
class Source:
    """A diffusers folder, what its index says, and what is to be fused into it."""

    folder: Path
    index: Mapping[str, Any]
    loras: tuple[Lora, ...] = ()
    allow_pickle: bool = False

    @property
    def family_name(self) -> str:
        """The class of the pipeline."""
        return str(self.index["_class_name"])

    @property
    def family(self) -> Family:
        """Its entry."""
        return family_of(self.family_name, self.folder)

    def parts(self) -> list[str]:
        """The components that the folder has."""
        listed = [
            name for name, entry in self.index.items()
            if name not in UNUSED and isinstance(entry, list) and entry and entry[0] is not None
        ]  # fmt: skip
        return [name for name in listed if (self.folder / name).is_dir() or name not in self.family.optional]

    def loaded_with(self, parts: Sequence[str]) -> list[str]:
        """What is in memory when these are wanted: diffusers spreads a LoRA over the denoiser and the text encoders."""
        there = self.parts()
        wanted = [name for name in parts if name in there]
        fused = [name for name in there if name in ("unet", "transformer") or name.startswith("text_encoder")]
        return fused if self.loras and set(wanted) & set(fused) else wanted

    def config(self, component: str) -> Any:
        """A component's config without its weights, complete: older folders leave out what came later."""
        try:
            library, name = self.index[component]
            return _config(library, name, self.folder / component)
        except (OSError, ValueError, TypeError) as error:
            raise ExportError(
                f"{self.folder} cannot be loaded: {component}/config.json: {_first_line(error)}"
            ) from error

    def weights(self, component: str) -> list[Path]:
        """The safetensors files of a component that would be loaded."""
        files = sorted((self.folder / component).glob("*.safetensors"))
        plain = [file for file in files if _variant(file) is None]
        return plain or files

    def parameters(self, component: str) -> int:
        """How many numbers its weights are, read from the files' headers."""
        total = 0
        for file in self.weights(component):
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - it is no dict
                        size = 1
                        for axis in tensors.get_slice(name).get_shape():
                            size *= axis
                        total += size
            except (OSError, SafetensorError) as error:
                raise ExportError(f"{file} cannot be loaded: {error}") from error
        return total


class Components(SimpleNamespace):
    """Some components of a pipeline, loaded, by name; of the others, `config` alone, and None for absent ones.

    `config` is the pipeline's own.
    """


def _config(library: str, name: str, folder: Path) -> Any:
    """What a class of diffusers or transformers makes of its config file, with defaults for what is not in it."""
    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if kind is None:
        raise ValueError(f"{library}.{name} is no class of diffusers or transformers, and no other code is run")
    if library == "transformers":
        return kind.config_class.from_pretrained(folder, local_files_only=True)
    given = inspect.signature(kind.__init__).parameters.values()
    defaults = {one.name: one.default for one in given if one.default is not one.empty}
    return SimpleNamespace(**defaults | kind.load_config(folder, local_files_only=True))


def _variant(file: Path) -> str | None:
    """`fp16` of model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    parts = file.name.split(".")
    return parts[1].split("-")[0] if len(parts) == 3 else None


def open_source(folder: Path, loras: Sequence[Lora] = (), *, allow_pickle: bool = False) -> Source:
    """What is in a folder; ExportError when it is no pipeline, incomplete, or of a family that cannot be exported."""
    quiet()
    path = folder / "model_index.json"
    if not path.is_file():
        raise ExportError(f"{folder} is not a diffusers model: it has no model_index.json")
    try:
        index = json.loads(path.read_text())
    except ValueError as error:
        raise ExportError(f"{folder} cannot be loaded: model_index.json is no JSON: {error}") from error
    if not isinstance(index, dict):
        raise ExportError(f"{folder} cannot be loaded: model_index.json holds no object")
    family = family_of(index.get("_class_name"), folder)
    source = Source(folder, index, tuple(loras), allow_pickle)
    needed = {part for parts, _ in family.networks.values() for part in parts} | {"scheduler", "tokenizer"}
    there = source.parts()
    missing = sorted(part for part in needed if part not in there and part not in family.optional)
    missing += sorted(part for part in needed & set(there) if not (folder / part).is_dir())
    if missing:
        raise ExportError(f"{folder} cannot be loaded: {', '.join(missing)} missing; a {source.family_name} has it")
    without = [
        part for parts, _ in family.networks.values() for part in parts
        if part in there and not source.weights(part)
    ]  # fmt: skip
    if without and not allow_pickle:
        raise ExportError(
            f"{folder} cannot be loaded: there is no safetensors file in {', '.join(sorted(set(without)))}; convert "
            "the weights, or insist with --allow-pickle, which runs code that such files may hold"
        )
    return source


def configs(source: Source) -> Components:
    """Every component's config, tokenizers, nothing else: what sizes and kinds are read from."""
    return load(source, (), "fp32")


def load(source: Source, wanted: Sequence[str], precision: str) -> Components:
    """Components with their weights in a precision; ExportError says what cannot be loaded."""
    there = source.parts()
    wanted = source.loaded_with(wanted)
    tokenizers = [name for name in there if name.startswith("tokenizer")]
    absent = {
        name: None for name, entry in source.index.items()
        if isinstance(entry, list) and name not in (*wanted, *tokenizers, "scheduler")
    }  # fmt: skip
    absent |= {name: None for name in source.family.optional if name not in there}
    variants = {_variant(file) for name in wanted for file in source.weights(name)} - {None}
    try:
        pipeline = getattr(diffusers, source.family_name).from_pretrained(
            source.folder, local_files_only=True, use_safetensors=_safetensors(source.allow_pickle),
            dtype=DTYPES[precision], variant=variants.pop() if variants else None, **absent,
        )  # fmt: skip
    except _LOADING as error:  # missing, truncated or mixed files
        raise ExportError(f"{source.folder} cannot be loaded by diffusers: {_first_line(error)}") from error
    if any(name != "vae" for name in wanted):
        _fuse(pipeline, source)
    found = Components(config=dict(pipeline.config), scheduler=pipeline.scheduler)
    for name, component in pipeline.components.items():
        if component is None and name in there:
            component = SimpleNamespace(config=source.config(name))
        setattr(found, name, component)
    return found


def _fuse(pipeline: Any, source: Source) -> None:
    """Adds the LoRAs to the weights, in order; diffusers and peft do it."""
    for number, lora in enumerate(source.loras):
        name = f"lora{number}"
        refusal = f"{lora.file} does not fit {source.folder}, a {source.family_name}"
        diffusers_logging.set_verbosity(logging.CRITICAL)  # what it logs as an error it raises as well
        try:
            pipeline.load_lora_weights(lora.file.parent, weight_name=lora.file.name, adapter_name=name)
        except (*_LOADING, IndexError) as error:
            raise ExportError(f"{refusal}: {_first_line(error)}") from error
        finally:
            diffusers_logging.set_verbosity_error()
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        parameters = [key for module in modules for key, _ in module.named_parameters()]
        found = sum(key.endswith(f"lora_A.{name}.weight") for key in parameters)
        with safe_open(lora.file, "pt") as tensors:
            wanted = sum(key.endswith(_DOWN) for key in tensors.keys())  # noqa: SIM118 - it is no dict
        if not found or found < wanted:
            raise ExportError(f"{refusal}: {found or 'none'} of its {wanted} layers are in this model")
        pipeline.fuse_lora(adapter_names=[name], lora_scale=lora.scale)
        pipeline.unload_lora_weights()


def _first_line(error: Exception) -> str:
    """What went wrong, in one line; torch puts a title above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]


def _safetensors(allow_pickle: bool) -> bool | None:
    """As diffusers takes it: with None it reads safetensors where there are some, per component, else pickles."""
    return None if allow_pickle else True


def download(name: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a model on the hub, in its cache; ExportError when it cannot be had.

    Diffusers does it, and honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=_safetensors(allow_pickle)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ExportError(
            f"{name} is no folder, and the hub cannot give it{offline}: {_first_line(error)}; give the path of a "
            "folder that diffusers' save_pretrained or `hf download` made"
        ) from error


def quiet() -> None:
    """Both libraries chat about optional packages and draw bars of their own."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
