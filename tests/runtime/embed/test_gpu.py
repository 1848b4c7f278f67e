"""The library's GPU side on imaginary GPUs: the driver's table, kernels, combinations against float64, failures."""
# covers: runtime/embed/src/cuda_driver.cc, runtime/embed/src/cuda_combine.cc, runtime/embed/src/cuda_lanes.cc

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_size_t, c_uint32
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.cuda import kernels
from tests.libcuda.machine import Machine
from tests.runtime.embed.building import built
from tests.runtime.embed.library import STATUSES, StatusError

pytestmark = pytest.mark.imaginary_gpus
ARCH = "90"
MODEL = ctypes.CFUNCTYPE(c_int, c_uint32, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64)


class Gpu:
    """The functions of native/gpu.cc."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL(str(built("tests/libgpu.so")))
        self.c.gpu_message.restype = c_char_p
        self.c.gpu_layout.restype = c_size_t
        self.c.gpu_code.argtypes = [c_char_p, c_uint32, c_uint32, c_char_p, c_char_p, POINTER(c_size_t)]
        indices = POINTER(c_uint32)
        self.c.gpu_combine.argtypes = [
            c_int, c_size_t, c_uint32, POINTER(c_float), c_uint32, indices, c_uint32, indices, POINTER(c_float),
            c_uint32,
        ]  # fmt: skip

    def checked(self, status: int) -> None:
        if status:
            raise StatusError(STATUSES[status], self.c.gpu_message().decode())

    def combine(
        self, values: NDArray[np.float32], sources: list[int], rows: NDArray[np.float32], targets: list[int],
        *, device: int = 0, times: int = 1,
    ) -> NDArray[np.float32]:  # fmt: skip
        """What the slots hold after combinations."""
        made = values.copy()
        slots, elements = values.shape
        for outputs in {min(34, len(targets)), len(targets) % 34 or 34}:
            for width in (1, 2, 4):  # the imaginary driver runs what it was told of
                if width * outputs <= 68:
                    kernels.machine_code(kernels.Variant("float32", outputs, width), ARCH, kernels.CACHE)
        self.checked(self.c.gpu_combine(
            device, elements, slots, made.ctypes.data_as(POINTER(c_float)), len(sources),
            (c_uint32 * len(sources))(*sources), len(targets), (c_uint32 * len(targets))(*targets),
            np.ascontiguousarray(rows, np.float32).ctypes.data_as(POINTER(c_float)), times,
        ))  # fmt: skip
        return made


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


def test_the_struct_is_that_of_the_kernel(gpu: Gpu) -> None:
    Machine(1)
    offsets = (c_size_t * 14)()
    assert gpu.c.gpu_layout(offsets) == ctypes.sizeof(kernels.Combination)
    assert list(offsets) == [getattr(kernels.Combination, name).offset for name, _ in kernels.Combination._fields_]


@pytest.mark.parametrize(
    ("elements", "sources", "targets", "aliased"),
    [
        (64, 2, 1, 1),
        (4097, 3, 2, 0),
        (1022, 7, 5, 2),
        (36, 5, 34, 3),
        (65, 4, 40, 4),
        (20, 300, 2, 1),
        (31, 290, 37, 36),
    ],
)
def test_combinations_are_those_of_float64(
    gpu: Gpu, rng: np.random.Generator, elements: int, sources: int, targets: int, aliased: int
) -> None:
    """Odd sizes, one launch and several, outputs that are inputs; on the second GPU, in a random order of streams."""
    machine = Machine(2, seed=int(rng.integers(1000)))
    slots = sources + targets - aliased
    values = rng.standard_normal((slots, elements), np.float32)
    order = rng.permutation(slots).tolist()
    read, written = order[:sources], rng.permutation(order[sources - aliased :]).tolist()
    rows = rng.standard_normal((targets, sources)).astype(np.float32)
    made = gpu.combine(values, read, rows, written, device=1)
    exact = rows.astype(np.float64) @ values[read].astype(np.float64)
    bound = (np.abs(rows).astype(np.float64) @ np.abs(values[read]).astype(np.float64)) * sources * 2.0**-24
    assert (np.abs(made[written] - exact) <= bound + 1e-30).all()
    untouched = sorted(set(range(slots)) - set(written))
    np.testing.assert_array_equal(made[untouched], values[untouched])
    assert not machine.live().get("allocation")


def test_a_combination_reads_what_the_one_before_it_wrote(gpu: Gpu) -> None:
    Machine(1)
    values = np.ones((2, 10), np.float32)
    made = gpu.combine(values, [0, 1], np.array([[1, 1], [1, 0]], np.float32), [0, 1], times=5)
    assert made[:, 0].tolist() == [13, 8]  # Fibonacci's numbers


@pytest.mark.parametrize(
    ("function", "nth", "status", "expected"),
    [("cuMemAlloc", 1, 2, "MEMORY"), ("cuMemAlloc", 3, 2, "MEMORY"), ("cuMemHostAlloc", 2, 2, "MEMORY"),
     ("cuStreamCreate", 1, 719, "DEVICE"), ("cuModuleLoadData", 1, 200, "DEVICE"),
     ("cuModuleGetFunction", 1, 500, "DEVICE"), ("cuLaunchKernel", 1, 719, "DEVICE"),
     ("cuMemsetD32Async", 1, 719, "DEVICE"), ("cuMemcpyHtoDAsync", 1, 719, "DEVICE"),
     ("cuMemcpyHtoDAsync", 2, 719, "DEVICE"), ("cuStreamQuery", 1, 700, "DEVICE"),
     ("cuStreamQuery", 3, 700, "DEVICE")],
)  # fmt: skip
def test_any_call_may_fail(gpu: Gpu, function: str, nth: int, status: int, expected: str) -> None:
    """An error with the driver's words, and nothing is left."""
    machine = Machine(1)
    values = np.ones((3, 8), np.float32)
    rows = np.ones((1, 2), np.float32)
    gpu.combine(values, [0, 1], rows, [2])
    machine.fail(function, nth, status)
    with pytest.raises(StatusError, match=function) as caught:
        gpu.combine(values, [0, 1], rows, [2])
    assert caught.value.status == expected
    live = machine.live()
    assert not any(live.get(kind) for kind in ("allocation", "pinned allocation", "stream", "module")), live
    np.testing.assert_array_equal(gpu.combine(values, [0, 1], rows, [2])[2], np.full(8, 2, np.float32))


