"""Files that others made: whatever a library raises over one ends as one line that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from engines.errors import EngineError, ExportError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """ExportError, `what` and the first line of the error; the error itself stays its cause, which `--debug` shows.

    A damaged or foreign file can make torch, diffusers, transformers, peft and tokenizers raise anything, so nothing is
    listed here. What is not the file's fault goes through: our own errors and the end of memory.
    """
    try:
        yield
    except (EngineError, MemoryError):
        raise
    except Exception as error:
        torchs = type(error).__module__.startswith("torch.onnx")  # a page of advice, and the error as its cause
        cause = error.__cause__ if torchs and error.__cause__ else error
        raise ExportError(f"{what}: {first_line(cause)}") from error


def first_line(error: BaseException) -> str:
    """What went wrong, in one line; torch puts a title above it. Without words, the kind of the error stands there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    line = lines[1] if lines[0].startswith("Error(s) in loading") and len(lines) > 1 else lines[0]
    line = re.sub(r" (object )?at 0x[0-9a-f]+", "", line)
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError | IndexError | AttributeError) else line
