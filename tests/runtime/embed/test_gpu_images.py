"""Whole images of the library on imaginary GPUs against its lanes on processor cores."""
# covers: runtime/embed/src/cuda_player.cc, runtime/embed/src/cuda_output.cc, tests/runtime/embed/native/imaginary.cc

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.cuda import kernels
from engines.store import Bundle
from runtime.embed.command import main
from tests.libcuda.conftest import Cuda
from tests.libcuda.machine import Machine
from tests.runtime.embed.building import built
from tests.runtime.embed.conftest import Write
from tests.runtime.embed.library import Call, Library, StatusError
from tests.runtime.embed.test_gpu import ARCH

pytestmark = pytest.mark.imaginary_gpus
PROMPT = "a large red star at the left on blue background"


@pytest.fixture(scope="module")
def on_gpus() -> Library:
    """The library with networks for imaginary GPUs, and the kernels that programs here need."""
    library = Library(built("tests/libimaginary.so"))
    library.c.imaginary_install()
    return library


@pytest.fixture
def machine(rng: np.random.Generator) -> Iterator[Machine]:
    machine = Machine(2, seed=int(rng.integers(1000)), eager=int(rng.integers(3)), peers=bool(rng.integers(2)))
    for outputs in range(1, 9):
        for width in (1, 2, 4):
            kernels.machine_code(kernels.Variant("float32", outputs, width), ARCH, kernels.CACHE)
    yield machine


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ("cuda:0,cuda:1", {"mode": "aggressive", "scheduler": "euler_a", "num_inference_steps": 7, "k": 3}),
        ("cuda:1,cuda:0", {"mode": "conservative", "scheduler": "dpm++2m", "num_inference_steps": 6, "k": 2}),
        ("cuda:0*2,cuda:1", {"mode": "aggressive", "scheduler": "ddim", "num_inference_steps": 8, "k": 2}),
        ("cuda:1", {"mode": "sequential", "scheduler": "ddim", "num_inference_steps": 3}),
    ],
)
def test_images_are_those_of_processor_cores(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, rng: np.random.Generator, devices: str,
    options: dict[str, object],
) -> None:  # fmt: skip
    """Equal to rounding: of several calls in turn, with other seeds, guidance and numbers of images."""
    program = write(**options)
    lanes = 3 if "*" in devices else devices.count(",") + 1
    here, there = on_gpus.open(shapes.folder, program, f"cpu*{lanes}"), on_gpus.open(shapes.folder, program, devices)
    for images, guidance in ((1, 4.0), (1, 7.5), (2, 1.0)):
        seed = int(rng.integers(2**63))
        expected = here.generate(PROMPT, seed=seed, guidance=guidance, images=images)
        machine.chain(again=True)
        made = there.generate(PROMPT, seed=seed, guidance=guidance, images=images)
        assert machine.chain() == made.result.rounds, "lanes waited for each other inside a round"
        scale = np.abs(expected.latents).max()
        assert np.abs(made.latents - expected.latents).max() <= 1e-4 * scale
        assert np.abs(made.rgb.astype(int) - expected.rgb).max() <= 1
        counted = [(r.rounds, r.evaluations, r.calls, r.lanes_per_round) for r in (made.result, expected.result)]
        assert counted[0] == counted[1]
    here.close()
    there.close()
    live = machine.live()
    assert not any(live.get(kind) for kind in ("allocation", "pinned allocation", "stream", "event", "module")), live


def test_progress_previews_and_cancelling(on_gpus: Library, machine: Machine, shapes: Bundle, write: Write) -> None:
    engine = on_gpus.open(shapes.folder, write(num_inference_steps=6), "cuda:0,cuda:1")
    seen: list[int] = []

    def preview(rgb: NDArray[np.uint8], finished: int) -> int:
        seen.append(finished)
        return int(not rgb.any())

    engine.generate(PROMPT, preview=preview)
    assert seen == sorted(seen) and seen
    with pytest.raises(StatusError, match="cancelled by a callback"):
        engine.generate(PROMPT, progress=lambda finished, steps: 1)
    engine.generate(PROMPT)
    engine.close()
    assert not machine.live().get("allocation")


@pytest.mark.parametrize("function", ["cuMemcpyDtoHAsync", "cuLaunchKernel", "cuEventRecord", "cuMemAlloc"])
def test_a_call_that_fails_ends_one_image(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, rng: np.random.Generator, function: str
) -> None:
    """The next image is right, and nothing is left."""
    engine = on_gpus.open(shapes.folder, write(), "cuda:0,cuda:1")
    machine.fail(function, 1 if function == "cuMemcpyDtoHAsync" else int(rng.integers(1, 3)), 2)
    with pytest.raises(StatusError, match=function):
        engine.generate(PROMPT, seed=3)
    made = engine.generate(PROMPT, seed=3)
    np.testing.assert_array_equal(made.latents, engine.generate(PROMPT, seed=3).latents)
    engine.close()
    assert not machine.live().get("allocation")