def test_a_gpu_that_is_not_there(gpu: Gpu) -> None:
    Machine(2)
    with pytest.raises(StatusError, match="there is no cuda:2: this machine has cuda:0 to cuda:1"):
        gpu.checked(gpu.c.gpu_open(2))
    Machine(0)
    with pytest.raises(StatusError, match="no CUDA-capable device"):
        gpu.checked(gpu.c.gpu_open(0))


def code(gpu: Gpu, arch: str, outputs: int, width: int, cache: Path) -> bytes:
    buffer, size = ctypes.create_string_buffer(1 << 18), c_size_t(1 << 18)
    gpu.checked(gpu.c.gpu_code(arch.encode(), outputs, width, str(cache).encode(), buffer, byref(size)))
    return buffer.raw[: size.value]


def test_machine_code_is_shared_with_the_python_engine(gpu: Gpu, tmp_path: Path) -> None:
    """One cache, the same key, the same compiler's output: each reads what the other has written."""
    Machine(1)
    compiled, _ = kernels.compile_variant(kernels.Variant("float32", 3, 2), "89")  # also opens NVRTC in this process
    assert code(gpu, "89", 3, 2, tmp_path / "new" / "cache") == compiled
    (written,) = (tmp_path / "new" / "cache").iterdir()
    assert written.read_bytes() == compiled
    assert kernels.machine_code(kernels.Variant("float32", 3, 2), "89", tmp_path / "python") == compiled
    assert [path.name for path in (tmp_path / "python").iterdir()] == [written.name]
    written.write_bytes(b"what the cache has")
    assert code(gpu, "89", 3, 2, written.parent) == b"what the cache has"
    with pytest.raises(StatusError, match="cannot be compiled for sm_1"):
        code(gpu, "1", 3, 2, tmp_path / "other")


