"""Networks of equal content are exported once in a session, by whichever worker comes to them first.

Families share encoders and VAEs, and an export of a tiny network takes the exporter seconds. What tests the export
itself (its determinism, its interruption) does without.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from engines.manifest import Network
from export import to_onnx
from export.families import Sides
from export.networks import Exported

PLACES = ("_name_or_path", "name_or_path", "_commit_hash")  # where a component was loaded from


class Once:
    """`export_network`, which takes what is in a folder of earlier exports from there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.real = folder, to_onnx.export_network

    def __call__(
        self, name: str, make: Callable[[], Exported], folder: Path, sides: Sides, factor: int, *rest: Any
    ) -> Network:
        """Equal names, inputs, sizes, code and weights are one export."""
        made = make()
        axes = [(one.name, one.axes) for one in made.inputs], list(made.outputs.items())
        shared = self.folder / content(name, axes, vars(sides), factor, made.module)
        shared.mkdir(parents=True, exist_ok=True)
        with FileLock(shared / "lock"):
            done = shared / "network.json"
            if not done.is_file():
                done.write_text(self.real(name, lambda: made, shared, sides, factor, *rest).model_dump_json())
            network = Network.model_validate_json(done.read_text())
            for file in network.files:
                shutil.copyfile(shared / file.name, folder / file.name)
        return network


def content(*values: Any) -> str:
    """A digest of values with all that they hold: what cannot be looked into counts by its `repr`."""
    digest, seen = hashlib.sha256(), dict[int, tuple[int, Any]]()  # values are kept: ids are used again

    def several(kind: str, parts: Iterable[Any]) -> None:
        digest.update(f"{kind}(".encode())
        for part in parts:
            add(part)
        digest.update(b")")

    def add(value: Any) -> None:
        if isinstance(value, (str, int, float, bool, bytes, type, type(None), torch.dtype, torch.device)):
            digest.update(f"{value!r};".encode())
        elif id(value) in seen:
            digest.update(f"seen {seen[id(value)][0]};".encode())
        else:
            seen[id(value)] = len(seen), value
            look_into(value)

    def look_into(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            several(f"{value.dtype} {tuple(value.shape)}", [value.detach().flatten().view(torch.uint8).numpy()])
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            several("map", [part for item in value.items() if item[0] not in PLACES for part in item])
        elif isinstance(value, (list, tuple)):
            several("list", value)
        elif isinstance(value, (set, frozenset)):
            several("set", sorted(map(repr, value)))
        elif isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            code = [value.__code__.co_code, value.__code__.co_consts, value.__code__.co_names, value.__defaults__]
            several(f"{value.__module__}.{value.__qualname__}", [*code, cells])
        elif isinstance(value, MethodType):
            several("method", [value.__func__, value.__self__])
        elif isinstance(value, partial):
            several("partial", [value.func, value.args, value.keywords])
        elif hasattr(value, "__dict__"):
            several("object", [type(value), vars(value)])
        else:
            digest.update(f"{value!r};".encode())

    several("all", values)
    return digest.hexdigest()
