"""The imaginary machine from Python: set up, faults on request, model calls on streams, and what it has to say."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cuda import kernels
from tests import host_kernel
from tests.libcuda.library import FOLDER

KERNELS = FOLDER / "kernels"  # machine code that tests compile
Range = tuple[int, int]  # address, bytes
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_IGNORED = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)
_STATUS = {"CUDA_ERROR_OUT_OF_MEMORY": 2, "CUDA_ERROR_ILLEGAL_ADDRESS": 700, "CUDA_ERROR_LAUNCH_FAILED": 719}


def load() -> ctypes.CDLL:
    """The driver that this process has, which must be the imaginary one."""
    library = ctypes.CDLL("libcuda.so.1")
    library.imaginary_bytes.restype = ctypes.c_void_p
    library.imaginary_calls.restype = library.imaginary_work_done.restype = ctypes.c_long
    library.imaginary_nanoseconds.restype = ctypes.c_uint64
    library.imaginary_violations.restype = library.imaginary_live.restype = ctypes.c_size_t
    return library


latest: Machine | None = None


class Machine:
    """A machine with so many GPUs and nothing on them. There is one per process: a new one ends the one before.

    seed: of the order that streams advance in. eager: how many operations may run at each call; 0 leaves all of them
    to calls that ask or wait. peers: whether GPUs reach one another's memory.
    """

    def __init__(self, devices: int = 2, *, seed: int = 0, eager: int = 2, peers: bool = True) -> None:
        self._library = load()
        self._kept: list[Any] = []
        self._errors: list[BaseException] = []
        self._library.imaginary_reset(devices, seed, eager)
        self.set("peers", peers)
        self.devices = devices
        globals()["latest"] = self

    # --- faults --------------------------------------------------------------------------------------------------

    def set(self, name: str, value: int, device: int = 0) -> None:
        """Of the machine: version, eager, peers, peer_zeros (copies between GPUs write zeros), races (are looked for),
        computes (or does no work but to count).

        Of one device: free_bytes, total_bytes, lost_after (so many more operations), lost_status, hangs, gone (does not
        come back).
        """
        assert self._library.imaginary_set(name.encode(), device, ctypes.c_long(int(value))), name

    def fail(self, function: str, nth: int = 1, status: str | int = 719, *, sticky: bool = False) -> None:
        """The n-th call of a function from now fails; `sticky`: and so does every later one in its context."""
        number = _STATUS[status] if isinstance(status, str) else status
        assert self._library.imaginary_fail(function.encode(), nth, number, int(sticky), 0), function

    def skip(self, function: str, nth: int = 1) -> None:
        """The n-th call of a function from now does nothing and succeeds."""
        assert self._library.imaginary_fail(function.encode(), nth, 0, 0, 1), function

    def ignore_waits(self, ignored: Callable[[int, int], bool]) -> None:
        """Forgets the waits of streams for events that `ignored(stream, event)` picks."""
        self._kept.append(_IGNORED(lambda stream, event: int(ignored(stream, event))))
        self._library.imaginary_ignore_waits(self._kept[-1])

    # --- models --------------------------------------------------------------------------------------------------

    def view(self, address: int, size: int) -> NDArray[np.uint8]:
        """The content of device memory."""
        found = self._library.imaginary_bytes(ctypes.c_size_t(address), ctypes.c_size_t(size))
        assert found, f"access to {size} bytes at {address:#x}, which no allocation holds"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(found))

    def work(
        self, stream: Any, run: Callable[[], None] | None, reads: Sequence[Range], writes: Sequence[Range],
        *, model: bool = True,
    ) -> Callable[[], int]:  # fmt: skip
        """What puts a model call on a stream: it runs when its turn comes, and touches only these ranges.

        Returns the driver's status. Errors of `run` are raised by `check`.
        """

        def checked(_: Any) -> None:
            try:
                if run is not None:
                    run()
            except BaseException as error:  # noqa: BLE001 - it cannot pass through the driver
                self._errors.append(error)

        ranges = [*reads, *writes]
        callback = _RUN(checked) if run is not None else _RUN(0)
        addresses = (ctypes.c_size_t * len(ranges))(*(address for address, _ in ranges))
        sizes = (ctypes.c_size_t * len(ranges))(*(size for _, size in ranges))
        kinds = (ctypes.c_ubyte * len(ranges))(*([0] * len(reads) + [1] * len(writes)))
        self._kept.append((callback, addresses, sizes, kinds))
        arguments = ctypes.c_void_p(int(stream)), callback, None, len(ranges), addresses, sizes, kinds, int(model)
        return lambda: int(self._library.imaginary_model(*arguments))

    def finish(self) -> None:
        """Runs all that is queued, outside of any driver call."""
        self._library.imaginary_finish()

    def library_call(self, what: str) -> int:
        """What another library does on the current device that may wait for all its streams: the driver's status."""
        return int(self._library.imaginary_library_call(what.encode()))

    # --- answers -------------------------------------------------------------------------------------------------

    def calls(self, function: str = "") -> int:
        """How often a function was called, or all of them."""
        count = self._library.imaginary_calls(function.encode())
        assert count >= 0, f"the imaginary driver has no {function}"
        return int(count)

    def seconds(self) -> float:
        """What this process spent in driver calls so far."""
        return int(self._library.imaginary_nanoseconds()) / 1e9

    def work_done(self, device: int) -> int:
        """How many operations ran on a device."""
        return int(self._library.imaginary_work_done(device))

    def chain(self, *, again: bool = False) -> int:
        """The most model calls of which each had to wait for the one before; `again` starts counting again."""
        return int(self._library.imaginary_chain(int(again)))

    def live(self) -> dict[str, int]:
        """What is still there, by kind: contexts, references to them, streams, events, graphs, modules, allocations."""
        lines = (line.split("\t") for line in self._text(self._library.imaginary_live).splitlines())
        return {kind: int(count) for kind, count in lines}

    def violations(self) -> list[str]:
        """Which rules were broken, when all that is queued has run."""
        return self._text(self._library.imaginary_violations).splitlines()

    def forgive(self) -> list[str]:
        """The same, and forgets them."""
        found = self.violations()
        self._library.imaginary_forgive()
        return found

    def check(self) -> None:
        """Fails when a rule was broken or a model call raised an error."""
        found = self.violations()
        if self._errors:
            raise self._errors.pop(0)
        assert not found, "\n".join(found)

    def _text(self, function: Any) -> str:
        buffer = ctypes.create_string_buffer(1 << 18)
        assert function(buffer, ctypes.c_size_t(len(buffer))) <= len(buffer)
        return buffer.value.decode()


def know_kernels() -> None:
    """Tells the driver, from now on, which variant of the kernel each piece of machine code is."""
    library, compile_code = load(), kernels.machine_code
    known: set[bytes] = set()

    def machine_code(variant: kernels.Variant, arch: str, cache: Any) -> bytes:
        code = compile_code(variant, arch, cache)
        if code not in known:
            known.add(code)
            path = host_kernel.compiled(variant.dtype)
            library.imaginary_kernels(variant.dtype.encode(), str(path).encode())
            assert library.imaginary_code(code, variant.dtype.encode(), variant.outputs, variant.width)
        return code

    kernels.machine_code = machine_code
