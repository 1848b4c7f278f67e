"""OpenVINO's lanes: equal to torch and to ONNX Runtime, whatever the rows, sizes and lanes; clear about bad input."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import openvino
from engines.base import Array, Branch
from engines.devices import parse_devices, precision
from engines.errors import BundleError, DeviceError
from engines.load import build_missing, check, load
from engines.manifest import DENOISER
from engines.openvino import BATCHES, DYNAMIC, Compiled, Shape, parts, plan_fields
from engines.runtimes import RUNTIMES, Runtime
from engines.store import Bundle, plan_key
from export.spec import EMBEDDED
from runtime import Pipeline
from tests import ROOT
from tests.copies import DAMAGES, contents

pytestmark = pytest.mark.skipif(not RUNTIMES["openvino"].installed, reason="the extra openvino is not installed")
DEVICES = "cpu*2@openvino"
PROMPT = "a large red star at the left on blue background"
BF16 = "BF16" in openvino._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") if not pytestmark.args[0] else False


@pytest.fixture(scope="module")
def built(shapes: Bundle) -> Bundle:
    """`shapes` compiled by OpenVINO, in the bundle of `make engines`: nothing of it changes."""
    build_missing(shapes, parse_devices(DEVICES))
    return shapes


@pytest.fixture(scope="module")
def lanes(built: Bundle) -> Iterator[Pipeline]:
    with Pipeline(built, DEVICES) as pipeline:
        yield pipeline


@pytest.fixture
def denoiser(built: Bundle) -> Iterator[Compiled]:
    compiled = Compiled(built, DENOISER, "fp32", 2, 2)
    yield compiled
    compiled.close()


def inputs(bundle: Bundle, rng: np.random.Generator, rows: int, sides: tuple[int, int] = (16, 16)) -> dict[str, Array]:
    axes = {"batch": rows, "height": sides[0], "width": sides[1]}
    found = {
        one.name: rng.standard_normal(one.resolve(axes), np.float32)
        for one in bundle.manifest.networks[DENOISER].inputs
    }
    return found | {"timestep": rng.uniform(0, 1000, rows).astype(np.float32)}


def of_torch(given: dict[str, Array]) -> Array:
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(EMBEDDED["shapes"], subfolder="unet")
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    with torch.no_grad():
        found = unet(tensors["sample"], tensors["timestep"], tensors["encoder_hidden_states"]).sample
    result: Array = found.numpy()
    return result


def share(actual: Array, expected: Array) -> float:
    """The largest error by the scale of what is expected."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 19])
def test_any_number_of_rows_equals_torch(
    rows: int, denoiser: Compiled, built: Bundle, rng: np.random.Generator
) -> None:
    given = inputs(built, rng, rows)
    output = np.full_like(given["sample"], np.nan)
    denoiser.bind(given, output)()
    assert share(output, of_torch(given)) < 1e-5


@pytest.mark.parametrize("sides", [(8, 8), (16, 20), (32, 12)])
def test_other_sizes_equal_torch(
    sides: tuple[int, int], denoiser: Compiled, built: Bundle, rng: np.random.Generator
) -> None:
    given = inputs(built, rng, 3, sides)
    output = np.full_like(given["sample"], np.nan)
    denoiser.bind(given, output)()
    assert share(output, of_torch(given)) < 1e-5


@pytest.mark.skipif(not BF16, reason="this processor has no bf16")
def test_bf16_is_used_only_when_it_is_asked_for(built: Bundle, rng: np.random.Generator) -> None:
    build_missing(built, parse_devices("cpu@openvino+bf16"))
    given = inputs(built, rng, 2)
    expected, errors = of_torch(given), {}
    for kind in ("fp32", "bf16"):
        compiled = Compiled(built, DENOISER, kind, 1, 1)
        output = np.full_like(given["sample"], np.nan)
        compiled.bind(given, output)()
        errors[kind] = share(output, expected)
        compiled.close()
    assert errors["fp32"] < 1e-5 and 1e-4 < errors["bf16"] < 1e-1
    assert precision(parse_devices("cpu@openvino+bf16")) == "fp32"  # OpenVINO converts what is exported in fp32


@pytest.mark.parametrize("rows", range(1, 40))
def test_parts_are_the_rows_in_few_calls(rows: int) -> None:
    assert sum(parts(rows, BATCHES)) == rows
    assert len(parts(rows, BATCHES)) == rows // 8 + (rows % 8).bit_count()


