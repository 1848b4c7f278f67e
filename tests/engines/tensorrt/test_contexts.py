"""Contexts: one per shape, in memory as large as the shape needs, bounded; and kernels that are compiled once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from engines import load
from engines.devices import parse_devices
from engines.errors import DeviceError
from engines.tensorrt import contexts
from engines.tensorrt.contexts import Engine, read_digested, write_digested
from runtime.pipeline import Pipeline
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


def test_lanes_have_memory_for_the_shapes_that_are_used(imaginary: Imaginary) -> None:
    """A start takes what images of the usual size need, not what the largest batch of the plan would."""
    row = 1 << 20

    def scratch(network: str, shapes: dict[str, tuple[int, ...]]) -> int:
        return row * shapes["sample"][0] if network == "denoiser" else 4096

    imaginary.tensorrt.scratch = scratch
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0*2")
    lanes = pipeline.machine.engines._networks  # type: ignore[attr-defined]
    assert [sum(block.size for block in lane._contexts._blocks) for lane in lanes] == [row, row]
    images(pipeline, 4)
    assert all(lane._contexts._blocks[-1].size == 8 * row for lane in lanes)
    pipeline.close()


def test_a_start_that_does_not_fit_says_what_needs_how_much(imaginary: Imaginary) -> None:
    imaginary.tensorrt.scratch = lambda network, shapes: (1 << 20) if network == "denoiser" else 4096
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    imaginary.machine.set("free_bytes", 5 << 20)
    bundle = imaginary.bundle
    with pytest.raises(DeviceError, match=r"needs 0\.0\d GB \(.*GB scratch of lane 0, .*lane 5.*use fewer lanes"):
        load.load(bundle, parse_devices("cuda:0*6"))


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
