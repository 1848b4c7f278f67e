"""Everything at once under sanitizers: threads, cancelling, closing, GPUs that fail, are lost or hang."""
# covers: tests/runtime/embed/native/stress.cc, tests/runtime/embed/native/stress_gpu.cc

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engines.cuda import kernels
from engines.store import Bundle
from tests import host_kernel
from tests.libcuda.library import FOLDER, driver_folder
from tests.runtime.embed.building import CLANG, NATIVE, built, command
from tests.runtime.embed.conftest import Write

PROMPT = "a small ring"
ARCH = "90"  # of imaginary GPUs


def stressed(variant: str, shapes: Bundle, program: Path, seconds: int) -> str:
    """What the stress program prints; it ends with an error at the first fault that a sanitizer finds."""
    return finished(built("tests/stress", variant), shapes.folder, program, seconds)


def finished(*words: object, **environment: str) -> str:
    """What a program under a sanitizer prints."""
    own = {**os.environ, "TSAN_OPTIONS": f"suppressions={NATIVE / 'thread.supp'}", **environment}
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=own)
    assert not run.returncode, f"it ended with {run.returncode}\n" + run.stdout[-2000:] + run.stderr[-6000:]
    return run.stdout


def stressed_gpus(variant: str, shapes: Bundle, program: Path, seconds: float, seed: int, *hang: str) -> str:
    """The same on imaginary GPUs, whose driver is built with the sanitizer, too."""
    for outputs in range(1, 9):  # no NVRTC in a process with the imaginary driver: the code comes from the cache
        for width in (1, 2, 4):
            kernels.machine_code(kernels.Variant("float32", outputs, width), ARCH, FOLDER / kernels.CACHE.name)
    driver = driver_folder() if variant == "plain" else built("tests/driver/libcuda.so.1", variant).parent
    words = (shapes.folder, program, host_kernel.compiled("float32"), seconds, seed, *hang)
    leaks = {"ASAN_OPTIONS": "detect_leaks=0"} if hang else {}  # what a hanging GPU may still use is never freed
    own = {"LD_LIBRARY_PATH": str(driver), "XDG_CACHE_HOME": str(FOLDER), **leaks}
    return finished(built("tests/stress_gpu", variant), *words, **own)


def test_stress(shapes: Bundle, write: Write) -> None:
    said = stressed("plain", shapes, write(scheduler="euler_a"), 1)
    made, cancelled = map(int, re.findall(r"(\d+)", said)[:2])
    assert made and cancelled


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_stress_under_a_sanitizer(shapes: Bundle, write: Write, variant: str) -> None:
    stressed(variant, shapes, write(scheduler="euler_a"), 6)


def test_stress_on_imaginary_gpus(shapes: Bundle, write: Write) -> None:
    said = stressed_gpus("plain", shapes, write(scheduler="euler_a"), 3, 1)
    assert "OK " in said and "DEVICE " in said, said


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("hang", [(), ("hang",)], ids=["faults", "hang"])
def test_stress_on_imaginary_gpus_under_a_sanitizer(
    shapes: Bundle, write: Write, rng: np.random.Generator, variant: str, hang: tuple[str, ...]
) -> None:
    seed = int(rng.integers(1000))
    stressed_gpus(variant, shapes, write(scheduler="euler_a"), 6, seed, *hang)


@pytest.mark.slow
@pytest.mark.skipif(not CLANG, reason="clang is not installed")
def test_clang_builds_it_too(shapes: Bundle, write: Write, tmp_path: Path) -> None:
    """The same image, to the bit."""
    program = write()
    made = []
    for variant in ("plain", "address"):
        out = tmp_path / f"{variant}.png"
        command(built("example/draw", variant), shapes.folder, program, PROMPT, out)
        made.append(out.read_bytes())
    assert made[0] == made[1]
