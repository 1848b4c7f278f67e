"""What a stored row of the quality benchmark depends on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from bench import quality
from tests import ROOT


def test_rows_are_drawn_again_when_any_code_of_the_engine_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers and backends lie in folders below `runtime` and `engines`; their files count, too."""
    hashed: list[Path] = []

    def note(root: Path, files: Iterable[Path]) -> str:
        hashed.extend(files)
        return ""

    monkeypatch.setattr(quality, "sha256_files", note)
    quality.code_hash.__wrapped__()
    names = {path.relative_to(ROOT).as_posix() for path in hashed}
    assert {"runtime/sampling/drafts.py", "engines/cuda/kernels.py", "runtime/pipeline.py", "engines/base.py"} <= names