def rounds(
    gpu: Gpu,
    machine: Machine,
    devices: list[int],
    latents: NDArray[np.float32],
    count: int,
    seen: list[int] | None = None,
) -> NDArray[np.float32]:
    """The latents after rounds in which lane n's model makes latent · 0.25 + n."""
    lanes, elements = latents.shape
    for width in (1, 2, 4):
        kernels.machine_code(kernels.Variant("float32", lanes, width), ARCH, kernels.CACHE)

    def model(lane: int, stream: int, sample: int, output: int) -> int:
        if seen is not None:
            seen.append(machine.calls("cuStreamQuery") + machine.calls("cuStreamSynchronize"))

        def run() -> None:
            given, made = (machine.view(address, 4 * elements).view(np.float32) for address in (sample, output))
            made[:] = given * np.float32(0.25) + np.float32(lane)

        return machine.work(stream, run, [(sample, 4 * elements)], [(output, 4 * elements)])()

    made = latents.copy()
    gpu.checked(gpu.c.gpu_rounds(
        lanes, (c_int * lanes)(*devices), c_size_t(elements), made.ctypes.data_as(POINTER(c_float)), count, MODEL(model)
    ))  # fmt: skip
    return made


@pytest.mark.parametrize("peers", [True, False])
@pytest.mark.parametrize("devices", [[0, 1], [1, 0, 1], [0, 0], [1]])
def test_lanes_make_rounds(gpu: Gpu, rng: np.random.Generator, devices: list[int], peers: bool) -> None:
    """Any order of streams that events allow gives what the host computes; nothing races, nothing is left."""
    machine = Machine(2, seed=int(rng.integers(1000)), eager=int(rng.integers(3)), peers=peers)
    latents = rng.standard_normal((len(devices), int(rng.integers(1, 3000))), np.float32)
    expected = latents.astype(np.float64)
    for _ in range(3):
        expected += expected * 0.25 + np.arange(len(devices))[:, None]
    asked = machine.calls("cuStreamQuery")
    made = rounds(gpu, machine, devices, latents, 3)
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5)
    assert machine.chain() == 3, "lanes waited for each other inside a round"
    assert asked < machine.calls("cuStreamQuery")
    live = machine.live()
    assert not any(live.get(kind) for kind in ("allocation", "pinned allocation", "stream", "event", "module")), live


def test_the_host_waits_for_no_round(gpu: Gpu) -> None:
    """Nothing is asked between the first and the last round."""
    seen: list[int] = []
    rounds(gpu, Machine(2), [0, 1], np.ones((2, 8), np.float32), 9, seen)
    assert len(seen) == 18
    assert len(set(seen)) == 1


def test_pairs_are_tested_before_they_are_trusted(gpu: Gpu) -> None:
    direct = c_int()
    for peers, zeros, expected in ((True, False, 1), (False, False, 0), (True, True, 0)):
        machine = Machine(2, peers=peers)
        machine.set("peer_zeros", zeros)
        gpu.checked(gpu.c.gpu_peers(0, 1, byref(direct)))
        assert direct.value == expected
        assert not machine.live().get("allocation")
    latents = np.ones((2, 9), np.float32)
    np.testing.assert_array_equal(rounds(gpu, machine, [0, 1], latents, 1)[1], np.full(9, 2.25, np.float32))


def test_a_model_that_fails(gpu: Gpu, rng: np.random.Generator) -> None:
    """The words of the driver, with work of other lanes queued, and nothing is left."""
    machine = Machine(2, eager=0, peers=bool(rng.integers(2)))
    gpu.c.gpu_rounds.restype = c_int
    failing = MODEL(lambda lane, stream, sample, output: 719 if lane else 0)
    for width in (1, 2, 4):
        kernels.machine_code(kernels.Variant("float32", 2, width), ARCH, kernels.CACHE)
    latents = np.ones((2, 8), np.float32)
    with pytest.raises(StatusError, match="a model call failed with CUDA_ERROR_LAUNCH_FAILED"):
        gpu.checked(gpu.c.gpu_rounds(
            2, (c_int * 2)(0, 1), c_size_t(8), latents.ctypes.data_as(POINTER(c_float)), 2, failing
        ))  # fmt: skip
    live = machine.live()
    assert not any(live.get(kind) for kind in ("allocation", "pinned allocation", "stream", "event", "module")), live
