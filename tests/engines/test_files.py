"""Files appear whole or not at all, also on a full disk."""

from __future__ import annotations

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from engines.errors import EngineError
from engines.files import written_whole


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    path.chmod(0o640)
    with written_whole(path) as partial:
        assert partial.suffix == ".json" and path.read_text() == "old"
        partial.write_text("new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    with written_whole(tmp_path / "whole") as partial:
        partial.write_text("new")
    (tmp_path / "plain").write_text("new")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "a.png") as partial:
        partial.write_text("begun")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(EngineError, match=r"a\.bin cannot be written: File too large"), written_whole(path) as file:
            file.write_bytes(bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "a.png"
    with pytest.raises(EngineError, match=r"nowhere/a\.png cannot be written: No such file"), written_whole(path):
        pass


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with written_whole(tmp_path / "link") as partial:
        partial.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    with written_whole(path) as partial:
        partial.write_text("through")
    reader.join(10)
    assert got == ["through"]
