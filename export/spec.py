"""What to export, read from the command line: a model, LoRA files to fuse, sizes; and the hash that identifies it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from engines.errors import ExportError, ParameterError
from engines.manifest import sha256_file, sha256_files
from export import UNUSED

PACKAGES = ("torch", "diffusers", "transformers", "peft", "onnx", "onnxscript", "onnxruntime")
EMBEDDED = {"shapes": Path(__file__).parent / "shapes" / "model"}
CHECKPOINTS = (".safetensors", ".ckpt")
FILES = (".json", ".safetensors", ".txt", ".model", ".bin")


@dataclass(frozen=True)
class ExportSpec:
    """What to export: a model's name and folder, LoRA files with their scales, and which sides images may have.

    `model` is what stands behind `make engines MODEL=`; without it, the folder does. `checkpoint` is a single file that
    has the weights; the folder then gives the configs. `cache` adds the parts of the denoiser for feature caching.
    """

    name: str
    folder: Path
    loras: tuple[tuple[Path, float], ...] = ()
    sides: tuple[int, int] | None = None
    allow_pickle: bool = False
    model: str | None = None
    checkpoint: Path | None = None
    cache: bool = False

    @property
    def embedded(self) -> str | None:
        """The name of the embedded model that this is, with LoRA or without."""
        return next((name for name, folder in EMBEDDED.items() if folder == self.folder), None)

    @property
    def origin(self) -> str:
        """What to write behind `make engines MODEL=`, from anywhere, to get this."""
        words = [self.model or self.embedded or str(self.folder.absolute())]
        if self.checkpoint:
            words = [str(self.checkpoint.absolute()), f"CONFIG={self.folder.absolute()}"]
        if self.loras:
            files = " ".join(f"{file.resolve()}:{scale:g}" for file, scale in self.loras)
            words.append(f'LORA="{files}"' if len(self.loras) > 1 else f"LORA={files}")
        if self.sides:
            words.append(f"SIZES={self.sides[0]}-{self.sides[1]}")
        if self.cache:
            words.append("CACHE=1")
        return " ".join(words)

    def identity(self) -> str:
        """A hash over everything the export depends on: the model's files, our export code, the packages."""
        index, root = self.folder / "model_index.json", self.folder
        try:
            parts = set(json.loads(index.read_text()))
        except (ValueError, TypeError):
            parts = set()
        files = [index, *(path for part in sorted(parts - set(UNUSED)) for path in (root / part).rglob("*"))]
        own = Path(__file__).parent
        code = sha256_files(own, [path for path in own.rglob("*.py") if path.parent.name != "shapes"])
        packages = " ".join(f"{name}={version(name)}" for name in PACKAGES)
        single = f" {sha256_file(self.checkpoint)}" if self.checkpoint else ""
        fused = "".join(f" +{sha256_file(file)}:{scale:g}" for file, scale in self.loras)
        sides = f" {self.sides[0]}-{self.sides[1]}" if self.sides else ""
        content = sha256_files(root, [path for path in files if path.is_file() and path.suffix in FILES])
        cache = " cache" if self.cache else ""
        return f"{content}{single} {code[:16]} {packages}{fused}{sides}{cache}"


def checkpoint_of(model: str) -> Path | None:
    """The single file that a model is, if it is one; ExportError where it should be and is not there."""
    path = Path(os.path.abspath(model))  # noqa: PTH100 - a link has a name of its own, which resolve() takes away
    if not path.is_file() and path.suffix not in CHECKPOINTS:
        return None
    if not path.is_file():
        raise ExportError(f"there is no checkpoint file {path}")
    if path.suffix not in CHECKPOINTS:
        raise ExportError(f"{path} is no checkpoint: those are called {' or '.join(CHECKPOINTS)}")
    return path


def model_name(model: str) -> str:
    """The name of a model's bundle: that of its folder, or of its file without the suffix."""
    name = Path(model).name
    return next((name.removesuffix(suffix) for suffix in CHECKPOINTS if name.endswith(suffix)), name)


def resolve(model: str, *, allow_pickle: bool = False, config: Path | None = None) -> tuple[str, Path]:
    """What names a model from anywhere, and its diffusers folder: an embedded one, any folder, or one of the hub.

    For a single file it is the folder `config`, or what the hub has for its layout.
    """
    checkpoint = None if model in EMBEDDED else checkpoint_of(model)
    if config is not None and checkpoint is None:
        raise ParameterError("config", f"config belongs to a single file; {model} brings its own")
    if model in EMBEDDED:
        return model, EMBEDDED[model]
    folder = config or Path(os.path.abspath(model))  # noqa: PTH100 - as above
    if (folder / "model_index.json").is_file():
        if folder.name in EMBEDDED and folder != EMBEDDED[folder.name] and not checkpoint:
            raise ExportError(f"{folder}: {folder.name} is the name of an embedded model: give the folder another one")
        return str(checkpoint or folder), folder
    if folder.is_dir() or config is not None:
        raise ExportError(f"{folder} is not a diffusers model: it has no model_index.json")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if checkpoint is not None:
        from export.single_file import check, config_folder

        check(checkpoint, allow_pickle=allow_pickle)
        return str(checkpoint), config_folder(checkpoint)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        from export.loading import download

        return model, download(model, allow_pickle=allow_pickle)
    raise ExportError(
        f"unknown model {model!r}: use {', '.join(EMBEDDED)}, the folder of a diffusers model, a checkpoint file, or "
        "owner/name on the hub"
    )


def parse_loras(words: Sequence[str]) -> tuple[tuple[Path, float], ...]:
    """FILE or FILE:SCALE each."""
    found = []
    for word in words:
        file, _, scale = word.rpartition(":") if re.search(r":[-+.\w]*$", word) else (word, "", "1")
        path = Path(file)
        try:
            number = float(scale)
        except ValueError:
            raise ParameterError("lora", f"{word}: the scale behind the colon must be a number, as in 0.8") from None
        if not -10 <= number <= 10:
            raise ParameterError("lora", f"{word}: the scale must be between -10 and 10")
        if not path.is_file():
            raise ParameterError("lora", f"there is no LoRA file {path}")
        if path.suffix != ".safetensors":
            raise ParameterError("lora", f"{path}: LoRA files must be safetensors")
        found.append((path, number))
    return tuple(found)


def lora_name(words: Sequence[str]) -> str:
    """What a bundle's name has behind the model's: `+style:0.8`; the Makefile makes the same of the same words."""
    return "".join(f"+{Path(word).name.replace('.safetensors', '')}" for word in words)


def cache_name(cache: bool) -> str:
    """What a bundle's name has behind that, as `lora_name`."""
    return "+cache" if cache else ""


def parse_sides(text: str | None) -> tuple[int, int] | None:
    """SIDE or LEAST-MOST in pixels."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ParameterError("sizes", f"sizes must be SIDE or LEAST-MOST in pixels, such as 512-1024, not {text!r}")
    return int(match[1]), int(match[2] or match[1])
