"""The list of parts, as the command plays it on a machine without GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu.machine import ATTRIBUTES
from bench.gpu.parts import PARTS
from engines.cuda.driver import available
from tests import ROOT


def test_attributes_and_targets_exist() -> None:
    """Every attribute is one that the real bindings know, and every part can be loaded."""
    from cuda.bindings import driver

    for name in ATTRIBUTES:
        assert hasattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), name
    assert len({part.slug for part in PARTS}) == len(PARTS)
    for part in PARTS:
        assert callable(part.load()), part.target


def test_without_a_gpu_every_part_says_why(tmp_path: Path) -> None:
    if available() is None:
        pytest.skip("this machine has a GPU: make gpu-check")
    target = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu", "--folder", str(tmp_path / "parts"), "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(target.read_text())
    rows = result["rows"]
    assert {"schema_version", "commit", "host", "versions"} < set(result)
    assert (rows[0]["part"], rows[0]["status"]) == ("machine", "passed")
    assert [row["part"] for row in rows] == [part.name for part in PARTS]
    assert {row["status"] for row in rows[1:]} == {"not possible here"}
    assert {row["reason"] for row in rows[1:]} == {available()}
    assert "engine overhead" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--only", "everything"], "no part 'everything'"), (["--lanes", "0"], "one lane")],
)
def test_what_cannot_be_asked(arguments: list[str], message: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--folder", str(tmp_path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
