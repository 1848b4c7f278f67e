"""Files that people ask for appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.errors import EngineError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place when the block ends and vanishes when it raises.

    It has the same suffix, by which writers choose a format. What exists and is no regular file, such as a pipe, is
    written to directly. EngineError names `path` when the disk is full or the folder does not let it be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    partial: Path | None = None
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.resolve().parent)
        os.close(number)
        partial = Path(name)
        yield partial
        partial.chmod(path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        os.replace(partial, path.resolve())  # through a link, as opening it would
    except OSError as error:
        raise EngineError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _umask() -> int:
    """The process's own, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
