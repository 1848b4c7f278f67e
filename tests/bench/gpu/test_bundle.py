"""What is carried to a machine without network is whole, comes in small parts, and is installed there."""

from __future__ import annotations

import ensurepip
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.gpu import bundle
from engines.errors import BundleError
from tests import ROOT

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
SIZE = 100_000


def tiny_wheel(folder: Path) -> None:
    """A package that no machine has."""
    info = "carried_here-1.0.dist-info"
    with zipfile.ZipFile(folder / "carried_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_here.py", "WORD = 'there'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-here\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a bundle of pip, one tiny package and one exported model; this Python has all the rest."""
    (wheel,) = (Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")

    def fetch(python: str, target: Path, *, rtx: bool, onnxruntime_gpu: bool) -> None:
        shutil.copy(wheel, target)
        tiny_wheel(target)

    models = tmp_path / "models"
    (models / "tiny").mkdir(parents=True)
    (models / "tiny" / "manifest.json").write_text("{}")
    pins = bundle.requirements()
    monkeypatch.setattr(bundle, "requirements", lambda: pins | {"core": [*pins["core"], "carried-here==1.0"]})
    monkeypatch.setattr(bundle, "fetch", fetch)
    monkeypatch.setattr(bundle, "BUILD", models)
    root = tmp_path / "checkout"
    for name in ("bench", "engines", "kernels", "runtime"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    assert bundle.make(PYTHON, root / "build" / "gpu-bundle", size=SIZE, models=("tiny",)) > 10
    return root


def install(checkout: Path, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(checkout / "build" / "gpu-bundle" / "install.sh")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "HOME": str(checkout)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_parts_are_small_and_their_files_are_joined(checkout: Path) -> None:
    parts = list((checkout / "build" / "gpu-bundle").glob("part-*"))
    assert all(sum(path.stat().st_size for path in part.iterdir()) <= SIZE for part in parts)
    done = install(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out" not in done.stdout
    assert (checkout / "build" / "tiny" / "manifest.json").read_text() == "{}"
    code = "import carried_here, numpy, pydantic; print(carried_here.WORD, carried_here.__file__, numpy.__file__)"
    own = checkout / ".venv" / "bin" / "python"
    word, carried, numpy = subprocess.run([own, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert word == "there"
    assert carried.startswith(str(checkout)), "what was missing is not in the environment"
    assert not numpy.startswith(str(checkout)), "what was there was installed again"
    assert install(checkout).returncode == 0, "a second run fails"


def test_a_part_that_is_missing_or_damaged_is_named(checkout: Path) -> None:
    folder = checkout / "build" / "gpu-bundle"
    (piece,) = folder.glob("part-*/pip-*.piece-03")
    piece.write_bytes(piece.read_bytes()[::-1])
    (model,) = folder.glob("part-*/tiny.tar.gz")
    model.unlink()
    done = install(checkout)
    assert done.returncode == 1
    assert re.search(r"left out: pip-\S+ \(incomplete\) tiny\.tar\.gz|left out: tiny\.tar\.gz pip-\S+", done.stdout)
    assert "error: pip's wheel is not in any part" in done.stderr


def test_another_python_is_refused(checkout: Path) -> None:
    (checkout / "build" / "gpu-bundle" / "part-1" / "python").write_text("3.99\n")
    done = install(checkout)
    assert done.returncode == 1
    assert f"is Python {PYTHON} and these wheels are for 3.99" in done.stderr
    assert f"PYTHON_THERE={PYTHON}" in done.stderr


def test_what_is_carried_are_this_projects_pins() -> None:
    pins = bundle.requirements()
    assert any(pin.startswith("pydantic==") for pin in pins["core"])
    assert not any(pin.startswith("cuda-python") for pin in pins["core"])
    assert "cuda-bindings>=13" in bundle.names(pins["core"])
    text = (ROOT / "pyproject.toml").read_text()
    for pin in (*pins["core"], *pins["rtx"]):
        assert pin.partition("==")[2] in text, pin


def test_a_model_that_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "BUILD", tmp_path)
    with pytest.raises(BundleError, match="make gpu-bundle"):
        bundle.pack_models(["shapes"], tmp_path)
