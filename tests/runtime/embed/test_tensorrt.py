"""The library's TensorRT part: at NVIDIA's binary interface, on imaginary GPUs. Nothing here runs a real plan."""
# covers: runtime/embed/src/tensorrt.cc, runtime/embed/src/tensorrt_api.h, tests/runtime/embed/native/nvinfer.cc

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from engines.cuda import kernels
from engines.store import Bundle
from runtime.embed.building import onnxruntime_library
from tests.libcuda.conftest import Cuda
from tests.libcuda.machine import Machine
from tests.runtime.embed.building import built
from tests.runtime.embed.conftest import Write
from tests.runtime.embed.library import Library, StatusError
from tests.runtime.embed.test_gpu import ARCH

pytestmark = pytest.mark.imaginary_gpus
PROMPT = "a large red star at the left on blue background"
LIBRARIES = {
    "tensorrt": ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"),
    "tensorrt_rtx": ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"),
}


@pytest.fixture
def machine(rng: np.random.Generator) -> Machine:
    machine = Machine(2, seed=int(rng.integers(1000)), eager=int(rng.integers(3)))
    for outputs in range(1, 9):
        for width in (1, 2, 4):
            kernels.machine_code(kernels.Variant("float32", outputs, width), ARCH, kernels.CACHE)
    return machine


@pytest.fixture
def plan(shapes: Bundle, tmp_path: Path) -> Path:
    """A plan as native/nvinfer.cc takes it."""
    network = shapes.manifest.networks["denoiser"]
    inputs = [one.name for one in network.inputs]
    words = [str(onnxruntime_library()), str(shapes.folder / network.file.name), "sample", network.outputs[0].name]
    assert {one.dtype for one in network.inputs} == {"float32"}
    path = tmp_path / "denoiser.plan"
    path.write_text("\n".join([*words, *inputs]))
    return path


def bindings(name: str) -> ModuleType:
    """NVIDIA's compiled module, over our implementation of the interface that it calls."""
    for library in LIBRARIES[name]:
        ctypes.CDLL(str(built(f"tests/{library}")))
    package = importlib.util.find_spec(f"{name}_bindings")
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name(f"{name}.so")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_the_interface_is_the_one_that_nvidias_bindings_call(
    machine: Machine, shapes: Bundle, plan: Path, rng: np.random.Generator, name: str
) -> None:
    """Each function at its place, with its parameters: a run by the bindings is what ONNX Runtime computes."""
    trt = bindings(name)
    logger_type: Any = trt.ILogger

    class Logger(logger_type):  # type: ignore[misc]
        def __init__(self) -> None:
            logger_type.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.said.append(message)

    cuda = Cuda(machine)
    session = onnxruntime.InferenceSession(shapes.folder / shapes.manifest.networks["denoiser"].file.name)
    axes = shapes.manifest.latent_axes(32, 32, 3)
    given = {
        one.name: rng.standard_normal(one.resolve(axes)).astype(np.float32)
        for one in shapes.manifest.networks["denoiser"].inputs
    }
    expected = session.run(None, given)[0]
    logger = Logger()
    runtime = trt.Runtime(logger)
    assert runtime.deserialize_cuda_engine(b"/nowhere /nowhere a b") is None
    assert "/nowhere" in logger.said[0]
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    output = session.get_outputs()[0].name
    assert engine.get_tensor_dtype("sample") == trt.DataType.FLOAT
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    stream, pinned = cuda.stream(), cuda.pinned(1 << 16)
    for one, value in given.items():
        assert context.set_input_shape(one, value.shape)
        pointer = cuda.alloc(value.nbytes)
        ctypes.memmove(pinned, value.ctypes.data, value.nbytes)
        cuda("cuMemcpyHtoDAsync", pointer, pinned, value.nbytes, stream)
        cuda("cuStreamSynchronize", stream)
        context.set_tensor_address(one, pointer)
    assert not context.set_input_shape("sample", (17, *given["sample"].shape[1:]))
    size = context.update_device_memory_size_for_shapes()
    context.set_input_shape("sample", given["sample"].shape)
    context.set_device_memory(cuda.alloc(size), size)
    made = cuda.alloc(expected.nbytes)
    context.set_tensor_address(output, made)
    assert context.execute_async_v3(int(stream))
    cuda("cuStreamSynchronize", stream)
    np.testing.assert_allclose(
        machine.view(made, expected.nbytes).view(np.float32), expected.ravel(), rtol=1e-4, atol=1e-5
    )
    del context, engine, runtime


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_images_by_tensorrt(
    machine: Machine, shapes: Bundle, write: Write, plan: Path, rng: np.random.Generator, name: str
) -> None:
    """Equal to those of processor cores, also where a call is larger than the plan's largest batch."""
    library = Library(built())
    program = write(mode="aggressive", scheduler="euler_a", num_inference_steps=6)
    options = {"plan": str(plan), "tensorrt": str(built(f"tests/{LIBRARIES[name][0]}"))}
    here, there = (
        library.open(shapes.folder, program, "cpu*2"),
        library.open(shapes.folder, program, "cuda:0,cuda:1", options),
    )
    for images in (1, 2, 9):
        seed = int(rng.integers(2**63))
        expected = here.generate(PROMPT, seed=seed, images=images).latents
        made = there.generate(PROMPT, seed=seed, images=images).latents
        assert np.abs(made - expected).max() <= 1e-4 * np.abs(expected).max()
    here.close()
    there.close()
    assert not machine.live().get("allocation")


