"""Memory that clients share with the server: objects of `shm_open`, and CUDA memory in engines.cuda.foreign."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Hashable
from typing import Protocol

from engines.errors import ParameterError

KEY = re.compile(r"/?[A-Za-z0-9_.-]{1,200}")


class Memory(Protocol):
    """Bytes of a client. identity: equal where they are the same ones, opened twice. size: how many, when opened."""

    identity: Hashable
    size: int

    def read(self, start: int, size: int) -> bytes:
        """Bytes from `start` on; ParameterError where they are gone."""

    def write(self, start: int, data: memoryview) -> None:
        """Puts bytes there; ParameterError where there is no room any more."""

    def close(self) -> None:
        """Lets go of it."""


class SystemMemory:
    """An object of `shm_open`. ParameterError where there is none, or it is something else.

    Bytes are read and written through the file, not through a mapping: a client that truncates its memory while the
    server uses it gets an error, where a mapping would end the process with SIGBUS.
    """

    def __init__(self, key: str) -> None:
        import _posixshmem  # `multiprocessing.shared_memory` would unlink the client's memory when the server ends

        if not KEY.fullmatch(key) or key.strip("/") in (".", ".."):
            raise ParameterError("key", "a key must be /NAME, without further slashes")
        self._key = key
        try:
            self._file: int = _posixshmem.shm_open("/" + key.lstrip("/"), os.O_RDWR, mode=0o600)
        except OSError as error:
            raise ParameterError("key", f"the memory {key} cannot be opened: {error.strerror}") from None
        facts = os.fstat(self._file)
        if not stat.S_ISREG(facts.st_mode):
            os.close(self._file)
            raise ParameterError("key", f"{key} is no shared memory")
        self.identity: Hashable = ("system", facts.st_dev, facts.st_ino)
        self.size = facts.st_size

    def read(self, start: int, size: int) -> bytes:
        """See Memory."""
        data = os.pread(self._file, size, start)
        if len(data) != size:
            raise self._shortened()
        return data

    def write(self, start: int, data: memoryview) -> None:
        """See Memory."""
        if os.fstat(self._file).st_size < start + data.nbytes:
            raise self._shortened()
        done = 0
        try:
            while done < data.nbytes:
                done += os.pwrite(self._file, data[done:], start + done)
        except OSError as error:  # as where the machine has no memory left
            raise ParameterError("key", f"the memory {self._key} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """See Memory."""
        os.close(self._file)

    def _shortened(self) -> ParameterError:
        return ParameterError("key", f"the memory {self._key} was shortened")
