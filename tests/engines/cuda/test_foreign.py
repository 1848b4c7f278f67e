"""Memory of another process on a GPU, as the server reads and writes it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engines.cuda import foreign
from engines.cuda.foreign import ForeignMemory
from engines.errors import DeviceError, ParameterError
from tests.libcuda.conftest import Cuda
from tests.libcuda.exporter import exported
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus


@pytest.mark.parametrize("staging", [100, 1 << 20], ids=["in pieces", "at once"])
def test_bytes_go_both_ways(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, staging: int) -> None:
    """From several threads, whose context stays what it was; nothing is left behind."""
    monkeypatch.setattr(foreign, "STAGING_BYTES", staging)
    cuda = Cuda(Machine(2, seed=int(rng.integers(1000))))
    before, content = cuda.machine.live(), bytearray(rng.bytes(3001))
    with exported(3001, 1, bytes(content)) as theirs:
        memory = ForeignMemory(theirs.handle, 1)
        assert memory.size == 3001
        with ThreadPoolExecutor(3) as pool:
            parts = [(int(one), rng.bytes(64)) for one in rng.permutation(40) * 70]
            for _ in pool.map(lambda part: memory.write(part[0], memoryview(part[1])), parts):
                pass
            for start, data in parts:
                content[start : start + 64] = data
            assert list(pool.map(lambda part: memory.read(part[0], 64), parts)) == [data for _, data in parts]
        assert theirs.content() == bytes(content) == memory.read(0, 3001)
        assert int(cuda("cuCtxGetDevice")) == 0
        again = ForeignMemory(theirs.handle, 1)
        assert again.identity == memory.identity
        again.close()
        memory.close()
    assert cuda.machine.live() == before


@pytest.mark.parametrize(
    ("device", "handle", "param", "words"),
    [
        (2, None, "device_id", "0 to 1"), (0, None, "device_id", "on GPU 1, not on GPU 0"),
        (1, b"x" * 63, "raw_handle", "64 bytes, not 63"), (1, b"x" * 64, "raw_handle", "cannot be opened"),
    ],
)  # fmt: skip
def test_what_does_not_fit(device: int, handle: bytes | None, param: str, words: str) -> None:
    cuda = Cuda(Machine(2))
    before = cuda.machine.live()
    with exported(100, 1) as theirs, pytest.raises(ParameterError, match=words) as refusal:
        ForeignMemory(handle or theirs.handle, device)
    assert refusal.value.param == param
    assert cuda.machine.live() == before


@pytest.mark.parametrize(
    "function", ["cuPointerGetAttribute", "cuMemGetAddressRange", "cuStreamCreate", "cuEventCreate", "cuMemHostAlloc"]
)
def test_nothing_is_left_of_what_fails(function: str) -> None:
    cuda = Cuda(Machine(2))
    before = cuda.machine.live()
    cuda.machine.fail(function)
    with exported(100) as theirs, pytest.raises(DeviceError, match=function):
        ForeignMemory(theirs.handle, 0)
    assert cuda.machine.live() == before
