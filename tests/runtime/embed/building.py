"""The library and its programs as the tests need them: plain, or by another compiler under sanitizers."""

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
CLANG = ("-DCMAKE_C_COMPILER=clang", "-DCMAKE_CXX_COMPILER=clang++") if shutil.which("clang++") else ()
SANITIZED = ("-DCMAKE_BUILD_TYPE=None", *CLANG)  # a quarter of what optimizing with g++ takes
VARIANTS = {
    "plain": (),
    "address": ("-DDRIFFUSION_SANITIZE=address,undefined", *SANITIZED),
    "thread": ("-DDRIFFUSION_SANITIZE=thread", *SANITIZED),
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
def configured(variant: str) -> Path:
    """The folder of a build in which nothing needs to be built yet."""
    folder = BUILD / "embed" / variant
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{variant}.lock"):
        options = [*cmake_options(), "-DDRIFFUSION_TOOLS=ON", f"-DDRIFFUSION_TESTS={NATIVE}", *VARIANTS[variant]]
        command("cmake", "-S", SOURCE, "-B", folder, "-G", "Ninja", *options)
    return folder


@cache
def built(file: str = "libdriffusion.so", variant: str = "plain") -> Path:
    """A file of a build; what it is made of is built and no more, and again only what changed."""
    folder = configured(variant)
    with FileLock(folder.parent / f".{variant}.lock"):
        command("cmake", "--build", folder, "--target", file)
    return folder / file
