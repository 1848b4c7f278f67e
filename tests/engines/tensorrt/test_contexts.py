"""Contexts: one per shape, in memory as large as the shape needs, bounded; and kernels that are compiled once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from engines import load
from engines.devices import parse_devices
from engines.errors import DeviceError
from engines.store import Plan
from engines.tensorrt import build, contexts
from engines.tensorrt.contexts import Engine, read_digested, write_digested
from runtime.pipeline import Pipeline
from tests import ROOT
from tests.engines.tensorrt.conftest import NETWORKS
from tests.engines.tensorrt.test_run import Imaginary
from tests.engines.tensorrt.test_run import imaginary as imaginary
from tests.libcuda.machine import Machine

pytestmark = pytest.mark.imaginary_gpus


def images(pipeline: Pipeline, count: int) -> Any:
    return pipeline.generate("a small green ring", mode="aggressive", k=2, num_inference_steps=4,
                             num_images_per_prompt=count)  # fmt: skip


def test_contexts_do_not_grow_with_changes_of_shape(imaginary: Imaginary) -> None:
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0*2")
    found = []
    for _ in range(3):
        for count in (1, 2, 3):
            images(pipeline, count)
        found.append(len(imaginary.tensorrt.contexts))
    assert found[0] == found[1] == found[2]
    assert pipeline.machine.lanes.counts()["contexts"] <= 2 * contexts.CONTEXTS
    pipeline.close()


def test_the_longest_unused_contexts_are_let_go(imaginary: Imaginary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while graphs need them, which keep theirs; images stay right, and all is freed at the end."""
    monkeypatch.setattr(contexts, "CONTEXTS", 1)
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0*2")
    wanted = {count: images(pipeline, count).latents for count in (1, 2, 3)}
    for count in (3, 1, 2, 1, 3):
        assert np.array_equal(images(pipeline, count).latents, wanted[count])
    pipeline.close()
    assert not {"allocation", "pinned allocation", "stream", "event", "context reference"} & set(
        imaginary.machine.live()
    )


ROW = 1 << 20


def per_row(network: str, shapes: dict[str, tuple[int, ...]]) -> int:
    """Scratch memory that grows with a call's rows."""
    return ROW * shapes["sample"][0] if network == "denoiser" else 4096


def scratch(pipeline: Pipeline) -> list[list[int]]:
    """The bytes of every block of every lane."""
    lanes = pipeline.machine.engines._networks  # type: ignore[attr-defined]
    return [[block.size for block in lane._contexts._blocks] for lane in lanes]


def test_lanes_have_memory_for_the_shapes_that_are_used(imaginary: Imaginary) -> None:
    """A start takes what images of the usual size need, not what the largest batch of the plan would.

    What larger images take replaces that, and graphs that were captured in it are captured again.
    """
    imaginary.tensorrt.scratch = per_row
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0*2")
    assert scratch(pipeline) == [[ROW], [ROW]]
    wanted = [images(pipeline, 1).latents for _ in range(2)][-1]
    images(pipeline, 4)
    for _ in range(2):
        assert np.array_equal(images(pipeline, 1).latents, wanted)
    assert scratch(pipeline) == [[8 * ROW], [8 * ROW]]
    pipeline.close()
    assert imaginary.machine.live() == {}


def test_where_memory_is_short_smaller_scratch_makes_room_for_larger(imaginary: Imaginary) -> None:
    """A card that cannot hold both at the same time still makes the larger image, and the smaller one after it."""
    imaginary.tensorrt.scratch = lambda network, shapes: 64 * per_row(network, shapes)
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0*2")
    wanted = images(pipeline, 1).latents
    imaginary.machine.set("free_bytes", 2 * 4 * 64 * ROW + (40 << 20))
    assert images(pipeline, 2).latents.shape[0] == 2
    assert scratch(pipeline) == [[4 * 64 * ROW]] * 2
    assert np.array_equal(images(pipeline, 1).latents, wanted)
    with pytest.raises(DeviceError, match="memory"):
        images(pipeline, 3)
    assert np.array_equal(images(pipeline, 1).latents, wanted)
    pipeline.close()
    assert imaginary.machine.live() == {}


# Stable Diffusion XL in fp16 at 1024 × 1024, with plans as they were measured. Scratch memory of one row, for a runtime
# that fuses nothing: in the UNet the attention of 10 heads over 64 × 64 positions, before and after softmax, beside 12
# skipped activations of 320 × 128 × 128; in the VAE, which stays in float32, three activations of 256 × 1024 × 1024
MEASURED = json.loads((ROOT / "bench/results/export.json").read_text())["rows"]
PLANS = {row["network"]: row["plan_bytes"] for row in MEASURED if row["model"] == "sdxl-random"}
VAE = 3 * 256 * 1024**2 * 4
SDXL = {"text_encoder": 50_000_000, "denoiser": 2 * (2 * 10 * 4096**2 + 12 * 320 * 128**2), "vae_decoder": VAE,
        "vae_encoder": VAE}  # fmt: skip


