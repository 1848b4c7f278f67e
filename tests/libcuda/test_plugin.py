"""Tests on imaginary GPUs among others in one session."""

# covers: tests/libcuda/plugin.py
from __future__ import annotations

import subprocess
import sys

from tests import ROOT


def test_what_is_set_up_for_a_folder_ends_with_it() -> None:
    """A test that runs in a child session leaves nothing of its folder open for the test after it, elsewhere."""
    names = ["libcuda/test_plugin.py", "libcuda/test_library.py", "test_architecture.py"]  # here, in a child, here
    chosen = "test_stays_here or test_status_codes or test_no_circle_between_modules"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, *(f"tests/{name}" for name in names)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_stays_here() -> None:
    """Sets up this folder for the test above."""
