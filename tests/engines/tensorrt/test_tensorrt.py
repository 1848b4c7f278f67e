"""TensorRT: real plans where there is no GPU, every call against the real bindings, images on imaginary GPUs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import load, nvidia
from engines.cuda import driver
from engines.devices import parse_devices
from engines.errors import BundleError, DeviceError
from engines.manifest import File
from engines.nvidia import Gpu
from engines.store import BUILD, Bundle
from engines.tensorrt import build, plan, run
from runtime.calibrate import calibrate
from runtime.pipeline import Pipeline
from tests import ROOT
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeTensorRT

NETWORKS = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
H200 = Gpu("NVIDIA H200", (9, 0), "580.1")
RTX = Gpu("NVIDIA GeForce RTX 4090", (8, 9), "580.1")
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
    "ICudaEngine": "create_execution_context create_runtime_config device_memory_size_v2",
    "IExecutionContext": "set_device_memory set_input_shape set_tensor_address execute_async_v3",
    "ILogger": "Severity log",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "ExecutionContextAllocationStrategy": "USER_MANAGED",
}
RTX_MEMBERS = {
    "IBuilderConfig": "num_compute_capabilities set_compute_capability set_flag",
    "BuilderFlag": "REQUIRE_USER_ALLOCATION",
    "IRuntimeConfig": "set_execution_context_allocation_strategy dynamic_shapes_kernel_specialization_strategy "
    "create_runtime_cache set_runtime_cache",
    "DynamicShapesKernelSpecializationStrategy": "EAGER",
    "IExecutionContext": "is_stream_capturable",
    "ComputeCapability": "SM75 SM80 SM86 SM89 SM120",
}


@pytest.fixture(scope="module")
def fp16_bundle() -> Bundle:
    """The embedded model in fp16."""
    command = [sys.executable, "-m", "export", "shapes", "--devices", "cuda:0"]
    subprocess.run(command, check=True, cwd=ROOT)
    return Bundle.open("shapes", BUILD, "fp16")


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


def test_a_card_that_the_package_does_not_build_for(fp16_bundle: Bundle) -> None:
    with pytest.raises(DeviceError, match=r"builds no plans for NVIDIA H200 \(9\.0\): install tensorrt instead"):
        build.build(fp16_bundle, "denoiser", H200, "tensorrt_rtx")


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
    text = "".join((ROOT / "engines" / "tensorrt" / f"{name}.py").read_text() for name in ("plan", "build", "run"))
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
    }
    assert used - known - ours == set()
    for member in known - set(RTX_MEMBERS["ComputeCapability"].split()):
        assert re.search(rf"\b{member}\b", text), f"{member} is not used any more"


# --- on imaginary GPUs -----------------------------------------------------------------------------------------------


class Imaginary:
    """Two GPUs, TensorRT, and a bundle whose plans are for them."""

    def __init__(self, bundle: Bundle) -> None:
        self.cuda = FakeCuda(2, seed=1)
        self.tensorrt = FakeTensorRT(self.cuda)
        self.bundle = bundle


@pytest.fixture
def imaginary(fp16_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imaginary]:
    folder = tmp_path / "shapes-fp16"
    shutil.copytree(fp16_bundle.folder, folder, ignore=shutil.ignore_patterns("plans"))
    machine = Imaginary(Bundle.open(str(folder)))
    for module in (plan, build, run):
        monkeypatch.setattr(module, "package", lambda runtime: machine.tensorrt)
    monkeypatch.setattr(driver, "available", lambda: None)
    for module in (nvidia, build, run):
        monkeypatch.setattr(module, "visible_gpus", lambda: [H200, H200])
    monkeypatch.setattr(build, "build", lambda bundle, network, *_: str(bundle.onnx(network)).encode())
    monkeypatch.setattr(driver, "_load", lambda: machine.cuda)
    monkeypatch.setattr("engines.cuda.backend.PAIR_BYTES", (64,))
    monkeypatch.setattr(
        "engines.cuda.kernels.machine_code", lambda variant, arch, cache: json.dumps(variant.__dict__).encode()
    )
    yield machine


def test_one_plan_per_kind_of_gpu(imaginary: Imaginary) -> None:
    lanes = parse_devices("cuda:0,cuda:1*3")
    built = load.build_missing(imaginary.bundle, lanes)
    assert list(built) == [f"{network} for NVIDIA H200 (9.0)" for network in NETWORKS]
    assert all(built.values())
    assert not any(load.build_missing(imaginary.bundle, lanes).values())
    fields = imaginary.bundle.plans()[built["denoiser for NVIDIA H200 (9.0)"].key].fields  # type: ignore[union-attr]
    assert (fields["gpu"], fields["capability"], fields["driver"]) == ("NVIDIA H200", "9.0", "580.1")


def test_a_plan_for_another_gpu_is_refused_with_the_repair(
    imaginary: Imaginary, monkeypatch: pytest.MonkeyPatch
) -> None:
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    for module in (nvidia, build, run):
        monkeypatch.setattr(module, "visible_gpus", lambda: [RTX])
    with pytest.raises(BundleError, match=r"gpu: built for NVIDIA H200, now .*4090.*make engines MODEL=shapes DEVICES"):
        load.load(imaginary.bundle, parse_devices("cuda:0"))


@pytest.mark.parametrize("devices", ["cuda:0", "cuda:0*3", "cuda:0,cuda:1"])
@pytest.mark.parametrize("mode", ["sequential", "aggressive"])
def test_images_on_gpus_are_those_of_the_processor(imaginary: Imaginary, devices: str, mode: str) -> None:
    load.build_missing(imaginary.bundle, parse_devices(devices))
    wanted = _generate(Pipeline.load("shapes", "cpu"), mode)
    pipeline = Pipeline.load(str(imaginary.bundle.folder), devices)
    got = _generate(pipeline, mode)
    again = _generate(pipeline, mode)
    pipeline.close()
    assert not imaginary.cuda.memory
    assert np.array_equal(got.latents, again.latents)
    difference = np.asarray(got.images[0], float) - np.asarray(wanted.images[0], float)
    assert np.sqrt(np.mean(difference**2)) < 2.5
    assert imaginary.tensorrt.loaded.count("denoiser") == (2 if "," in devices else 1), "weights once per device"
    assert imaginary.cuda.calls["cuGraphLaunch"] > 0
    assert got.report.critical_seconds is None
    assert got.report.staged == ()
    assert got.report.timeline and {(span.start, span.end) for span in got.report.timeline} == {(None, None)}
    assert len([span for span in got.report.timeline if span.kind == "call"]) == got.report.calls


def _generate(pipeline: Pipeline, mode: str) -> Any:
    prompt = "a large red star at the left on blue background"
    return pipeline.generate(prompt, mode=mode, k=2, num_inference_steps=8, seed=3, timeline=True)


def test_a_plan_that_is_too_big_says_how_big(imaginary: Imaginary) -> None:
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    imaginary.cuda.free = 10
    with pytest.raises(DeviceError, match=r"text_encoder needs 0\.00 GB on Imaginary GPU and 0\.00 of its 17\.18 GB"):
        load.load(imaginary.bundle, parse_devices("cuda:0"))


def test_auto_measures_and_chooses_on_gpus(imaginary: Imaginary) -> None:
    """The cost model is fed with call times of these lanes, whatever they are."""
    load.build_missing(imaginary.bundle, parse_devices("cuda:0*2"))
    model = str(imaginary.bundle.folder)
    for said in ("calibrated", "calibration is up to date"):
        assert calibrate(model, BUILD, "cuda:0*2", [6], 4.0, None, budget=600.0, images=1, again=False) == said
    pipeline = Pipeline.load(model, "cuda:0*2")
    report = pipeline.generate("a large red star at the left on blue background", num_inference_steps=6).report
    pipeline.close()
    assert report.mode == "sequential" and not report.warnings


def test_calls_beyond_the_plan_run_in_parts(imaginary: Imaginary) -> None:
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0")
    several = pipeline.generate(
        "a small green ring", mode="aggressive", k=2, num_inference_steps=4, num_images_per_prompt=9
    )
    one = pipeline.generate("a small green ring", mode="aggressive", k=2, num_inference_steps=4)
    pipeline.close()
    assert np.allclose(several.latents[0], one.latents[0], atol=0.02)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("cuda:2", r"there is no cuda:2: this machine has cuda:0 … cuda:1"),
    ],
)
def test_devices_that_cannot_be(imaginary: Imaginary, devices: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        load.build_missing(imaginary.bundle, parse_devices(devices))


@pytest.mark.parametrize("devices", ["cuda:0,cuda:1", "cuda:1,cuda:0"])
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("when", [0.0, 0.3, 1.0], ids=["text", "rounds", "pixels"])
def test_a_gpu_that_is_lost_costs_no_image(imaginary: Imaginary, devices: str, lost: int, when: float) -> None:
    """The image is made again on the other GPU, the report says so, and later images go on there.

    The first GPU has the text encoder and the VAE, too.
    """
    load.build_missing(imaginary.bundle, parse_devices("cuda:0,cuda:1"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), devices)
    _generate(pipeline, "aggressive")
    before = imaginary.cuda.work_done[lost]
    wanted = _generate(pipeline, "aggressive")
    done = imaginary.cuda.work_done[lost]
    imaginary.cuda.fault["lost"] = done + int(when * (done - before - 1))
    imaginary.cuda.breaking = lost
    got = _generate(pipeline, "aggressive")
    assert np.allclose(got.latents, wanted.latents, atol=0.02)
    assert np.abs(np.asarray(got.images[0], int) - np.asarray(wanted.images[0], int)).max() <= 2
    assert re.match(rf"cuda:{lost}/0 stopped working \(cu.* failed .* the device was lost", got.report.warnings[0])
    assert pipeline.lost == (f"cuda:{lost}/0",)
    assert not _generate(pipeline, "aggressive").report.warnings
    pipeline.close()


def test_onnx_runtime_on_a_gpu_never_falls_back_in_silence(imaginary: Imaginary) -> None:
    with pytest.raises(DeviceError, match="no working CUDA provider"):
        load.load(imaginary.bundle, parse_devices("cuda:0@onnxruntime"))


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
