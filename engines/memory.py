"""How much memory this machine has left, asked before work that needs much of it, and memory that is given back."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from engines.errors import DeviceError

_FACTS = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


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


def give_back() -> None:
    """Returns freed memory to the system, which glibc would keep: half of what a model of 200 MB took."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
