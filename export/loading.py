"""From a folder, a hub name or a single file to the components of a diffusers pipeline, loaded by its own libraries.

Components are loaded when a network needs them and let go of after it, because all of a large model at once may be more
than a machine has. Nothing but safetensors is read unless the user insists, and no code from a folder is ever run.
The libraries only warn where weights are missing and then draw them at random; here that is an error (`_complete`).
"""

from __future__ import annotations

import inspect
import json
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
from transformers.utils import logging as transformers_logging

from engines.errors import ExportError
from export import UNUSED, single_file
from export.families import Family, family_of
from export.foreign import first_line, reading
from export.lora import Lora, check_lora, fuse

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A diffusers folder, what its index says, and what is to be fused into it.

    `checkpoint` is a single file that has the weights; then the folder gives the configs, and what the file lacks.
    """

    folder: Path
    index: Mapping[str, Any]
    loras: tuple[Lora, ...] = ()
    allow_pickle: bool = False
    checkpoint: Path | None = None

    @property
    def family_name(self) -> str:
        """The class of the pipeline."""
        return str(self.index.get("_class_name"))

    @property
    def family(self) -> Family:
        """Its entry."""
        return family_of(self.family_name, self.folder)

    @property
    def refusal(self) -> str:
        """How messages begin."""
        return f"{self.checkpoint or self.folder} cannot be loaded"

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

    def kind(self, component: str) -> Any:
        """The class of a component, of diffusers or transformers and none other."""
        library, name = self.index[component]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(name), None)
        if kind is None:
            raise ExportError(
                f"{self.refusal}: {component}: {library}.{name} is no class of diffusers or transformers, and no other "
                "code is run"
            )
        return kind

    def config(self, component: str) -> Any:
        """A component's config without its weights, complete: older folders leave out what came later."""
        kind, folder = self.kind(component), self.folder / component
        with reading(f"{self.refusal}: {component}/config.json"):
            if self.index[component][0] == "transformers":
                return kind.config_class.from_pretrained(folder, local_files_only=True)
            given = inspect.signature(kind.__init__).parameters.values()
            defaults = {one.name: one.default for one in given if one.default is not one.empty}
            found = kind.load_config(folder, local_files_only=True)
            _check_fields(kind, found, {one.name for one in given})
            return SimpleNamespace(**defaults | found)

    def weights(self, component: str) -> list[Path]:
        """The files of a component that would be loaded: safetensors, else pickles where those are allowed."""
        files = sorted((self.folder / component).glob("*.safetensors"))
        if not files and self.allow_pickle:
            return sorted((self.folder / component).glob("*.bin"))
        plain = [file for file in files if _variant(file) is None]
        return plain or files

    def parameters(self, component: str) -> int:
        """How many numbers its weights are, by its config."""
        kind = self.kind(component)
        with reading(f"{self.refusal}: {component}/config.json"), torch.device("meta"):
            if self.index[component][0] == "transformers":
                empty = kind(self.config(component))
            else:
                empty = kind.from_config(kind.load_config(self.folder / component, local_files_only=True))
        return sum(parameter.numel() for parameter in empty.parameters())


_QUANTIZED = "quantization_config"


def _check_fields(kind: Any, config: Mapping[str, Any], known: set[str]) -> None:
    """ValueError for a field that a class does not know and so ignores; diffusers would only warn.

    Some classes add fields of their own while they are made, so one is made, without memory, where there are others.
    """
    others = {name: value for name, value in config.items() if name not in known and not name.startswith("_")}
    others = {name: value for name, value in others.items() if value not in (None, False) and name != _QUANTIZED}
    if not others:
        return
    with torch.device("meta"):
        own = kind(**{name: value for name, value in config.items() if name in known}).config
    for name, value in others.items():
        if name not in own:
            raise ValueError(
                f"{kind.__name__} of this version of diffusers knows no {name}={value!r}; where it may be ignored, "
                "take it out of the file"
            )


