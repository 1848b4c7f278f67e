"""Bundles with other files than the embedded model's, and programs that name them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.devices import parse_devices
from engines.manifest import MANIFEST
from engines.store import Bundle
from runtime.call import Call
from runtime.embed.program import program_of, write_program


def altered_tokenizer(
    shapes: Bundle, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]] | dict[str, Any]
) -> tuple[Path, Path]:
    """A bundle with another tokenizer, and a program of one step for it. A dictionary replaces parts of the file."""
    folder.mkdir()
    for path in shapes.folder.glob("*.onnx"):
        (folder / path.name).symlink_to(path)
    shutil.copytree(shapes.folder / "plans", folder / "plans", symlinks=True)
    own = json.loads((shapes.folder / "tokenizer.json").read_text())
    file = own | change if isinstance(change, dict) else change(own)
    content = json.dumps(file).encode()
    (folder / "tokenizer.json").write_bytes(content)
    manifest = json.loads((shapes.folder / MANIFEST).read_text())
    manifest["tokenizers"][0]["file"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    program = program_of(
        Bundle.open(str(folder)), parse_devices("cpu@1"), Call("", mode="sequential", num_inference_steps=1)
    )
    write_program(program, folder / "one.program")
    return folder, folder / "one.program"
