"""Folders of tiny models, and LoRA files for them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
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


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """While a file's tests run, networks that any of the session's workers has exported are taken from it."""
    from tests.export.once import Once

    mine = tmp_path_factory.getbasetemp()
    together = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.to_onnx.export_network", Once(together / "networks"))
        yield


@pytest.fixture
def least(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """The Stable Diffusion folder that is exported soonest; it may be changed."""
    return Path(shutil.copytree(tiny("least"), tmp_path / "least"))
