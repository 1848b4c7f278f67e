"""The manifest of an exported model: everything the runtime knows about it, and nothing that it must import.

`build/<model>/manifest.json` is written by `export` and read by `engines` and `runtime`. Unknown fields are refused,
so that a manifest of another version never half works.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from engines.errors import BundleError

MANIFEST = "manifest.json"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class TensorSpec(_Strict):
    """One input or output; a shape entry is a number, or the name of a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Parity(_Strict):
    """ONNX Runtime against torch on fresh random inputs: largest absolute error over the largest output."""

    max_abs_error: float
    scale: float
    bound: float
    batches: tuple[int, ...]

    @property
    def relative_error(self) -> float:
        """max_abs_error / scale."""
        return self.max_abs_error / self.scale


class Network(_Strict):
    """One ONNX file and what goes in and out of it."""

    file: str
    sha256: str
    bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity


class Tokenizer(_Strict):
    """A `tokenizers` JSON file and how prompts become fixed-length ids."""

    file: str
    sha256: str
    max_length: int
    pad_token_id: int
    eos_token_id: int


class Manifest(_Strict):
    """An exported model. `origin` is what `make engines MODEL=` made it of; `source` identifies its content.

    `alphas_cumprod` is the training schedule's ᾱ per timestep; sizes are in pixels.
    """

    schema_version: Literal[1]
    model: str
    family: str
    origin: str
    source: str
    versions: dict[str, str]
    precision: Literal["fp32", "fp16", "bf16"]
    networks: dict[str, Network]
    tokenizer: Tokenizer
    scheduler: dict[str, Any]
    alphas_cumprod: tuple[float, ...]
    latent_channels: int
    vae_scale_factor: int
    vae_scaling_factor: float
    vae_shift_factor: float
    width: int
    height: int
    examples: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`; the last file of an export, so that a folder with one is complete."""
        (folder / MANIFEST).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks the manifest of a bundle; BundleError when there is none or it is not understood."""
        path = folder / MANIFEST
        repair = f"make it again with `make engines MODEL={folder.name}`"
        if not path.is_file():
            raise BundleError(f"there is no exported model in {folder}: {repair}")
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise BundleError(f"{path} cannot be read ({where}: {first['msg']}): {repair}") from error


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(root: Path, paths: Iterable[Path]) -> str:
    """One sha256 over the names and contents of several files, in sorted order."""
    lines = sorted(f"{path.relative_to(root).as_posix()} {sha256_file(path)}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_file(path: Path, sha256: str, repair: str) -> bytes:
    """The content of a file whose hash is known, read once; BundleError when it is missing or not the same."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{path} is missing: {repair}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BundleError(f"{path} was altered or truncated ({len(content)} bytes, sha256 differs): {repair}")
    return content