def test_calls_do_not_depend_on_arrays_that_others_still_hold(
    denoiser: Compiled, built: Bundle, rng: np.random.Generator
) -> None:
    """Weights are pages of the plan's file, and the arrays of a call are its own memory: both must stay."""
    given = inputs(built, rng, 2)
    output = np.full_like(given["sample"], np.nan)
    expected = of_torch(given)
    run = denoiser.bind({name: value.copy() for name, value in given.items()}, output)
    gc.collect()
    _ = [np.full(1_000_000, np.nan, np.float32) for _ in range(50)]  # where the arrays were, if they are gone
    run()
    assert share(output, expected) < 1e-5


def test_lanes_run_different_calls_at_the_same_time(built: Bundle, rng: np.random.Generator) -> None:
    engines = load(built, parse_devices("cpu*3@openvino"))
    backends = [engines.backend, engines.sibling(1), engines.sibling(2)]
    samples = [rng.standard_normal((1, 4, 16, 16), np.float32) for _ in backends]
    conditioning = {"encoder_hidden_states": rng.standard_normal((1, 32, 128), np.float32)}
    steps = [900.0, 500.0, 20.0]

    def alone(lane: int) -> Array:
        backend = backends[lane]
        backend.bind((1, 4, 16, 16), steps, [conditioning])
        backend.write("x", samples[lane])
        for _ in range(10):
            calls: list[list[Branch]] = [[] for _ in backends]
            calls[lane] = [Branch("x", lane, "y", 0)]
            backend.predict(calls)
        return backend.read("y")

    with ThreadPoolExecutor(len(backends)) as pool:
        found = list(pool.map(alone, range(len(backends))))
    engines.close()
    for lane, output in enumerate(found):
        given = {"sample": samples[lane], "timestep": np.full(1, steps[lane], np.float32), **conditioning}
        assert share(output, of_torch(given)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sequential"}, {"mode": "conservative", "k": 3}, {"mode": "aggressive", "k": 4}, {"mode": "srds"},
        {"mode": "adaptive"}, {"mode": "sequential", "guidance_scale": 1.0},
        {"mode": "aggressive", "k": 5, "num_images_per_prompt": 3}, {"mode": "conservative", "width": 96, "height": 48},
    ],
    ids=str,
)  # fmt: skip
def test_samplers_make_the_images_of_onnx_runtime(lanes: Pipeline, pipeline: Pipeline, options: dict[str, Any]) -> None:
    ours, theirs = (one.generate(PROMPT, num_inference_steps=8, seed=11, **options) for one in (lanes, pipeline))
    assert share(ours.latents, theirs.latents) < 1e-3
    for one, other in zip(ours.images, theirs.images, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 2
    assert {key: ours.report.to_dict()[key] for key in ("mode", "k", "rounds", "evaluations")} == {
        key: theirs.report.to_dict()[key] for key in ("mode", "k", "rounds", "evaluations")
    }


def test_the_same_image_again_has_the_same_bits(lanes: Pipeline) -> None:
    first, again = (lanes.generate(PROMPT, num_inference_steps=5, seed=2, mode="aggressive", k=4) for _ in range(2))
    assert np.array_equal(first.latents, again.latents)


# plans


def test_plans_say_what_they_are_and_are_built_once(built: Bundle) -> None:
    plans = built.plans()
    kept = contents(built.folder / "plans")
    assert set(build_missing(built, parse_devices("cpu@1@openvino")).values()) == {None}
    assert contents(built.folder / "plans") == kept
    for shape in (*map(Shape, BATCHES), DYNAMIC):
        plan = plans[plan_key(plan_fields(built, DENOISER, shape, "fp32"))]
        assert plan.parity is not None and 0 < plan.parity.relative_error < plan.parity.bound
        assert plan.fields["runtime"].startswith("openvino 20") and str(shape) in plan.fields["shapes"]


def small_bundle(built: Bundle, folder: Path) -> Bundle:
    """A copy with links for files, in which one plan can be changed."""
    folder.mkdir(parents=True)
    for path in built.folder.iterdir():
        if path.is_file():
            (folder / path.name).hardlink_to(path)
    for plan in built.plans().values():
        if plan.fields["runtime"].startswith("openvino"):
            target = folder / "plans" / plan.key
            target.mkdir(parents=True)
            for path in built.plan_folder(plan.key).iterdir():
                (target / path.name).write_bytes(path.read_bytes())
    return Bundle(folder, built.manifest)


def test_plans_are_opened_when_calls_need_them(built: Bundle, rng: np.random.Generator) -> None:
    engines = openvino.Engines(built, parse_devices(DEVICES))
    denoiser = engines._denoiser
    assert set(denoiser._open or ()) == {Shape(1)}
    given = inputs(built, rng, 10)
    denoiser.bind(given, np.empty_like(given["sample"]))()
    assert set(denoiser._open or ()) == {Shape(1), Shape(2), Shape(8)}
    engines.close()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_never_opened_and_is_built_again(damage: str, built: Bundle, tmp_path: Path) -> None:
    bundle, lanes = small_bundle(built, tmp_path / "shapes"), parse_devices(DEVICES)
    fields = plan_fields(bundle, DENOISER, Shape(2), "fp32")
    path = bundle.plan_folder(plan_key(fields)) / "denoiser.blob"
    DAMAGES[damage](path)
    with pytest.raises(BundleError, match=r"denoiser\.blob (is missing|was altered or truncated).*make engines"):
        load(bundle, lanes)
    made = build_missing(bundle, lanes)
    assert [name for name, plan in made.items() if plan is not None] == ["denoiser (static, batch 2)"]
    load(bundle, lanes).close()


def test_a_plan_that_differs_from_onnx_runtime_is_not_kept(
    built: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle(built, tmp_path / "shapes")
    fields = plan_fields(bundle, DENOISER, Shape(2), "fp32")
    (bundle.plan_folder(plan_key(fields)) / "plan.json").unlink()
    monkeypatch.setitem(openvino.HINTS, "fp32", "bf16")
    if BF16:
        with pytest.raises(BundleError, match=r"\(static, batch 2\) differs from ONNX Runtime by .*, more than 0.0001"):
            build_missing(bundle, parse_devices(DEVICES))
    assert not bundle.has_intact_plan(fields)


def test_a_model_that_was_not_compiled_says_how(built: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(tmp_path, built.manifest)
    with pytest.raises(BundleError, match=r"no compiled denoiser for this machine .*make engines"):
        load(bundle, parse_devices(DEVICES))


# bad input


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "installed", property(lambda self: self.option != "openvino"))
    message = (
        r"^there is no cpu@openvino: OpenVINO is not installed \(pip install --editable '\.\[openvino\]'\); .*auto"
    )
    with pytest.raises(DeviceError, match=message):
        check(parse_devices(DEVICES))
    with pytest.raises(DeviceError, match=message):
        Pipeline.load("shapes", DEVICES)


@pytest.mark.parametrize("text", ["cuda:0@openvino", "cuda:0*2@openvino"])
def test_on_a_gpu_it_is_refused_by_name(text: str) -> None:
    with pytest.raises(DeviceError, match="openvino runs on cpu devices, not on cuda"):
        parse_devices(text)


def test_bf16_on_a_processor_without_it_is_refused(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "_core", Old)
    for work in (build_missing, load):
        with pytest.raises(DeviceError, match="cannot compute in bf16: leave it out, as in cpu@openvino"):
            work(built, parse_devices("cpu@openvino+bf16"))


@pytest.mark.parametrize("text", ["cpu*2@openvino", "cpu@openvino*2"])
def test_the_runtime_is_named_before_or_after_the_lanes(text: str) -> None:
    assert [(lane.runtime, lane.precision, lane.index) for lane in parse_devices(text)] == [
        ("openvino", "fp32", 0), ("openvino", "fp32", 1),
    ]  # fmt: skip


def test_what_the_library_says_is_one_line(denoiser: Compiled, built: Bundle, rng: np.random.Generator) -> None:
    given = inputs(built, rng, 2)
    given["encoder_hidden_states"] = given["encoder_hidden_states"].astype(np.int32)
    with pytest.raises(DeviceError, match=r"^denoiser failed in OpenVINO: .+$") as caught:
        denoiser.bind(given, np.empty_like(given["sample"]))
    assert "\n" not in str(caught.value)


def test_a_closed_model_says_so(built: Bundle, rng: np.random.Generator) -> None:
    compiled = Compiled(built, DENOISER, "fp32", 1, 1)
    given = inputs(built, rng, 1)
    run = compiled.bind(given, np.empty_like(given["sample"]))
    compiled.close()
    for work in (run, lambda: compiled.bind(given, np.empty_like(given["sample"])), lambda: compiled.run(**given)):
        with pytest.raises(DeviceError, match="the model is closed"):
            work()


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = "import sys; import engines.openvino, runtime; print('openvino' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False False\n"
