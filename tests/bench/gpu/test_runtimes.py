"""The runtimes' parts: real builders without a GPU, and every way to be not possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.gpu import runtimes
from bench.gpu.device import DeviceBench
from bench.gpu.parts import NotPossibleError
from engines.cuda.driver import Driver
from tests.libcuda.machine import KERNELS, Machine

pytestmark = pytest.mark.imaginary_gpus
Play = Callable[..., list[dict[str, Any]]]


class Context:
    """An execution context on the imaginary machine: y = ReLU(x · W), wrong by `off`."""

    def __init__(self, machine: Machine, weights: Any, off: float = 0.0) -> None:
        self.machine, self.weights, self.off, self.pointers = machine, weights, off, dict[str, int]()

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> None:
        self.shape = shape

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.pointers[name] = pointer

    def execute_async_v3(self, stream: int) -> bool:
        size = 2 * self.shape[0] * self.shape[1]

        def work() -> None:
            x, y = (self.machine.view(self.pointers[name], size).view(np.float16) for name in ("x", "y"))
            product = x.reshape(self.shape).astype(np.float32) @ self.weights.astype(np.float32)
            y[:] = (np.maximum(product, 0) + self.off).astype(np.float16).ravel()

        enqueue = self.machine.work(stream, work, [(self.pointers["x"], size)], [(self.pointers["y"], size)])
        return not enqueue()


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_plan_is_compared_and_captured(machine: Machine, off: float) -> None:
    weights = np.random.default_rng().standard_normal((runtimes.WIDTH, runtimes.WIDTH)).astype(np.float16) / 8
    bench = DeviceBench(Driver(), KERNELS, "float16")
    row = runtimes._runs(Context(machine, weights, off), bench, weights)
    assert row == {"right": off == 0, "captured": off == 0}
    bench.close()


def test_real_plans_are_built_for_every_target(machine: Machine) -> None:
    """Without a driver they are not loaded, and the part says so and fails: it is not the machine that is missing."""
    trt = pytest.importorskip("tensorrt_rtx")
    assert runtimes._targets(trt, (8, 9)) == ["SM89", "CURRENT", None]
    assert runtimes._targets(trt, (9, 0)) == ["CURRENT", None]
    bench = DeviceBench(Driver(), KERNELS, "float16")
    weights = np.ones((runtimes.WIDTH, runtimes.WIDTH), np.float16)
    row = runtimes._one_plan(trt, "SM89", bench, weights)
    assert row["built"]
    assert not row.get("loaded")
    bench.close()


@pytest.mark.parametrize(
    ("reason", "kind"),
    [("Error Code 6: TensorRT-RTX does not support this compute capability, so", NotPossibleError),
     ("out of memory", AssertionError)],
    ids=["unsupported", "broken"],
)  # fmt: skip
def test_a_card_that_a_package_does_not_support_is_no_failure(
    play: Play, monkeypatch: pytest.MonkeyPatch, reason: str, kind: type[Exception]
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(runtimes, "_one_plan", lambda *asked: {"built": True, "reason": reason})
    with pytest.raises(
        kind, match=r"supports no cards of capability \d+\.\d" if kind is NotPossibleError else "no plan"
    ):
        play("tensorrt-rtx-loads")


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
