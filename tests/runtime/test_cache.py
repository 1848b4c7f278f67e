"""Images of the embedded model that reuse features, from the export on."""

# covers: export/networks/cached.py, engines/cached.py

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from engines.cached import check_cache
from engines.errors import DeviceError, ExportError, ParameterError
from engines.store import Bundle, resuming
from export.bundle import export
from export.spec import EMBEDDED, ExportSpec
from runtime.pipeline import Pipeline, Result

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves
GUIDANCE, STEPS = 3.0, 9


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Diffusers' pipeline of the embedded model."""
    import diffusers

    return diffusers.StableDiffusionPipeline.from_pretrained(EMBEDDED["shapes"])


@pytest.fixture(scope="module")
def ours(shapes: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """It with the parts, on two lanes: an export that finds the other networks finished."""
    from engines import load
    from engines.devices import parse_devices

    target = tmp_path_factory.mktemp("build") / "shapes+cache"
    spec = ExportSpec("shapes+cache", EMBEDDED["shapes"], model="shapes", cache=True)
    with pytest.raises(DeviceError), resuming(target, f"{spec.identity()} fp32") as kept:
        for name, network in shapes.manifest.networks.items():
            for file in network.files:
                shutil.copy(shapes.folder / file.name, kept)
            (kept / f"{name}.done").write_text(network.model_dump_json())
        raise DeviceError("interrupted")
    export(spec, target, spec.identity(), "fp32")
    bundle = Bundle.open(str(target))
    load.build_missing(bundle, parse_devices("cpu*2"))
    pipeline = Pipeline(bundle, "cpu*2")
    yield pipeline
    pipeline.close()


def draw(pipeline: Pipeline, **options: Any) -> Result:
    given = {"mode": "sequential", "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "scheduler": "euler"}
    return pipeline.generate("a large red star", **{**given, **options})


def parts(name: str, **more: Any) -> tuple[Any, Any, Any]:
    """A UNet with random weights, and its parts."""
    import torch

    from export.networks.cached import DeepPart, ShallowPart
    from tests.tiny import unet

    torch.manual_seed(int(np.random.default_rng().integers(2**31)))
    told: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                            "projection_class_embeddings_input_dim": 64} if name == "pooled" else {}  # fmt: skip
    whole = unet(16, **told, **more).eval()
    return whole, DeepPart(whole), ShallowPart(whole)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["plain", "pooled", "attention"])
def test_the_parts_in_a_row_are_the_unet(name: str, layers: int) -> None:
    import torch

    kinds = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    down, up = (tuple(reversed(one)) for one in kinds) if name == "attention" else kinds
    whole, deep, shallow = parts(name, layers_per_block=layers, down_block_types=down, up_block_types=up)
    sample, times, text = torch.randn(3, 4, 12, 20), torch.tensor([3.0, 501.0, 77.0]), torch.randn(3, 5, 16)
    told: dict[str, Any] = {}
    if name == "pooled":
        told["added_cond_kwargs"] = {"text_embeds": torch.randn(3, 16), "time_ids": torch.randn(3, 6)}
    with torch.no_grad():
        expected = whole(sample, times, text, **told).sample
        shallow.features[:] = [deep(sample, times, text, **told).sample]
        torch.testing.assert_close(shallow(sample, times, text, **told).sample, expected)
        shallow.features[:] = [shallow.features[0] * 0]
        assert not torch.allclose(shallow(sample, times, text, **told).sample, expected, atol=1e-3)


def reference(pipeline: Any, noise: Array, interval: int) -> Array:
    """Diffusers' Euler steps, with features on the line through the last two deep parts; final latents."""
    import diffusers
    import torch

    from export.networks.cached import DeepPart, ShallowPart

    deep, shallow = DeepPart(pipeline.unet), ShallowPart(pipeline.unet)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        told, untold = pipeline.encode_prompt("a large red star", "cpu", 1, True, "")
        text, x = torch.cat([untold, told]), torch.from_numpy(noise) * scheduler.init_noise_sigma
        known: list[tuple[int, Any]] = []
        for i, t in enumerate(scheduler.timesteps):
            both, times = scheduler.scale_model_input(torch.cat([x, x]), t), torch.full((2,), float(t))
            if i % interval == 0:
                known.append((i, deep(both, times, text).sample))
                features = known[-1][1]
            else:
                (now, value), (before, earlier) = known[-1], known[max(len(known) - 2, 0)]
                slope = (value - earlier) / (now - before) if now > before else 0 * value
                features = value + slope * (i - now)
            shallow.features[:] = [features]
            low, high = shallow(both, times, text).sample.chunk(2)
            x = scheduler.step(low + GUIDANCE * (high - low), t, x).prev_sample
    found: Array = x.numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 2, 4])
def test_images_equal_those_of_torch_with_the_same_features(
    interval: int, ours: Pipeline, theirs: Any, rng: np.random.Generator
) -> None:
    shape = ours.generate("a", mode="sequential", num_inference_steps=2).latents.shape
    noise = rng.standard_normal(shape, np.float32)
    expected = reference(theirs, noise, interval)
    found = draw(ours, latents=noise, cache_interval=interval).latents
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "conservative", "aggressive"])
def test_an_image_does_not_depend_on_lanes_and_neighbours(mode: str, ours: Pipeline) -> None:
    options: dict[str, Any] = {"mode": mode, "k": 3, "cache_interval": 3, "seed": 5}
    many = draw(ours, num_images_per_prompt=3, width=48, height=32, **options)
    one = draw(ours, lanes=1, width=48, height=32, **options)
    assert np.abs(many.latents[:1] - one.latents).max() <= 1e-4 * np.abs(one.latents).max()
    assert one.report.cache_interval == 3 and one.report.certificate["sameness"] == "measured"
    assert np.abs(draw(ours, width=48, height=32, **options | {"cache_interval": 1}).latents - one.latents).max() > 1e-4


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    from tests.tiny import save

    save("sd3", tmp_path)
    spec = ExportSpec("sd3+cache", tmp_path / "sd3", cache=True)
    with pytest.raises(ExportError, match=r"its denoiser is no UNet; leave out --cache \(CACHE=1\)"):
        export(spec, tmp_path / "build" / "sd3+cache", spec.identity(), "fp32")


@pytest.mark.slow
def test_a_model_or_lanes_without_the_parts_say_what_to_do(ours: Pipeline, pipeline: Pipeline) -> None:
    with pytest.raises(ParameterError, match="`make engines MODEL=shapes CACHE=1` makes it"):
        draw(pipeline, cache_interval=2)
    with pytest.raises(ParameterError, match="OpenVINO cannot reuse features: use --devices cpu@onnxruntime"):
        check_cache(2, ours.manifest, "openvino")
    with pytest.raises(ParameterError, match="mode auto chooses cache_interval itself"):
        draw(ours, mode="auto", cache_interval=2)