def test_the_plain_library_says_what_it_cannot(shapes: Bundle, write: Write) -> None:
    Machine(2)
    plain = Library(built())
    with pytest.raises(StatusError, match="option plan") as caught:
        plain.open(shapes.folder, write(), "cuda:0")
    assert caught.value.status == "UNSUPPORTED"
    for devices in ("cuda:9", "cuda:", "cuda:0,cpu", "cuda:0*0", "cuda:0*65", "cuda:x", "cuda:0@fp16", "cudas:0"):
        with pytest.raises(StatusError, match="cuda"):
            plain.open(shapes.folder, write(), devices)


def test_many_requests_at_once(on_gpus: Library, machine: Machine, shapes: Bundle, write: Write) -> None:
    """Threads share the lanes; every image is that of its seed, some are cancelled, and closing ends the rest."""
    program = write(scheduler="euler_a", num_inference_steps=6)
    here, there = (on_gpus.open(shapes.folder, program, devices) for devices in ("cpu*3", "cuda:0*2,cuda:1"))
    expected = {seed: here.generate(PROMPT, seed=seed).latents for seed in range(6)}

    def client(seed: int) -> float:
        made = there.generate(PROMPT, seed=seed)
        return float(np.abs(made.latents - expected[seed]).max() / np.abs(expected[seed]).max())

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(client, [*range(6)] * 2)) <= 1e-4
    running = [there.start(there.call(PROMPT, seed=seed)) for seed in range(5)]
    on_gpus("cancel", running[2])
    there.close()
    for request in running:
        try:
            on_gpus("wait", request, -1.0, None)
        except StatusError as error:
            assert error.status == "CANCELLED", error
        on_gpus("release", request)
    here.close()
    assert not nothing_left(machine)


def nothing_left(machine: Machine) -> dict[str, int]:
    kinds = ("allocation", "pinned allocation", "stream", "event", "module")
    return {kind: count for kind, count in machine.live().items() if kind in kinds and count}


def test_a_lost_gpu_is_no_image(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, rng: np.random.Generator
) -> None:
    """Home goes on when another GPU is lost, with what lay there before: an error, wherever it happens."""
    engine = on_gpus.open(shapes.folder, write(num_inference_steps=6), "cuda:0,cuda:1")
    before = machine.work_done(1)
    engine.generate(PROMPT)
    machine.set("lost_after", int(rng.integers(1, machine.work_done(1) - before)), device=1)
    for _ in range(2):
        with pytest.raises(StatusError, match="the device was lost") as caught:
            engine.generate(PROMPT)
        assert caught.value.status == "DEVICE"
    engine.close()
    machine.forgive()


@pytest.mark.parametrize("device", [0, 1])
def test_a_lane_that_hangs_is_named(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, device: int
) -> None:
    """The engine makes no further image, and closing it waits for nothing."""
    said: list[str] = []
    engine = on_gpus.open(
        shapes.folder, write(num_inference_steps=6), "cuda:0,cuda:1", {"lane_timeout": "0.3"},
        lambda level, text: said.append(text),
    )  # fmt: skip
    engine.generate(PROMPT)
    started = time.perf_counter()

    def hang(finished: int, steps: int) -> int:
        machine.set("hangs", 1, device=device)
        return 0

    for progress in (hang, None, None):
        words = rf"did not end within 0.3 s: lane {device} \(cuda:{device}\) hangs"
        with pytest.raises(StatusError, match=words) as caught:
            engine.generate(PROMPT, progress=progress)
        assert caught.value.status == "DEVICE"
    engine.close()
    assert time.perf_counter() - started < 3
    assert "a lane hangs" in said[-1]
    machine.set("hangs", 0, device=device)


def test_a_lane_that_hangs_ends_all_requests(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, rng: np.random.Generator
) -> None:
    device = int(rng.integers(2))
    engine = on_gpus.open(shapes.folder, write(num_inference_steps=6), "cuda:0,cuda:1", {"lane_timeout": "0.3"})
    running = [engine.start(engine.call(PROMPT, seed=seed)) for seed in range(4)]
    machine.set("hangs", 1, device=device)
    started, ends = time.perf_counter(), []
    for request in running:
        try:
            on_gpus("wait", request, 30.0, None)
            ends.append("OK")
        except StatusError as error:
            ends.append(error.status)
        on_gpus("release", request)
    assert set(ends) <= {"OK", "DEVICE"} and "DEVICE" in ends
    engine.close()
    assert time.perf_counter() - started < 5
    machine.set("hangs", 0, device=device)