class Components(SimpleNamespace):
    """Some components of a pipeline, loaded, by name; of the others, `config` alone, and None for absent ones.

    `config` is the pipeline's own.
    """


def _variant(file: Path) -> str | None:
    """`fp16` of model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    parts = file.name.split(".")
    return parts[1].split("-")[0] if len(parts) == 3 else None


def open_source(
    folder: Path, loras: Sequence[Lora] = (), *, allow_pickle: bool = False, checkpoint: Path | None = None
) -> Source:
    """What is in a folder; ExportError when it is no pipeline, incomplete, or of a family that cannot be exported.

    Reads configs and the headers of weights alone: everything is refused here that can be refused without work.
    """
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
    if index.get("requires_aesthetics_score"):
        raise ExportError(
            f"{folder} is the SDXL refiner, which starts from another model's latents: it draws no images"
        )
    source = Source(folder, index, tuple(loras), allow_pickle, checkpoint)
    if checkpoint is not None:
        single_file.check(checkpoint, allow_pickle=allow_pickle)
    for lora in loras:
        check_lora(lora.file)
    _check_parts(source)
    return source


def _check_parts(source: Source) -> None:
    """Every component is there, of a class that its networks are made for, and has weights that can be read."""
    family, there = source.family, source.parts()
    wanted = [part for parts, _ in family.networks.values() for part in parts]
    needed = {*wanted, "scheduler", *(text.tokenizer for text in family.texts)}
    missing = sorted(part for part in needed if part not in there and part not in family.optional)
    missing += sorted(part for part in needed & set(there) if not (source.folder / part).is_dir())
    if missing:
        raise ExportError(
            f"{source.folder} cannot be loaded: {', '.join(missing)} missing; a {source.family_name} has it"
        )
    for part in sorted(needed & set(there)):
        name, known = source.kind(part).__name__, family.classes(part)
        if known and name not in known:
            raise ExportError(
                f"{source.refusal}: {part} is a {name}; of a {source.family_name} it can be {' or '.join(known)}"
            )
    for part in sorted(set(wanted) & set(there)):
        config = source.config(part)
        quantized = getattr(config, _QUANTIZED, None)
        if quantized:
            method = quantized.get("quant_method", "") if isinstance(quantized, Mapping) else ""
            raise ExportError(
                f"{source.refusal}: {part} is quantized ({method or 'by its config'}), which ONNX cannot take over: "
                "export the checkpoint that it was made of"
            )
    if source.checkpoint is not None:
        return
    without = sorted(part for part in set(wanted) & set(there) if not source.weights(part))
    if without:
        raise ExportError(
            f"{source.folder} cannot be loaded: there is no safetensors file in {', '.join(without)}; convert "
            "the weights, or insist with --allow-pickle, which runs code that such files may hold"
        )


def check_weights(source: Source) -> None:
    """ExportError for weights that are missing, of another shape, or that belong to no layer.

    Folders are compared by shapes alone, in a second; the weights of a single file have to be converted for it.
    """
    wanted = dict.fromkeys(part for parts, _ in source.family.networks.values() for part in parts)
    for part in wanted:
        if part in source.parts():
            module(source, part, None)


def module(source: Source, component: str, precision: str | None) -> torch.nn.Module:
    """A component with its weights in a precision, all of them from its files; without one, with shapes alone."""
    kind, dtype = source.kind(component), DTYPES.get(precision or "")
    if source.checkpoint is not None:
        return single_file.component(source.checkpoint, source.folder, component, kind, dtype)
    files = source.weights(component)
    variants = {_variant(file) for file in files} - {None}
    with reading(f"{source.refusal}: {component}"):
        loaded, found = kind.from_pretrained(
            source.folder / component, local_files_only=True, use_safetensors=_safetensors(source.allow_pickle),
            dtype=dtype or torch.float32, variant=variants.pop() if variants else None, output_loading_info=True,
            ignore_mismatched_sizes=True, **({"device_map": "meta"} if dtype is None else {}),
        )  # fmt: skip
    _complete(f"{source.refusal}: {component}", loaded, found, files)
    result: torch.nn.Module = loaded
    return result


def _complete(what: str, loaded: torch.nn.Module, found: Mapping[str, Any], files: Sequence[Path]) -> None:
    """ExportError unless every weight came from the files. Tied weights, which come from others, are not in `found`."""
    expected = {key: tuple(tensor.shape) for key, tensor in loaded.state_dict().items()}
    there = {key: shape for key, shape in expected.items() if key not in found["missing_keys"]}
    there |= dict.fromkeys(found["unexpected_keys"], ())
    there |= {key: tuple(shape) for key, shape, _ in found["mismatched_keys"]}
    name = files[0].name if len(files) == 1 else f"{len(files)} files"
    single_file.complete(what, name, expected, there, {key for key, _ in loaded.named_buffers()})
    if found.get("error_msgs"):
        raise ExportError(f"{what}: {first_line(ValueError(*found['error_msgs'][:1]))}")


def configs(source: Source) -> Components:
    """Every component's config, tokenizers, nothing else: what sizes and kinds are read from."""
    return load(source, (), "fp32")


