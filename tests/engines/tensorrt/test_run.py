"""TensorRT's lanes on imaginary GPUs: whole images through the real cuda-python."""

from __future__ import annotations

import gc
import random
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import load, nvidia
from engines.cuda.driver import Driver
from engines.devices import parse_devices
from engines.errors import BundleError, DeviceError
from engines.store import BUILD, Bundle
from engines.tensorrt import build, plan, run
from runtime.calibrate import calibrate
from runtime.pipeline import Pipeline
from tests.engines.tensorrt.conftest import H200, NETWORKS, RTX
from tests.fake_tensorrt import FakeTensorRT
from tests.libcuda.machine import Machine

pytestmark = [pytest.mark.imaginary_gpus, pytest.mark.timeout(400)]  # the first one may have to export


class Imaginary:
    """Two GPUs, TensorRT, and a bundle whose plans are for them."""

    def __init__(self, bundle: Bundle) -> None:
        self.machine = Machine(2, seed=1)
        self.tensorrt = FakeTensorRT(self.machine)
        self.bundle = bundle


@pytest.fixture
def imaginary(fp16_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imaginary]:
    folder = tmp_path / "shapes-fp16"
    shutil.copytree(fp16_bundle.folder, folder, ignore=shutil.ignore_patterns("plans"))
    machine = Imaginary(Bundle.open(str(folder)))
    for module in (plan, build, run):
        monkeypatch.setattr(module, "package", lambda runtime: machine.tensorrt)
    for module in (nvidia, build, run):
        monkeypatch.setattr(module, "visible_gpus", lambda: [H200, H200])
    monkeypatch.setattr(build, "build", lambda bundle, network, *_: str(bundle.onnx(network)).encode())
    monkeypatch.setattr("engines.cuda.peers.PAIR_BYTES", (64,))
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


@pytest.mark.parametrize(
    ("devices", "peers"),
    [("cuda:0", True), ("cuda:0*4", True), ("cuda:0,cuda:1", True), ("cuda:0,cuda:1", False)],
    ids=["one lane", "four lanes", "peers", "no peers"],
)
@pytest.mark.parametrize("mode", ["sequential", "aggressive"])
def test_images_on_gpus_are_those_of_the_processor(imaginary: Imaginary, devices: str, mode: str, peers: bool) -> None:
    load.build_missing(imaginary.bundle, parse_devices(devices))
    imaginary.machine.set("peers", peers)
    wanted = _generate(Pipeline.load("shapes", "cpu"), mode)
    pipeline = Pipeline.load(str(imaginary.bundle.folder), devices)
    got = _generate(pipeline, mode)
    again = _generate(pipeline, mode)
    pipeline.close()
    assert imaginary.machine.live() == {}, "close leaves something behind"
    assert np.array_equal(got.latents, again.latents)
    difference = np.asarray(got.images[0], float) - np.asarray(wanted.images[0], float)
    assert np.sqrt(np.mean(difference**2)) < 2.5
    assert imaginary.tensorrt.loaded.count("denoiser") == (2 if "," in devices else 1), "weights once per device"
    assert imaginary.machine.calls("cuGraphLaunch") > 0
    assert got.report.critical_seconds is None
    assert got.report.staged == (() if peers else ("cuda:0→cuda:1", "cuda:1→cuda:0"))
    assert got.report.timeline and {(span.start, span.end) for span in got.report.timeline} == {(None, None)}
    assert len([span for span in got.report.timeline if span.kind == "call"]) == got.report.calls


def _generate(pipeline: Pipeline, mode: str) -> Any:
    prompt = "a large red star at the left on blue background"
    return pipeline.generate(prompt, mode=mode, k=2, num_inference_steps=8, seed=3, timeline=True)


def test_a_plan_that_is_too_big_says_how_big(imaginary: Imaginary) -> None:
    load.build_missing(imaginary.bundle, parse_devices("cuda:0"))
    imaginary.machine.set("free_bytes", 10)
    with pytest.raises(
        DeviceError, match=r"needs 0\.00 GB \(0\.00 GB weights of text_encoder, .* and 0\.00 of its 17\.18 GB are free"
    ):
        load.load(imaginary.bundle, parse_devices("cuda:0"))