def test_the_real_library_refuses_what_is_no_plan(machine: Machine, shapes: Bundle, write: Write, plan: Path) -> None:
    """TensorRT-RTX itself, which needs no GPU for that: its runtime, its logger and the loading of plans."""
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    assert package is not None and package.origin is not None
    options = {"plan": str(plan), "tensorrt": str(Path(package.origin).with_name("libtensorrt_rtx.so.1"))}
    with pytest.raises(StatusError, match=r"TensorRT cannot load .*Serialization assertion") as caught:
        Library(built()).open(shapes.folder, write(), "cuda:0", options)
    assert caught.value.status == "DEVICE"


def test_what_cannot_be_opened(machine: Machine, shapes: Bundle, write: Write, plan: Path, tmp_path: Path) -> None:
    library, program = Library(built()), write()
    good = str(built("tests/libnvinfer.so.11"))
    wrong = tmp_path / "wrong.plan"
    wrong.write_text("/nowhere /nowhere a b")
    old = tmp_path / "libnvinfer.so.10"
    source = "int getInferLibVersion(void) { return 101300; } void *createInferRuntime_INTERNAL(void) { return 0; }"
    subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", str(old)], input=source, text=True, check=True)
    head = plan.read_text().split("\n")
    typed = tmp_path / "typed.plan"
    typed.write_text("\n".join([*head[:4], "int64", *head[4:]]))
    for status, words, options in (
        ("UNSUPPORTED", "name the file of the denoiser's plan with the option plan", {}),
        ("DEVICE", "TensorRT cannot be opened", {"plan": str(plan), "tensorrt": "/nowhere/libnvinfer.so.11"}),
        ("DEVICE", "is no TensorRT", {"plan": str(plan), "tensorrt": str(onnxruntime_library())}),
        ("VERSION", "is TensorRT 10.13", {"plan": str(plan), "tensorrt": str(old)}),
        ("UNSUPPORTED", "in the type of the program", {"plan": str(typed), "tensorrt": good}),
        ("BUNDLE", "nowhere", {"plan": "/nowhere", "tensorrt": good}),
        ("DEVICE", "TensorRT cannot load .*/nowhere.*build it again", {"plan": str(wrong), "tensorrt": good}),
    ):
        with pytest.raises(StatusError, match=words) as caught:
            library.open(shapes.folder, program, "cuda:0", options)
        assert caught.value.status == status
    assert not machine.live().get("allocation")
