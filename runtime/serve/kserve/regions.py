"""System shared memory: regions that clients register, and the parts of them that a request uses.

Bytes are read and written through the file, not through a mapping: a client that truncates its memory while the
server uses it gets an error, where a mapping would end the process with SIGBUS.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engines.errors import ParameterError
from runtime.serve.kserve.refused import Refused
from runtime.serve.request import DrainingError

KEY = re.compile(r"/?[A-Za-z0-9_.-]{1,200}")
MOST_REGIONS = 256
MOST_BYTES = 1 << 62


@dataclass(frozen=True, eq=False)
class Region:
    """A registered part of a shared memory object. file: device and inode, the same for other names of it."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int
    file: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Part:
    """What one tensor uses; `start` counts from the beginning of the object."""

    region: Region
    start: int
    size: int

    def overlaps(self, other: Part) -> bool:
        """Whether they have a byte in common."""
        same = self.region.file == other.region.file
        return same and self.start < other.start + other.size and other.start < self.start + self.size

    def read(self) -> bytes:
        """The bytes; ParameterError where the client has shortened its memory."""
        data = os.pread(self.region.descriptor, self.size, self.start)
        if len(data) != self.size:
            raise ParameterError(self.region.name, f"the memory of region {self.region.name} was shortened")
        return data

    def write(self, name: str, data: memoryview) -> None:
        """Writes an output; ParameterError where it does not fit."""
        region = self.region
        if data.nbytes > self.size:
            message = f"the output {name} has {data.nbytes} bytes, its part of region {region.name} has {self.size}"
            raise ParameterError(name, message)
        if os.fstat(region.descriptor).st_size < self.start + data.nbytes:
            raise ParameterError(region.name, f"the memory of region {region.name} was shortened")
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(region.descriptor, data[done:], self.start + done)
        except OSError as error:  # as where the machine has no memory left
            raise ParameterError(region.name, f"region {region.name} cannot be written: {error.strerror}") from None


class Regions:
    """All regions of a server; none can be registered unless it allows them."""

    def __init__(self, *, allowed: bool = False) -> None:
        self.allowed = allowed
        self._lock = threading.Lock()
        self._known: dict[str, Region] = {}
        self._used: list[Part] = []  # by outputs of requests that wait or run
        self._closed = False

    def check(self) -> None:
        """Refused unless shared memory is allowed."""
        if not self.allowed:
            raise Refused("system shared memory is off: start the server with --shared-memory, or send tensors inline")

    def register(self, name: str, key: Any, offset: Any, byte_size: Any) -> None:
        """Opens a client's memory; ParameterError for what is not there or not as large as it says."""
        self.check()
        if self._closed:
            raise DrainingError("the server is shutting down")
        if not name or len(name) > 200:
            raise ParameterError("name", "a region needs a name of up to 200 characters")
        if not isinstance(key, str) or not KEY.fullmatch(key) or key.strip("/") in (".", ".."):
            raise ParameterError("key", f"the key of {name} must be /NAME, without further slashes")
        offset, byte_size = _whole(name, "offset", offset, 0), _whole(name, "byte_size", byte_size, 1)
        with self._lock:
            if name in self._known:
                raise ParameterError("name", f"region {name} is registered already: unregister it first")
            if len(self._known) >= MOST_REGIONS:
                raise ParameterError("name", f"there are {MOST_REGIONS} regions already: unregister some")
            descriptor = _open(name, key)
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                os.close(descriptor)
                raise ParameterError("key", f"{key} of region {name} is no shared memory")
            if facts.st_size < offset + byte_size:
                os.close(descriptor)
                message = f"region {name} ends at byte {offset + byte_size}, the memory {key} at {facts.st_size}"
                raise ParameterError("byte_size", message)
            file = (facts.st_dev, facts.st_ino)
            self._known[name] = Region(name, key, offset, byte_size, descriptor, file)

    def unregister(self, name: str = "") -> None:
        """Closes a region, or all; ParameterError for one that is unknown or that a request uses."""
        self.check()
        with self._lock:
            chosen = [self._region(name)] if name else list(self._known.values())
            for region in chosen:
                if any(part.region is region for part in self._used):
                    raise ParameterError(
                        "name", f"region {region.name} is in use: wait for its requests, or cancel them"
                    )
            for region in chosen:
                os.close(self._known.pop(region.name).descriptor)

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """One region or all, as the protocol has them."""
        self.check()
        with self._lock:
            chosen = [self._region(name)] if name else list(self._known.values())
        fields = ("name", "key", "offset", "byte_size")
        return [{field: getattr(one, field) for field in fields} for one in chosen]

    def part(self, name: str, parameters: Mapping[str, Any]) -> Part | None:
        """The part that the parameters of a tensor name, or None where they name none."""
        region = parameters.get("shared_memory_region")
        if region is None:
            return None
        self.check()
        size = _whole(name, "shared_memory_byte_size", parameters.get("shared_memory_byte_size"), 1)
        offset = _whole(name, "shared_memory_offset", parameters.get("shared_memory_offset", 0), 0)
        with self._lock:
            known = self._region(region)
        if offset + size > known.byte_size:
            message = f"{name} ends at byte {offset + size} of region {region}, which has {known.byte_size}"
            raise ParameterError(name, message)
        return Part(known, known.offset + offset, size)

    def read(self, name: str, parameters: Mapping[str, Any]) -> bytes | None:
        """The bytes of an input in a region, or None where it is in none. It is read at once, so nothing is held."""
        part = self.part(name, parameters)
        if part is None:
            return None
        with self._lock:  # no unregister, and no other file under its descriptor, meanwhile
            if self._known.get(part.region.name) is not part.region:
                raise ParameterError(name, f"region {part.region.name} was unregistered")
            return part.read()

    def hold(self, parts: Iterable[Part]) -> list[Part]:
        """Keeps the parts of a request's outputs until `release`; ParameterError where another output has them."""
        held = list(parts)
        with self._lock:
            for index, part in enumerate(held):
                if self._known.get(part.region.name) is not part.region:
                    raise ParameterError("outputs", f"region {part.region.name} was unregistered")
                if any(part.overlaps(other) for other in (*held[:index], *self._used)):
                    raise ParameterError("outputs", f"two outputs overlap in region {part.region.name}")
            self._used += held
        return held

    def release(self, held: list[Part]) -> None:
        """See `hold`."""
        with self._lock:
            self._used = [one for one in self._used if all(one is not other for other in held)]
            if self._closed:
                self._close_unused()

    def close(self) -> None:
        """Closes all regions; those in use, when their requests have ended: another file may get their descriptor."""
        with self._lock:
            self._closed = True
            self._close_unused()

    def _close_unused(self) -> None:
        for region in list(self._known.values()):
            if all(part.region is not region for part in self._used):
                os.close(self._known.pop(region.name).descriptor)

    def _region(self, name: Any) -> Region:
        if not isinstance(name, str) or name not in self._known:
            raise ParameterError("name", f"there is no region {name!r}: register it first")
        return self._known[name]


def _whole(name: str, what: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < MOST_BYTES:
        raise ParameterError(what, f"{what} of {name} must be a whole number of bytes from {low} on, not {value!r}")
    return value


def _open(name: str, key: str) -> int:
    import _posixshmem  # `multiprocessing.shared_memory` would unlink the client's memory when the server ends

    try:
        descriptor: int = _posixshmem.shm_open("/" + key.lstrip("/"), os.O_RDWR, mode=0o600)
    except OSError as error:
        raise ParameterError("key", f"the memory {key} of region {name} cannot be opened: {error.strerror}") from None
    return descriptor
