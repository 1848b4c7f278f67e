"""Copies of the embedded model's bundle that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from engines import ort
from engines.manifest import sha256_file
from engines.store import Bundle, plan_key

NETWORK = "text_encoder"
NETWORKS = (NETWORK, "vae_decoder")


def small_copy(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle with its two small networks and their plans; the large one would only cost time."""
    networks = {name: bundle.manifest.networks[name] for name in NETWORKS}
    copy = Bundle(folder, bundle.manifest.model_copy(update={"networks": networks}))
    folder.mkdir(parents=True)
    copy.manifest.write(folder)
    files = [one.file.name for one in copy.manifest.tokenizers] + [one.file.name for one in networks.values()]
    for file in files:
        shutil.copy(bundle.folder / file, folder / file)
    for name in NETWORKS:
        key = plan_key(ort.plan_fields(bundle, name))
        shutil.copytree(bundle.plan_folder(key), copy.plan_folder(key))
    return copy


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder, by relative path; locks are left out."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in files}


def flip_last_byte(path: Path) -> None:
    """Alters a file and keeps its length."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_in_half(path: Path) -> None:
    """Truncates a file as a broken download would."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    """Truncates a file as a power cut would."""
    path.write_bytes(b"")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": empty,
    "truncated": cut_in_half,
    "altered": flip_last_byte,
}
