"""Another process with memory on imaginary GPUs, which it lets this one open."""

from __future__ import annotations

import base64
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from tests import ROOT


@dataclass
class Exported:
    """`handle` of so many bytes on a GPU; `content()` is what lies there now, as that process sees it."""

    handle: bytes
    _to: IO[str]
    _from: IO[str]

    def content(self) -> bytes:
        self._to.write("\n")
        self._to.flush()
        return base64.b64decode(self._from.readline())


@contextmanager
def exported(size: int, device: int = 0, content: bytes = b"") -> Iterator[Exported]:
    """Memory of another process that begins with the content; it is gone afterwards."""
    command = [sys.executable, "-m", "tests.libcuda.exporter", str(size), str(device)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(base64.b64encode(content).decode() + "\n")
        process.stdin.flush()
        yield Exported(base64.b64decode(process.stdout.readline()), process.stdin, process.stdout)


def main(size: int, device: int) -> None:
    """Says its handle, and at each line what is in its memory."""
    from tests.libcuda.conftest import Cuda
    from tests.libcuda.machine import Machine

    cuda = Cuda(Machine(2))
    cuda.on(device)
    pointer, host, stream = cuda.alloc(size), cuda.pinned(size), cuda.stream()
    content = base64.b64decode(sys.stdin.readline())
    ctypes.memset(host, 0, size)
    ctypes.memmove(host, content, len(content))
    cuda("cuMemcpyHtoDAsync", pointer, host, size, stream)
    cuda("cuStreamSynchronize", stream)
    handle = cuda("cuIpcGetMemHandle", pointer)
    print(base64.b64encode(ctypes.string_at(handle.getPtr(), 64)).decode(), flush=True)
    for _ in sys.stdin:
        cuda("cuMemcpyDtoHAsync", host, pointer, size, stream)
        cuda("cuStreamSynchronize", stream)
        print(base64.b64encode(ctypes.string_at(host, size)).decode(), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
