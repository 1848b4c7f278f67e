"""Where the library's two dependencies lie: NumPy's noise to link, ONNX Runtime to open."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from engines.errors import BundleError

SOURCE = Path(__file__).resolve().parent


def _file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(path for folder in folders for path in folder.glob(pattern))
    if not found:
        raise BundleError(f"{package} has no {pattern} here: install it with `pip install {package}`")
    return found[-1]


def onnxruntime_library() -> Path:
    """The shared library inside the wheel; its folder needs no link to it, because it is opened by its path."""
    return _file("onnxruntime", "capi/libonnxruntime.so.*")


def cmake_options() -> list[str]:
    """Definitions for CMake."""
    noise = _file("numpy", "random/lib/libnpyrandom.a")
    return [f"-DDRIFFUSION_NPYRANDOM={noise}", f"-DDRIFFUSION_ONNXRUNTIME={onnxruntime_library()}"]
