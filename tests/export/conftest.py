"""Folders of tiny models, and LoRA files for them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family by name, made once; not to be changed."""
    from tests.tiny import save

    root = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            save(name, root)
        return root / name

    return folder


@pytest.fixture
def copied(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A Stable Diffusion folder that may be changed."""
    return Path(shutil.copytree(tiny("sd1"), tmp_path / "copied"))
