"""Parts that end in every way that a part may end, for the tests of their supervisor."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.parts import NotPossibleError, Row, Settings


def good(settings: Settings) -> Iterator[Row]:
    yield {"lanes": list(settings.lanes), "process": os.getpid()}


def impossible(settings: Settings) -> Iterator[Row]:
    yield {"seen": 1}
    raise NotPossibleError("this machine has one GPU")


def missing(settings: Settings) -> Iterator[Row]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    yield {}


def raises(settings: Settings) -> Iterator[Row]:
    yield {"seen": 1, "error": float("nan"), "rates": [1.0, float("inf")]}
    raise ValueError("wrong by 3 times")


def crashes(settings: Settings) -> Iterator[Row]:
    yield {"seen": 1}
    yield {"seen": 2}
    ctypes.string_at(0)


def crashes_at_its_end(settings: Settings) -> Iterator[Row]:
    import atexit

    atexit.register(lambda: os.kill(os.getpid(), signal.SIGSEGV))
    yield {"seen": 1}


def leaves(settings: Settings) -> Iterator[Row]:
    yield {"seen": 1}
    print("the library says why")
    sys.stdout.flush()
    os._exit(3)


def hangs(settings: Settings) -> Iterator[Row]:
    yield {"seen": 1}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(100)


def hangs_with_a_child(settings: Settings) -> Iterator[Row]:
    child = subprocess.Popen(["sleep", "100"])
    yield {"child": child.pid}
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    time.sleep(100)


def hangs_once(settings: Settings) -> Iterator[Row]:
    """Hangs in its first run; `settings.cache` is where it remembers."""
    mark = Path(settings.cache) / "hung"
    yield {"first": not mark.exists()}
    if not mark.exists():
        mark.touch()
        time.sleep(100)


def counted(settings: Settings) -> Iterator[Row]:
    """How many times it has run."""
    file = Path(settings.cache) / "runs"
    runs = int(file.read_text()) + 1 if file.exists() else 1
    file.write_text(str(runs))
    yield {"runs": runs}
