"""TensorRT: real plans where there is no GPU, every call against the real bindings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from engines.cuda import driver
from engines.errors import DeviceError
from engines.manifest import File
from engines.nvidia import Gpu
from engines.store import Bundle
from engines.tensorrt import build
from tests import ROOT
from tests.engines.tensorrt.conftest import H200, NETWORKS, RTX

NEXT = Gpu("NVIDIA next", (13, 0), "580.1")
# what engines/tensorrt uses of each class, in both packages
MEMBERS = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "desc",
    "IBuilderConfig": "add_optimization_profile progress_monitor create_timing_cache set_timing_cache",
    "IOptimizationProfile": "set_shape",
    "ITimingCache": "serialize",
    "IProgressMonitor": "phase_start step_complete phase_finish",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "create_execution_context create_runtime_config",
    "IExecutionContext": "set_device_memory set_input_shape set_tensor_address execute_async_v3 "
    "update_device_memory_size_for_shapes",
    "ILogger": "Severity log",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
}
RTX_MEMBERS = {
    "IBuilderConfig": "num_compute_capabilities set_compute_capability set_flag",
    "BuilderFlag": "REQUIRE_USER_ALLOCATION",
    "IRuntimeConfig": "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy "
    "create_runtime_cache set_runtime_cache",
    "IRuntimeCache": "serialize deserialize",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "IExecutionContext": "is_stream_capturable",
    "ComputeCapability": "CURRENT SM75 SM80 SM86 SM89 SM120",
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("capability", [(8, 9), (12, 0)], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_real_plans_are_built_without_a_gpu(fp16_bundle: Bundle, network: str, capability: tuple[int, int]) -> None:
    phases: list[tuple[str, int, int]] = []
    plan_bytes = build.build(
        fp16_bundle, network, Gpu("some", capability, "580"), "tensorrt_rtx", lambda *step: phases.append(step)
    )
    assert len(plan_bytes) > 1e6
    assert any(done == steps > 1 for _, done, steps in phases), "no progress was shown"


@pytest.mark.parametrize(
    ("gpu", "message"),
    [(H200, r"runs no plans on NVIDIA H200 \(9\.0\): install tensorrt instead, pip install .*trt"),
     (NEXT, r"builds no plans for NVIDIA next \(13\.0\) on another machine: build on one that has it, or install")],
    ids=["data centre", "later"],
)  # fmt: skip
def test_a_card_that_the_package_does_not_build_for(fp16_bundle: Bundle, gpu: Gpu, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        build.build(fp16_bundle, "denoiser", gpu, "tensorrt_rtx")


@pytest.mark.parametrize(("gpu", "target"), [(NEXT, "CURRENT"), (RTX, "SM89")], ids=str)
def test_a_card_that_is_here_is_built_for_by_the_package(
    gpu: Gpu, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the package has no name for its kind: then whatever it finds in this machine."""
    import tensorrt_rtx as trt

    monkeypatch.setattr(build, "visible_gpus", lambda: [gpu])
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    build._target(trt, config, gpu)
    assert config.get_compute_capability(0) == getattr(trt.ComputeCapability, target)


def test_too_little_memory_says_how_much(fp16_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "HOST_BYTES", 10**15)
    with pytest.raises(DeviceError, match=r"needs about 1000000\.0 GB of memory and .* GB are free"):
        build.build(fp16_bundle, "denoiser", RTX, "tensorrt_rtx")


def test_a_file_that_is_no_network(fp16_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "denoiser.onnx"
    path.write_bytes(b"no network")
    broken = fp16_bundle.manifest.networks["denoiser"].model_copy(update={"file": File.of(path)})
    bundle = Bundle(tmp_path, fp16_bundle.manifest.model_copy(update={"networks": {"denoiser": broken}}))
    with pytest.raises(DeviceError, match="TensorRT cannot read"):
        build.build(bundle, "denoiser", RTX, "tensorrt_rtx")


def test_names_of_tensorrt_rtx() -> None:
    import tensorrt_rtx

    _check_names(tensorrt_rtx)
    for name, members in RTX_MEMBERS.items():
        assert set(members.split()) <= set(dir(getattr(tensorrt_rtx, name)))


def test_names_of_tensorrt_11(tmp_path: Path) -> None:
    """The real bindings of the other package, over libraries that only have their entry points."""
    compiler = shutil.which("gcc") or pytest.fail("install gcc")
    functions = (
        "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
        "createNvOnnxParser_INTERNAL createNvOnnxParserRefitter_INTERNAL getBuilderPluginRegistry getPluginRegistry "
        "getNvOnnxParserVersion initLibNvInferPlugins"
    )
    source = tmp_path / "stub.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in functions.split()))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        soname = f"lib{library}.so.11"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{soname}", str(source), "-o", str(tmp_path / soname)]
        subprocess.run(command, check=True)
    code = """
        import tensorrt_bindings
        from tests.engines.tensorrt.test_tensorrt import _check_names
        _check_names(tensorrt_bindings)
        assert not hasattr(tensorrt_bindings, "ComputeCapability")
    """
    environment = {
        "LD_LIBRARY_PATH": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def _check_names(module: Any) -> None:
    for name, members in MEMBERS.items():
        missing = set(members.split()) - set(dir(getattr(module, name)))
        assert not missing, f"{module.__name__}.{name} has no {missing}"


def test_the_names_are_those_that_are_used() -> None:
    """Every call on a TensorRT object in engines/tensorrt is in the tables above, and the other way round."""
    text = "".join(
        (ROOT / "engines" / "tensorrt" / f"{name}.py").read_text() for name in ("plan", "build", "contexts", "run")
    )
    objects = (
        r"(?:builder|config|network|parser|profile|cache|context|engine\.engine|self\._runtime|self\.engine|graph)"
    )
    used = set(re.findall(objects + r"\.([a-z][a-z_0-9]+)", text[: text.index("class EngineSession")]))
    known = {member for table in (MEMBERS, RTX_MEMBERS) for members in table.values() for member in members.split()}
    ours = {
        "pointer",
        "dtype",
        "is_file",
        "scratch_bytes",
        "bind",
        "device",
        "driver",
        "engine",
        "manifest",
        "inputs",
        "startswith",
        "held",
        "name",
        "said",
        "get",
        "size",
        "point",
        "run",
        "capturable",
        "block",
        "work_in",
    }
    assert used - known - ours == set()
    for member in known - set(RTX_MEMBERS["ComputeCapability"].split()):
        assert re.search(rf"\b{member}\b", text), f"{member} is not used any more"


def test_without_a_gpu_every_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if driver.available() is None:
        pytest.skip("this machine has a GPU")
    for command in (
        ["-m", "engines", "build", "shapes", "--devices", "cuda:0"],
        ["-m", "runtime", "a star", "--devices", "cuda:0"],
    ):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert re.match(r"error: there is no cuda:0: .*--devices auto or cpu", done.stderr), done.stderr
