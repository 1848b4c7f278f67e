"""The runtimes' parts: real builders without a GPU, and every way to be not possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.gpu import runtimes
from bench.gpu.device import DeviceBench
from bench.gpu.parts import NotPossibleError
from engines.cuda.driver import Driver
from tests.bench.gpu.conftest import TimedCuda

Play = Callable[..., list[dict[str, Any]]]


class Context:
    """An execution context on the imaginary machine: y = ReLU(x · W), wrong by `off`."""

    def __init__(self, cuda: TimedCuda, weights: Any, off: float = 0.0) -> None:
        self.cuda, self.weights, self.off, self.pointers = cuda, weights, off, dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> None:
        self.shape = shape

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.pointers[name] = pointer

    def execute_async_v3(self, stream: int) -> bool:
        def work() -> None:
            x, y = (
                self.cuda.view(self.pointers[name], 2 * self.shape[0] * self.shape[1]).view(np.float16)
                for name in ("x", "y")
            )
            product = x.reshape(self.shape).astype(np.float32) @ self.weights.astype(np.float32)
            y[:] = (np.maximum(product, 0) + self.off).astype(np.float16).ravel()

        self.cuda.submit(next(one for one in self.cuda.streams if int(one) == stream), work)
        return True


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_plan_is_compared_and_captured(cuda: TimedCuda, tmp_path: Path, off: float) -> None:
    weights = np.random.default_rng().standard_normal((runtimes.WIDTH, runtimes.WIDTH)).astype(np.float16) / 8
    bench = DeviceBench(Driver(cuda), tmp_path, "float16")
    row = runtimes._runs(Context(cuda, weights, off), bench, weights)
    assert row == {"right": off == 0, "captured": off == 0}
    bench.close()


def test_real_plans_are_built_for_every_target(cuda: TimedCuda, tmp_path: Path) -> None:
    """Without a driver they are not loaded, and the part says so and fails: it is not the machine that is missing."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert runtimes._targets(trt, (8, 9)) == ["SM89", "CURRENT", None]
    assert runtimes._targets(trt, (9, 0)) == ["CURRENT", None]
    bench = DeviceBench(Driver(cuda), tmp_path, "float16")
    weights = np.ones((runtimes.WIDTH, runtimes.WIDTH), np.float16)
    row = runtimes._one_plan(trt, "SM89", bench, weights)
    assert row["built"]
    assert not row.get("loaded")
    bench.close()


def test_names_of_the_real_packages() -> None:
    for name in ("tensorrt_rtx",):
        trt = pytest.importorskip(name)
        members = "set_input_shape set_tensor_address execute_async_v3"
        assert all(hasattr(trt.IExecutionContext, member) for member in members.split())
        for member in ("add_input", "add_constant", "add_matrix_multiply", "add_activation", "mark_output"):
            assert hasattr(trt.INetworkDefinition, member)
        assert hasattr(trt.ICudaEngine, "device_memory_size_v2")
        assert hasattr(trt.MatrixOperation, "NONE")
        assert hasattr(trt.ActivationType, "RELU")


def test_what_is_not_installed(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for slug, message in (
        ("tensorrt-loads", "tensorrt is not installed"),
        ("tensorrt-rtx-loads", "tensorrt_rtx is not installed"),
        ("onnx-runtime-loads", "onnxruntime is not installed"),
        ("shapes-on-tensorrt", "tensorrt is not installed"),
        ("shapes-on-tensorrt-rtx", "tensorrt_rtx is not installed"),
    ):
        with pytest.raises(NotPossibleError, match=message):
            play(slug)


def test_an_onnx_runtime_without_cuda(play: Play) -> None:
    for slug in ("onnx-runtime-loads", "shapes-on-onnx-runtime"):
        with pytest.raises(NotPossibleError, match="was built without CUDA"):
            play(slug)
