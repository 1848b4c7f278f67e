"""Shared memory by names: regions that clients register, and the parts of them that a request uses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engines.errors import ParameterError
from runtime.serve.kserve.memory import Memory, SystemMemory
from runtime.serve.kserve.refused import Refused
from runtime.serve.request import DrainingError

SYSTEM, CUDA = "system", "cuda"
FLAGS = {SYSTEM: "--shared-memory", CUDA: "--cuda-shared-memory"}
MOST_REGIONS = 256
MOST_BYTES = 1 << 62


@dataclass(frozen=True, eq=False)
class Region:
    """A registered part of a client's memory. facts: what its status says beside the name."""

    name: str
    kind: str
    offset: int
    byte_size: int
    memory: Memory
    facts: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Part:
    """What one tensor uses; `start` counts from the beginning of the memory."""

    region: Region
    start: int
    size: int

    def overlaps(self, other: Part) -> bool:
        """Whether they have a byte in common."""
        same = self.region.memory.identity == other.region.memory.identity
        return same and self.start < other.start + other.size and other.start < self.start + self.size

    def read(self) -> bytes:
        """The bytes; ParameterError where the client has taken them away."""
        return self.region.memory.read(self.start, self.size)

    def write(self, name: str, data: memoryview) -> None:
        """Writes an output; ParameterError where it does not fit."""
        if data.nbytes > self.size:
            region = self.region.name
            message = f"the output {name} has {data.nbytes} bytes, its part of region {region} has {self.size}"
            raise ParameterError(name, message)
        self.region.memory.write(self.start, data)


