"""Everything at once under sanitizers: threads, cancelling, closing, and the reader on damaged files."""
# covers: tests/runtime/embed/native/stress.cc

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from engines.store import Bundle
from tests.runtime.embed.building import CLANG, NATIVE, built, command
from tests.runtime.embed.conftest import Write

PROMPT = "a small ring"


def stressed(variant: str, shapes: Bundle, program: Path, seconds: int) -> str:
    """What the stress program prints; it ends with an error at the first fault that a sanitizer finds."""
    environment = {**os.environ, "TSAN_OPTIONS": f"suppressions={NATIVE / 'thread.supp'}"}
    words = [built("tests/stress", variant), shapes.folder, program, seconds]
    run = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert not run.returncode, run.stdout[-2000:] + run.stderr[-6000:]
    return run.stdout


def test_stress(shapes: Bundle, write: Write) -> None:
    said = stressed("plain", shapes, write(scheduler="euler_a"), 1)
    made, cancelled = map(int, re.findall(r"(\d+)", said)[:2])
    assert made and cancelled


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["address", "thread"])
def test_stress_under_a_sanitizer(shapes: Bundle, write: Write, variant: str) -> None:
    stressed(variant, shapes, write(scheduler="euler_a"), 6)


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