def load(source: Source, wanted: Sequence[str], precision: str) -> Components:
    """Components with their weights in a precision; ExportError says what cannot be loaded."""
    there = source.parts()
    modules = {name: module(source, name, precision) for name in source.loaded_with(wanted)}
    found: dict[str, Any] = dict(modules)
    for name in there:
        if name.startswith("tokenizer") or name == "scheduler":
            with reading(f"{source.refusal}: {name}"):
                kind = source.kind(name)
                if kind.__name__.endswith("Processor"):
                    kind = (
                        transformers.AutoTokenizer
                    )  # what prepares images beside it needs packages that nothing else does
                found[name] = kind.from_pretrained(source.folder / name, local_files_only=True)
        elif name not in modules:
            found[name] = SimpleNamespace(config=source.config(name))
    for name in source.family.optional:
        found.setdefault(name, None)
    if source.loras and any(name != "vae" for name in modules):
        loaded = {name: found[name] for name in there if not isinstance(found[name], SimpleNamespace)}
        absent = {name: None for name, entry in source.index.items() if isinstance(entry, list) and name not in loaded}
        with reading(source.refusal):
            pipeline = _pipeline_class(source).from_pretrained(source.folder, local_files_only=True, **loaded, **absent)
        fuse(pipeline, source.loras, f"{source.checkpoint or source.folder}, a {source.family_name}")
    return Components(config=_pipeline_config(source), **found)


def _pipeline_class(source: Source) -> Any:
    return getattr(diffusers, source.family_name)


def _pipeline_config(source: Source) -> dict[str, Any]:
    """What a pipeline knows beside its components, with the defaults of its class."""
    given = inspect.signature(_pipeline_class(source).__init__).parameters.values()
    config = {one.name: one.default for one in given if one.default is not one.empty}
    return config | {name: value for name, value in source.index.items() if not isinstance(value, list)}


def _safetensors(allow_pickle: bool) -> bool | None:
    """As diffusers takes it: with None it reads safetensors where there are some, per component, else pickles."""
    return None if allow_pickle else True


def download(name: str, *, allow_pickle: bool = False) -> Path:
    """The folder of a model on the hub, in its cache; ExportError when it cannot be had.

    Diffusers does it, and honours HF_HOME, HF_HUB_OFFLINE and HF_TOKEN.
    """
    try:
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=_safetensors(allow_pickle)))
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ExportError(
            f"{name} is no folder, and the hub cannot give it{offline}: {first_line(error)}; give the path of a "
            "folder that diffusers' save_pretrained or `hf download` made"
        ) from error


def quiet() -> None:
    """Both libraries talk about optional packages and draw progress bars.

    What else they warn of is an error here: weights in `_complete`, unknown fields in `Source.config`.
    """
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