def test_auto_measures_and_chooses_on_gpus(imaginary: Imaginary) -> None:
    """The cost model is fed with call times of these lanes, whatever they are."""
    load.build_missing(imaginary.bundle, parse_devices("cuda:0*2"))
    model = str(imaginary.bundle.folder)
    for said in ("calibrated", "calibration is up to date"):
        assert calibrate(model, BUILD, "cuda:0*2", [6], 4.0, None, budget=600.0, images=3, again=False) == said
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
    before = imaginary.machine.work_done(lost)
    wanted = _generate(pipeline, "aggressive")
    done = imaginary.machine.work_done(lost)
    imaginary.machine.set("lost_after", int(when * (done - before - 1)), device=lost)
    got = _generate(pipeline, "aggressive")
    assert np.allclose(got.latents, wanted.latents, atol=0.02)
    assert np.abs(np.asarray(got.images[0], int) - np.asarray(wanted.images[0], int)).max() <= 2
    assert re.match(rf"cuda:{lost}/0 stopped working \(cu.* failed .* the device was lost", got.report.warnings[0])
    assert pipeline.lost == (f"cuda:{lost}/0",)
    assert not _generate(pipeline, "aggressive").report.warnings
    pipeline.close()


@pytest.mark.parametrize("lost", [0, 1])
def test_a_gpu_that_was_lost_comes_back(imaginary: Imaginary, lost: int) -> None:
    """An error sticks to a context for as long as anything holds it: all of it is let go, and made again."""
    devices = "cuda:0,cuda:1"
    load.build_missing(imaginary.bundle, parse_devices(devices))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), devices)
    wanted = _generate(pipeline, "aggressive")
    imaginary.machine.set("lost_after", 5, device=lost)
    assert _generate(pipeline, "aggressive").report.warnings
    assert pipeline.lost == (f"cuda:{lost}/0",)
    imaginary.machine.set("lost_after", -1, device=lost)
    # a capture in which the device was lost ends with lanes that nobody joined
    broken = imaginary.machine.forgive()
    assert all(one.startswith("cuStreamEndCapture: a stream was given work") for one in broken), broken
    assert pipeline.revive()
    assert not pipeline.lost
    got = _generate(pipeline, "aggressive")
    assert not got.report.warnings
    assert np.array_equal(got.latents, wanted.latents)
    pipeline.close()
    assert imaginary.machine.live() == {}


@pytest.mark.slow
def test_many_requests_leave_no_more_than_few(imaginary: Imaginary) -> None:
    """Programs, graphs and execution contexts are bounded, whatever the modes, numbers of images and steps."""
    devices = "cuda:0*2,cuda:1*2"
    load.build_missing(imaginary.bundle, parse_devices(devices))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), devices)
    chance, counts = random.Random(0), []
    for number in range(40):
        mode = chance.choice(["sequential", "aggressive", "conservative", "srds"])
        images, steps = 1 + number % 3, chance.randint(4, 9)
        pipeline.generate(
            "a small green ring", mode=mode, k=chance.choice([2, 3]) if mode != "sequential" else None,
            num_inference_steps=steps, num_images_per_prompt=images, seed=number,
        )  # fmt: skip
        gc.collect()
        counts.append((len(imaginary.tensorrt.contexts), imaginary.machine.live().get("executable graph", 0)))
    pipeline.close()
    contexts, graphs = (max(column) for column in zip(*counts, strict=True))
    assert contexts <= 60 and graphs <= 96, counts
    gc.collect()
    assert imaginary.machine.live().get("executable graph", 0) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_images_at_the_same_time(imaginary: Imaginary, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that capture, allocate, make execution contexts and wait at the same time, each with its own sizes.

    They take turns as often as can be: at every driver call.
    """
    call = Driver.__call__

    def yielding(self: Driver, name: str, *arguments: Any) -> Any:
        time.sleep(0)
        return call(self, name, *arguments)

    monkeypatch.setattr(Driver, "__call__", yielding)
    load.build_missing(imaginary.bundle, parse_devices("cuda:0*2,cuda:1*2"))
    pipeline = Pipeline.load(str(imaginary.bundle.folder), "cuda:0*2,cuda:1*2")
    prompts = ["a small green ring", "a large red star", "a large blue cross on white background"]

    def image(number: int) -> Any:
        return pipeline.generate(
            prompts[number % 3], mode=("aggressive", "sequential", "conservative")[(number + seed) % 3], k=2,
            num_inference_steps=6, seed=number, num_images_per_prompt=1 + number % 3,
        ).latents  # fmt: skip

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(image, range(6)))
    alone = [image(number) for number in range(6)]
    pipeline.close()
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(one, other, atol=0.02)


def test_onnx_runtime_on_a_gpu_never_falls_back_in_silence(imaginary: Imaginary) -> None:
    with pytest.raises(DeviceError, match="no working CUDA provider"):
        load.load(imaginary.bundle, parse_devices("cuda:0@onnxruntime"))