def test_limits_are_checked(on_gpus: Library, machine: Machine, shapes: Bundle, write: Write) -> None:
    program = write()
    for value in ("0", "-1", "x", "nan", "inf", "1e7", "", "1 ", "0x1"):
        with pytest.raises(StatusError, match="lane_timeout must be a number of seconds above 0"):
            on_gpus.open(shapes.folder, program, "cuda:0", {"lane_timeout": value})


@pytest.mark.parametrize("devices", ["cuda:1,cuda:0", "cuda:1", "cuda:0,cuda:1,cuda:0"])
def test_a_programs_own_gpus(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, tmp_path: Path, devices: str
) -> None:
    """`python -m runtime program --devices cuda:…` is what an engine opens that is told nothing."""
    path, lanes = tmp_path / "gpus.program", devices.count(",") + 1
    words = ["program", str(shapes.folder), "--mode", "aggressive", "--steps", "4", "--devices", devices]
    assert main([*words[1:], "--out", str(path)]) == 0
    engine = on_gpus.open(shapes.folder, path)
    assert engine.sizes().lanes == lanes
    before = [machine.work_done(device) for device in (0, 1)]
    made = engine.generate(PROMPT, seed=2)
    used = {device for device in (0, 1) if machine.work_done(device) > before[device]}
    assert used == {int(one[5:]) for one in devices.split(",")}
    here = on_gpus.open(shapes.folder, path, f"cpu*{lanes}")
    expected = here.generate(PROMPT, seed=2).latents
    assert np.abs(made.latents - expected).max() <= 1e-4 * np.abs(expected).max()
    engine.close()
    here.close()


# --- output in device memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1])
def test_output_in_device_memory(
    on_gpus: Library, machine: Machine, shapes: Bundle, write: Write, rng: np.random.Generator, where: int
) -> None:
    """On the caller's stream, behind what it has to do, with an event; equal to what the host gets."""
    cuda = Cuda(machine)
    engine = on_gpus.open(shapes.folder, write(scheduler="euler_a"), "cuda:0,cuda:1")
    images = int(rng.integers(1, 3))
    expected = engine.generate(PROMPT, seed=5, images=images)
    cuda.on(where)
    latent_bytes, rgb_bytes = expected.latents.nbytes, expected.rgb.nbytes
    latents, rgb = cuda.alloc(latent_bytes), cuda.alloc(rgb_bytes)
    stream, event, later = cuda.stream(), cuda.event(), cuda.stream()
    reached: list[int] = []
    found: list[NDArray[np.float32]] = []
    for with_rgb in (False, True):
        machine.work(stream, lambda: reached.append(1), [], [(latents, latent_bytes)], model=False)()
        wanted: dict[str, Any] = {"device_rgb": rgb, "device_rgb_bytes": rgb_bytes} if with_rgb else {}
        made = engine.call(
            PROMPT, seed=5, images=images, device_latents=latents, device_latents_count=expected.latents.size,
            stream=int(stream), event=int(event), rgb=0, latents_out=0, **wanted,
        )  # fmt: skip
        request = engine.start(made)
        on_gpus("wait_enqueued", request, -1.0)
        cuda.on(where)
        cuda("cuStreamWaitEvent", later, event, 0)  # no wait of the host
        machine.work(
            later, lambda: found.append(machine.view(latents, latent_bytes).view(np.float32).copy()),
            [(latents, latent_bytes)], [], model=False,
        )()  # fmt: skip
        on_gpus("wait", request, -1.0, None)
        cuda("cuStreamSynchronize", later)
        np.testing.assert_array_equal(found[-1], expected.latents)
        if with_rgb:
            np.testing.assert_array_equal(machine.view(rgb, rgb_bytes), expected.rgb.ravel())
        on_gpus("release", request)
    assert len(reached) == 2
    engine.close()


