"""The tree is what it says: imports point one way, and what a server runs needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

OWN = ("bench", "engines", "export", "runtime", "tests")
ALLOWED = {
    "engines": {"engines"},
    "export": {"engines.errors", "engines.devices", "engines.manifest", "engines.memory", "engines.store", "export"},
    "runtime": {"engines", "runtime"},
    # the embedded model's images are a specification that benchmarks ask for, not a part of exporting
    "bench": {"bench", "engines", "runtime", "export.shapes.data"},
}
HEAVY = ("torch", "diffusers", "transformers", "onnx", "matplotlib")


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def inside(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in allowed)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    for path in sources(package):
        own = {module for module in imports(path) if module.split(".")[0] in OWN}
        wrong = {module for module in own if not inside(module, ALLOWED[package])}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("package", ["engines", "runtime"])
def test_no_heavy_package_is_imported_by_what_a_server_runs(package: str) -> None:
    for path in sources(package):
        heavy = {module for module in imports(path) if module.split(".")[0] in HEAVY}
        assert not heavy, f"{path.relative_to(ROOT)} imports {heavy}"


def test_the_server_starts_without_torch() -> None:
    code = f"import sys, runtime.serve; print([m for m in {HEAVY!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_kernels_is_no_package() -> None:
    """A distribution called `kernels` exists; an `__init__.py` here would hide it from diffusers."""
    assert (ROOT / "kernels" / "README.md").is_file()
    assert not list((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("name", ["Makefile", "README.md", "CHANGELOG.md", "pyproject.toml", ".ci/run"])
def test_the_top_level_is_there(name: str) -> None:
    assert (ROOT / name).is_file()
