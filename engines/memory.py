"""How much memory this machine has left, asked before work that needs much of it, and memory that is given back."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

from engines.errors import DeviceError

_FACTS = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
_THREADS = 64 << 20  # stacks, heaps and thread-local data of a runtime's threads


def free() -> int | None:
    """Bytes that can be had without swapping, also where a container limits them; None where nobody tells."""
    if not _FACTS.is_file():
        return None
    facts = dict(line.split(":", 1) for line in _FACTS.read_text().splitlines() if ":" in line)
    found = int(facts["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or one without a limit
        return found
    return min(found, limit - used + int(kept["inactive_file"]))


def require(needed: int, what: str, otherwise: str) -> None:
    """DeviceError when there is less than that, before the work begins rather than in the middle of it."""
    there = free()
    if there is not None and there < needed:
        raise DeviceError(
            f"{what} needs about {needed / 1e9:.1f} GB of memory and {there / 1e9:.1f} GB are free: "
            f"close other programs, or {otherwise}"
        )


def have_room(needed: int, what: str) -> None:
    """MemoryError when there is no address space (`ulimit -v`) for that many bytes and the threads that work on them.

    A thread that finds none for its own data is ended by the C library together with the process.
    """
    try:
        mmap.mmap(-1, needed + _THREADS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ).close()
    except OSError as error:
        raise MemoryError(f"{what} cannot be loaded") from error


def give_back() -> None:
    """Returns freed memory to the system, which glibc would keep: half of what a model of 200 MB took."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