class Regions:
    """All regions of a server, of the kinds of memory that it allows. One name is one region, whatever its kind."""

    def __init__(self, allowed: Collection[str] = ()) -> None:
        self.allowed = frozenset(allowed)
        self._lock = threading.Lock()
        self._known: dict[str, Region] = {}
        self._written: list[Part] = []  # by outputs of requests that wait or run
        self._read: list[Part] = []  # just now
        self._closed = False

    @property
    def quick(self) -> bool:
        """Whether an input is read without waiting for a GPU."""
        return all(region.kind != CUDA for region in list(self._known.values()))

    def check(self, kind: str) -> None:
        """Refused unless this kind of memory is allowed."""
        if kind not in self.allowed:
            name = {SYSTEM: "system", CUDA: "CUDA"}[kind]
            raise Refused(f"{name} shared memory is off: start the server with {FLAGS[kind]}, or send tensors inline")

    def register_system(self, name: str, key: Any, offset: Any, byte_size: Any) -> None:
        """Memory of `shm_open`; ParameterError for what is not there or not as large as it says."""

        def opened() -> Memory:
            if not isinstance(key, str):
                raise ParameterError("key", "a key must be /NAME, without further slashes")
            return SystemMemory(key)

        self._register(name, SYSTEM, opened, offset, byte_size, {"key": key, "offset": offset})

    def register_cuda(self, name: str, handle: bytes, device: Any, byte_size: Any) -> None:
        """Memory of a GPU by the handle of `cudaIpcGetMemHandle`. It may take a while: call it on a thread."""

        def opened() -> Memory:
            from engines.cuda.foreign import ForeignMemory

            return ForeignMemory(handle, _whole(name, "device_id", device, 0, "number"))

        self._register(name, CUDA, opened, 0, byte_size, {"device_id": device})

    def _register(
        self, name: str, kind: str, opened: Callable[[], Memory], offset: Any, byte_size: Any, facts: dict[str, Any]
    ) -> None:
        self.check(kind)
        if not name or len(name) > 200:
            raise ParameterError("name", "a region needs a name of up to 200 characters")
        offset, byte_size = _whole(name, "offset", offset, 0), _whole(name, "byte_size", byte_size, 1)
        with self._lock:
            self._check_new(name)
        try:
            memory = opened()
        except ParameterError as error:
            raise ParameterError(error.param, f"region {name}: {error}") from None
        region = Region(name, kind, offset, byte_size, memory, facts | {"byte_size": byte_size})
        try:
            if memory.size < offset + byte_size:
                message = f"region {name} ends at byte {offset + byte_size}, its memory at {memory.size}"
                raise ParameterError("byte_size", message)
            with self._lock:
                self._check_new(name)
                self._known[name] = region
        except BaseException:
            memory.close()
            raise

    def _check_new(self, name: str) -> None:
        if self._closed:
            raise DrainingError("the server is shutting down")
        if name in self._known:
            raise ParameterError("name", f"region {name} is registered already: unregister it first")
        if len(self._known) >= MOST_REGIONS:
            raise ParameterError("name", f"there are {MOST_REGIONS} regions already: unregister some")

    def unregister(self, kind: str, name: str = "") -> None:
        """Closes a region of that kind, or all of them; ParameterError for one that is unknown or in use."""
        self.check(kind)
        with self._lock:
            chosen = self._chosen(kind, name)
            for region in chosen:
                if self._in_use(region):
                    raise ParameterError(
                        "name", f"region {region.name} is in use: wait for its requests, or cancel them"
                    )
            for region in chosen:
                del self._known[region.name]
        for region in chosen:
            region.memory.close()

    def status(self, kind: str, name: str = "") -> list[dict[str, Any]]:
        """One region of that kind or all, as the protocol has them."""
        self.check(kind)
        with self._lock:
            return [{"name": region.name, **region.facts} for region in self._chosen(kind, name)]

    def part(self, name: str, parameters: Mapping[str, Any]) -> Part | None:
        """The part that the parameters of a tensor name, or None where they name none."""
        region = parameters.get("shared_memory_region")
        if region is None:
            return None
        if not self.allowed:
            raise Refused(
                f"shared memory is off: start the server with {' or '.join(FLAGS.values())}, or send tensors inline"
            )
        size = _whole(name, "shared_memory_byte_size", parameters.get("shared_memory_byte_size"), 1)
        offset = _whole(name, "shared_memory_offset", parameters.get("shared_memory_offset", 0), 0)
        with self._lock:
            known = self._region(region)
        if offset + size > known.byte_size:
            message = f"{name} ends at byte {offset + size} of region {region}, which has {known.byte_size}"
            raise ParameterError(name, message)
        return Part(known, known.offset + offset, size)

    def read(self, name: str, parameters: Mapping[str, Any]) -> bytes | None:
        """The bytes of an input in a region, or None where it is in none. It is read at once, so nothing stays held."""
        part = self.part(name, parameters)
        if part is None:
            return None
        with self._reading(name, part):
            return part.read()

    @contextmanager
    def _reading(self, name: str, part: Part) -> Iterator[None]:
        """Nobody unregisters it meanwhile, and nothing else gets its file's number or its address."""
        with self._lock:
            self._check_known(name, part)
            self._read.append(part)
        try:
            yield
        finally:
            with self._lock:
                self._read.remove(part)
            self._close_unused()

    def hold(self, parts: Iterable[Part]) -> list[Part]:
        """Keeps the parts of a request's outputs until `release`; ParameterError where another output has them."""
        held = list(parts)
        with self._lock:
            for index, part in enumerate(held):
                self._check_known("outputs", part)
                if any(part.overlaps(other) for other in (*held[:index], *self._written)):
                    raise ParameterError("outputs", f"two outputs overlap in region {part.region.name}")
            self._written += held
        return held

    def release(self, held: list[Part]) -> None:
        """See `hold`."""
        with self._lock:
            self._written = [one for one in self._written if all(one is not other for other in held)]
        self._close_unused()

    def close(self) -> None:
        """Closes all regions; those in use, when their requests have ended."""
        with self._lock:
            self._closed = True
        self._close_unused()

    def _close_unused(self) -> None:
        """Of a server that ends."""
        with self._lock:
            unused = [one for one in self._known.values() if not self._in_use(one)] if self._closed else []
            for region in unused:
                del self._known[region.name]
        for region in unused:
            region.memory.close()

    def _in_use(self, region: Region) -> bool:
        return any(part.region is region for part in (*self._written, *self._read))

    def _check_known(self, name: str, part: Part) -> None:
        if self._known.get(part.region.name) is not part.region:
            raise ParameterError(name, f"region {part.region.name} was unregistered")

    def _chosen(self, kind: str, name: str) -> list[Region]:
        if not name:
            return [region for region in self._known.values() if region.kind == kind]
        region = self._region(name)
        if region.kind != kind:
            raise ParameterError("name", f"region {name} is of the other kind of memory: {region.kind}")
        return [region]

    def _region(self, name: Any) -> Region:
        if not isinstance(name, str) or name not in self._known:
            raise ParameterError("name", f"there is no region {name!r}: register it first")
        return self._known[name]


def _whole(name: str, what: str, value: Any, low: int, unit: str = "number of bytes") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < MOST_BYTES:
        raise ParameterError(what, f"{what} of {name} must be a whole {unit} from {low} on, not {value!r}")
    return value
