"""The library and its programs as the tests need them: plain, by another compiler, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock

from engines.store import BUILD
from runtime.embed.building import SOURCE, cmake_options

NATIVE = Path(__file__).parent / "native"
VARIANTS = {
    "plain": [],
    "clang": ["-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++"],
    "address": ["-DDRIFFUSION_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"],
    "thread": ["-DDRIFFUSION_SANITIZE=thread", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"],
}


def environment() -> dict[str, str]:
    """With the tools of this environment found first."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(*words: str | Path, **options: object) -> str:
    """What a command prints; its whole output in the error where it fails."""
    run = subprocess.run(
        [*map(str, words)], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    assert not run.returncode, f"{words} ended with {run.returncode}:\n{run.stdout[-8000:]}"
    return str(run.stdout)


@cache
def built(variant: str = "plain") -> Path:
    """The folder of a build; made once, and then only what changed."""
    folder = BUILD / "embed" / variant
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{variant}.lock"):
        options = [*cmake_options(), "-DDRIFFUSION_TOOLS=ON", f"-DDRIFFUSION_TESTS={NATIVE}", *VARIANTS[variant]]
        command("cmake", "-S", SOURCE, "-B", folder, "-G", "Ninja", *options)
        command("cmake", "--build", folder)
    return folder


def has_compiler(name: str) -> bool:
    """Whether a compiler is installed."""
    return shutil.which(name) is not None
