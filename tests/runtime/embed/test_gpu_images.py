"""Whole images of the library on imaginary GPUs against its lanes on processor cores."""
# covers: runtime/embed/src/cuda_player.cc, tests/runtime/embed/native/imaginary.cc

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.cuda import kernels
from engines.store import Bundle
from tests.libcuda.machine import Machine
from tests.runtime.embed.building import built
from tests.runtime.embed.conftest import Write
from tests.runtime.embed.library import Library, StatusError
from tests.runtime.embed.test_gpu import ARCH

pytestmark = pytest.mark.imaginary_gpus
PROMPT = "a large red star at the left on blue background"


@pytest.fixture(scope="module")
def on_gpus() -> Library:
    """The library with networks for imaginary GPUs, and the kernels that programs here need."""
    library = Library(built() / "tests" / "libimaginary.so")
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
    plain = Library(built() / "libdriffusion.so")
    with pytest.raises(StatusError, match="runs no networks on GPUs") as caught:
        plain.open(shapes.folder, write(), "cuda:0")
    assert caught.value.status == "UNSUPPORTED"
    for devices in ("cuda:9", "cuda:", "cuda:0,cpu", "cuda:0*0", "cuda:0*65", "cuda:x", "cuda:0@fp16", "cudas:0"):
        with pytest.raises(StatusError, match="cuda"):
            plain.open(shapes.folder, write(), devices)