def test_nan_in_device_memory_is_an_error(on_gpus: Library, machine: Machine, shapes: Bundle, write: Write) -> None:
    """The kernel's flag says it at wait and poll; the next image is good."""
    cuda = Cuda(machine)
    engine = on_gpus.open(shapes.folder, write(scheduler="euler_a"), "cuda:0,cuda:1")
    sizes = engine.sizes()
    latents, stream = cuda.alloc(4 * sizes.latent_count), cuda.stream()
    target = {
        "device_latents": latents, "device_latents_count": sizes.latent_count, "stream": int(stream), "rgb": 0,
        "latents_out": 0,
    }  # fmt: skip
    noise = np.full(sizes.noise_count, 3e38, np.float32)  # finite, and too large once it is scaled and added
    for _ in range(2):
        request = engine.start(engine.call(PROMPT, noise=noise, **target))
        with pytest.raises(StatusError) as caught:
            on_gpus("wait", request, -1.0, None)
        assert caught.value.status == "NONFINITE"
        with pytest.raises(StatusError, match="NaN or infinity"):
            on_gpus("poll", request, None)
        on_gpus("release", request)
        engine.generate(PROMPT, seed=1, **target)
        assert np.isfinite(machine.view(latents, 4 * sizes.latent_count).view(np.float32)).all()
    engine.close()


def test_wrong_device_outputs(on_gpus: Library, machine: Machine, shapes: Bundle, write: Write) -> None:
    cuda = Cuda(machine)
    engine, on_cpu = (on_gpus.open(shapes.folder, write(), devices) for devices in ("cuda:0,cuda:1", "cpu*2"))
    sizes = engine.sizes()
    count, pointer, host = sizes.latent_count, cuda.alloc(4 * sizes.latent_count), cuda.pinned(4 * sizes.latent_count)
    stream = cuda.stream()
    cuda.on(1)
    elsewhere = cuda.alloc(sizes.rgb_bytes)
    good = {"device_latents": pointer, "device_latents_count": count, "stream": int(stream)}
    rgb = {"device_rgb": elsewhere, "device_rgb_bytes": sizes.rgb_bytes, "stream": int(stream)}
    for status, words, fields in (
        ("BUFFER", "device_latents is too small", good | {"device_latents_count": count - 1}),
        ("BUFFER", "device_rgb is too small", rgb | {"device_rgb_bytes": sizes.rgb_bytes - 1}),
        ("ARGUMENT", "device_latents is not memory of a GPU", good | {"device_latents": host}),
        ("ARGUMENT", "device_latents is not memory of a GPU", good | {"device_latents": 12345}),
        ("ARGUMENT", "must be on the same GPU", good | rgb),
        ("ARGUMENT", "stream must not be null", good | {"stream": 0}),
        ("ARGUMENT", "stream and event are for", {"stream": 1}),
        ("VERSION", "struct_size", good | {"struct_size": 1000}),
    ):
        with pytest.raises(StatusError, match=words) as caught:
            engine.generate(PROMPT, **fields)
        assert caught.value.status == status
    with pytest.raises(StatusError, match="need lanes on GPUs"):
        on_cpu.generate(PROMPT, **good)
    with pytest.raises(StatusError, match="cuStreamWaitEvent"):
        engine.generate(PROMPT, **good | {"stream": 4096})
    machine.forgive()
    request = engine.start(engine.call(PROMPT))
    with pytest.raises(StatusError, match="no output in device memory"):
        on_gpus("wait_enqueued", request, -1.0)
    on_gpus("release", request)
    first = Call.device_rgb.offset  # a program that was compiled with the first header
    engine.generate(PROMPT, struct_size=first, device_latents=12345)
    engine.close()
    on_cpu.close()


def test_a_callers_stream_that_does_not_come(on_gpus: Library, machine: Machine, shapes: Bundle, write: Write) -> None:
    """It holds no lane, and the request ends with words after the limit."""
    cuda = Cuda(machine)
    engine = on_gpus.open(shapes.folder, write(), "cuda:0", {"lane_timeout": "0.5"})
    engine.generate(PROMPT)  # takes the memory of this shape: where a device hangs, none can be freed
    sizes = engine.sizes()
    cuda.on(1)
    latents, stream = cuda.alloc(4 * sizes.latent_count), cuda.stream()
    machine.set("hangs", 1, device=1)
    machine.work(stream, lambda: None, [], [(latents, 4)], model=False)()
    request = engine.start(
        engine.call(PROMPT, device_latents=latents, device_latents_count=sizes.latent_count, stream=int(stream))
    )
    on_gpus("wait_enqueued", request, -1.0)
    engine.generate(PROMPT)
    with pytest.raises(StatusError, match=r"the caller's stream, with the output on it, did not end within 0\.5 s"):
        on_gpus("wait", request, -1.0, None)
    on_gpus("release", request)
    machine.set("hangs", 0, device=1)
    engine.generate(PROMPT)
    engine.close()
