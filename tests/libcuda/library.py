"""Compiles the imaginary driver, once per content, into the build folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from engines.cuda.kernels import SOURCE
from engines.store import BUILD
from runtime.embed.building import SOURCE as EMBED

HERE = Path(__file__).parent
FOLDER = BUILD / "libcuda"
DRIVER_API = EMBED / "src" / "driver_api.h"
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
)


@cache
def driver_folder() -> Path:
    """Where `libcuda.so.1` is, for LD_LIBRARY_PATH. A second process waits for the first one that compiles it."""
    sources, headers = sorted(HERE.glob("*.cc")), sorted(HERE.glob("*.h"))
    content = (
        b"".join(path.read_bytes() for path in (*sources, *headers, DRIVER_API, SOURCE)) + " ".join(FLAGS).encode()
    )
    folder = FOLDER / hashlib.sha256(content).hexdigest()[:16]
    library = folder / "libcuda.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(sources, library)
    return folder


def _compile(sources: list[Path], library: Path) -> None:
    compiler = shutil.which("g++") or pytest.fail("tests of the CUDA path need a C++17 compiler: install g++")
    objects = [library.with_name(f"{source.stem}.o") for source in sources]

    def one(source: Path, target: Path) -> None:
        subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", str(target)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sources, objects))
    partial = library.with_suffix(".partial")
    command = [
        compiler,
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        *map(str, objects),
        "-o",
        str(partial),
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    os.replace(partial, library)
    for path in objects:
        path.unlink()