@pytest.mark.parametrize(("gigabytes", "fits"), [(24, True), (14, False)])
def test_a_card_of_24_gb_holds_sdxl_on_two_lanes(
    imaginary: Imaginary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gigabytes: int, fits: bool
) -> None:
    """Computed, said part by part and then really taken, no more; a smaller card is refused and left empty."""
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    monkeypatch.setattr(Plan, "bytes", property(lambda plan: PLANS[plan.network]))
    imaginary.tensorrt.weights = PLANS.__getitem__
    imaginary.tensorrt.scratch = lambda network, shapes: SDXL[network] * next(iter(shapes.values()))[0]
    for what in ("free_bytes", "total_bytes"):
        imaginary.machine.set(what, int(gigabytes * 0.97e9))  # without the driver's own
    lanes = parse_devices("cuda:0*2")
    if fits:
        caplog.set_level("INFO", "engines.tensorrt.budget")
        engines = load.load(imaginary.bundle, lanes)
        free, total = engines._driver("cuMemGetInfo")  # type: ignore[attr-defined]
        engines.close()
        needed, *parts = (float(one) for one in re.findall(r"([\d.]+) GB", caplog.messages[-1]))
        assert parts[: len(PLANS)] == [round(PLANS[name] / 1e9, 2) for name in NETWORKS]
        assert f"{SDXL['denoiser'] / 1e9:.2f} GB scratch of lane 1" in caplog.messages[-1]
        assert abs((total - free) / 1e9 - needed) < 0.05, (total - free, caplog.messages)
    else:
        with pytest.raises(DeviceError, match=r"needs 1\d\.\d\d GB .*of its 13\.58 GB are free: end other programs"):
            load.load(imaginary.bundle, lanes)
    assert imaginary.machine.live() == {}


def test_what_can_never_fit_is_not_compiled(imaginary: Imaginary, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_nothing(*_: Any) -> bytes:
        pytest.fail("it compiles")

    monkeypatch.setattr(build, "build", build_nothing)
    imaginary.machine.set("total_bytes", 10 << 20)
    with pytest.raises(DeviceError, match=r"will need at least 0\.0\d GB \(.*and it has 0\.01 GB: use a smaller model"):
        load.build_missing(imaginary.bundle, parse_devices("cuda:0*2"))
    assert imaginary.machine.live() == {}


def test_a_start_that_does_not_fit_says_what_needs_how_much(imaginary: Imaginary) -> None:
    imaginary.tensorrt.scratch = per_row
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    imaginary.machine.set("free_bytes", 5 << 20)
    bundle = imaginary.bundle
    with pytest.raises(DeviceError, match=r"needs 0\.0\d GB \(.*GB scratch of lane 0, .*lane 5.*use fewer lanes"):
        load.load(bundle, parse_devices("cuda:0*6"))
    assert imaginary.machine.live() == {}


class Cache:
    """TensorRT-RTX's compiled kernels."""

    known = b""

    def deserialize(self, content: bytes) -> bool:
        self.known = content
        return content != b"another version"

    def serialize(self) -> bytes:
        return self.known


class Rtx:
    """The parts of TensorRT-RTX that opening an engine needs; `compiled` lists what no cache knew."""

    IRuntimeCache, ILogger = Cache, object
    compiled: ClassVar[list[bytes]] = []

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = 0

    class DynamicShapesKernelSpecializationStrategy:
        EAGER = 0

    def Runtime(self, logger: Any) -> Any:
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return self

    def create_runtime_config(self) -> Any:
        return self

    def set_execution_context_allocation_strategy(self, strategy: int) -> None:
        assert strategy == 0

    def create_runtime_cache(self) -> Cache:
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> None:
        self.cache = cache

    def create_execution_context(self, settings: Any) -> Any:
        self.shape = b""
        return self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape += f"{name}{shape};".encode()
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self.shape not in self.cache.known:
            self.compiled.append(self.shape)
            self.cache.known += self.shape
        return 512


def test_kernels_that_were_compiled_once_are_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contexts, "make_logger", lambda trt, messages: None)
    from engines.cuda.driver import Driver

    Machine(1)
    driver, path = Driver(), tmp_path / "jit.cache"

    def opened() -> Engine:
        return Engine(driver, driver.device(0), b"plan", "denoiser", Rtx(), path)

    Rtx.compiled.clear()
    for expected in (1, 1):
        assert opened().context((("sample", (1, 4)),)).size == 512
        assert len(Rtx.compiled) == expected
    opened().context((("sample", (2, 4)),))
    opened().context((("sample", (1, 4)),))
    assert len(Rtx.compiled) == 2
    path.write_bytes(path.read_bytes()[:-1])
    opened().context((("sample", (1, 4)),))
    assert len(Rtx.compiled) == 3 and "was altered or truncated" in caplog.text
    write_digested(path, b"another version")
    opened().context((("sample", (1, 4)),))
    assert "another version of TensorRT-RTX" in caplog.text
    assert read_digested(path).startswith(b"another version")
    assert [one.name for one in tmp_path.iterdir()] == ["jit.cache"]
