"""Named ranges for Nsight Systems: rounds, lanes and combinations. They cost nothing where NVTX is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

try:
    import nvtx
except ImportError:
    nvtx = None


@cache
def _range(name: str) -> tuple[Any, Any]:
    domain = nvtx.get_domain("driffusion")
    return domain, domain.get_event_attributes(message=name)


@contextmanager
def _pushed(name: str) -> Iterator[None]:
    domain, attributes = _range(name)
    domain.push_range(attributes)
    try:
        yield
    finally:
        domain.pop_range()


def span(name: str) -> AbstractContextManager[None]:
    """A range of this thread, by name; names are few, because each is kept."""
    return nullcontext() if nvtx is None else _pushed(name)
