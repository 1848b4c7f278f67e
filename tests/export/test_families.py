"""Every family at tiny size, from a folder that diffusers saved to images on two lanes, against diffusers itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.torch_baseline import Setting, TorchBaseline, Wanted
from engines import load
from engines.base import Array
from engines.devices import parse_devices
from engines.errors import ParameterError
from engines.store import Bundle
from export.bundle import export, exporter
from export.spec import ExportSpec
from runtime.call import Call
from runtime.embed.program import program_of, write_program
from runtime.pipeline import Pipeline
from runtime.sampling.noise import ENCODER, gaussian
from runtime.sampling.rules import RULES
from tests.runtime.embed.building import built
from tests.runtime.embed.library import Library

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # diffusers and transformers, about themselves
]
PROMPT, NEGATIVE = "a large red star on the left", "a small blue ring"
SCHEDULERS = {
    "sd1": ("dpm++2m", "euler", "euler_a"),
    "sd2": ("ddim", "ddpm", "euler", "dpm++2m"),
    "sdxl": ("euler", "dpm++2m"),
    "sd3": ("flow_euler",),
    "sd3-no-t5": ("flow_euler",),
    "flux": ("flow_euler",),
    "flux-schnell": ("flow_euler",),
    "lcm": ("lcm",),
    "lcm-sdxl": ("lcm", "euler"),
    "sd1-tiny-vae": ("euler",),
}
IMAGES = ("sd1", "sd2", "sdxl", "sd3", "lcm-sdxl", "sd1-tiny-vae")  # those that can start from one
STEPS = 6


@dataclass
class Made:
    """A family: the diffusers pipeline, its folder, and our pipeline on two lanes."""

    name: str
    theirs: Any
    folder: Path
    ours: Pipeline

    def generate(self, prompt: Any = PROMPT, **options: Any) -> Any:
        """Ours, sequential if not told otherwise."""
        return self.ours.generate(prompt, **{"mode": "sequential", "num_inference_steps": STEPS, **options})

    def expected(self, noise: Array, pipeline: Any = None, prompt: Any = PROMPT, **options: Any) -> tuple[Array, Array]:
        """Diffusers' latents, laid out as ours, and the pixels that its VAE makes of them."""
        import torch

        pipeline, size = pipeline or self.theirs, (noise.shape[2] * 4, noise.shape[3] * 4)
        if "image" not in options:
            options |= {"height": size[0], "width": size[1], "latents": torch.from_numpy(noise.copy())}
        if self.name.startswith("flux"):
            options["latents"] = pipeline._pack_latents(options["latents"], *noise.shape)
        latents = pipeline(prompt, output_type="latent", **{"num_inference_steps": STEPS, **options}).images
        if self.name.startswith("flux"):
            latents = pipeline._unpack_latents(latents, *size, pipeline.vae_scale_factor)
        config = pipeline.vae.config
        with torch.no_grad():
            pixels = pipeline.vae.decode(latents / config.scaling_factor + (config.shift_factor or 0)).sample
        images = pipeline.image_processor.postprocess(pixels)
        return latents.numpy(), np.stack([np.asarray(image, int) for image in images])


def build(folder: Path, build_folder: Path, **asked: Any) -> Bundle:
    """Exports and compiles for processor cores."""
    target = build_folder / folder.name
    wanted = ExportSpec(folder.name, folder, **asked)
    export(wanted, target, wanted.identity(), "fp32")
    bundle = Bundle.open(str(target))
    load.build_missing(bundle, parse_devices("cpu*2"))
    return bundle


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, exported_once: None) -> Iterator[Callable[[str], Made]]:
    """Families by name, each made once for all tests of it."""
    from tests.tiny import save

    folder, known = tmp_path_factory.mktemp("tiny"), dict[str, Made]()

    def get(name: str) -> Made:
        if name not in known:
            theirs = save(name, folder)
            theirs.set_progress_bar_config(disable=True)
            sides = (64, 128) if name.startswith("flux") else None  # half of a Flux image is too much for a test
            bundle = build(folder / name, folder / "build", sides=sides)
            known[name] = Made(name, theirs, folder / name, Pipeline(bundle, "cpu*2"))
        return known[name]

    yield get
    for one in known.values():
        one.ours.close()


@pytest.fixture
def made(request: pytest.FixtureRequest, families: Callable[[str], Made]) -> Iterator[Made]:
    """A family; the diffusers pipeline's scheduler may be changed."""
    found = families(request.param)
    scheduler = found.theirs.scheduler
    yield found
    found.theirs.scheduler = scheduler


def every(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("made", names or tuple(SCHEDULERS), indirect=True)


def near(actual: Array, expected: Array, tolerance: float = 1e-3) -> None:
    assert np.isfinite(expected).all() and actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def equal(result: Any, expected: tuple[Array, Array]) -> None:
    near(result.latents, expected[0])
    pixels = np.stack([np.asarray(image, int) for image in result.images])
    assert np.abs(pixels - expected[1]).max() <= 2


def noise_of(made: Made, rng: np.random.Generator, images: int = 1, side: tuple[int, int] = (16, 16)) -> Array:
    channels = made.ours.manifest.latent_channels
    return rng.standard_normal((images, channels, *side), np.float32)


def steps_noise(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Diffusers' schedulers draw the noise that ours draw, step after step."""
    import torch
    from diffusers import schedulers

    for name in ("ddpm", "ddim", "lcm", "euler_ancestral_discrete"):
        number = 0

        def drawn(shape: Any, **_: Any) -> Any:
            nonlocal number
            number += 1
            return torch.from_numpy(np.stack([gaussian(seed, n, number, tuple(shape[1:])) for n in range(shape[0])]))

        monkeypatch.setattr(f"{schedulers.__name__}.scheduling_{name}.randn_tensor", drawn)


def euler(made: Made) -> str:
    """Gives diffusers the Euler scheduler; our name of it."""
    import diffusers

    made.theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(made.theirs.scheduler.config)
    return "euler"


CASES = [(name, scheduler) for name, several in SCHEDULERS.items() for scheduler in several]


@pytest.mark.parametrize(("made", "scheduler"), CASES, indirect=["made"], ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sequential_equals_the_diffusers_pipeline(
    made: Made, scheduler: str, guidance: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    noise = noise_of(made, rng)
    made.theirs.scheduler = getattr(diffusers, RULES[scheduler].class_name).from_config(made.theirs.scheduler.config)
    options: dict[str, Any] = {"guidance_scale": guidance}
    if made.ours.manifest.guidance == "classifier_free":
        options["negative_prompt"] = NEGATIVE
    steps_noise(monkeypatch, 3)
    wanted = made.expected(noise, **options)
    size = {"width": 64, "height": 64}
    equal(made.generate(latents=noise, scheduler=scheduler, seed=3, **size, **options), wanted)


@every()
def test_pixels_and_other_sizes_equal_the_diffusers_pipeline(
    made: Made, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = euler(made) if made.name == "sd1" else None
    for side in ((16, 16), (24, 18), (18, 32)):
        noise = noise_of(made, rng, 2, side)
        steps_noise(monkeypatch, 3)
        wanted = made.expected(noise, num_images_per_prompt=2)
        size = {"width": side[1] * 4, "height": side[0] * 4}
        ours = made.generate(latents=noise, num_images_per_prompt=2, scheduler=scheduler, seed=3, **size)
        equal(ours, wanted)
        assert ours.images[0].size == (size["width"], size["height"])
        assert (ours.report.width, ours.report.height) == ours.images[0].size


@every(*IMAGES)
@pytest.mark.parametrize("strength", [1.0, 0.55])
def test_image_to_image_equals_the_diffusers_pipeline(
    made: Made, strength: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers
    import torch

    scheduler = "dpm++2m" if made.name == "sd1" else None
    if made.name == "sd1":
        made.theirs.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(made.theirs.scheduler.config)
    theirs = diffusers.AutoPipelineForImage2Image.from_pipe(made.theirs)
    theirs.set_progress_bar_config(disable=True)
    image = Image.fromarray(rng.integers(0, 256, (72, 64, 3), np.uint8))
    noise = noise_of(made, rng, side=(18, 16))
    encoded = gaussian(5, 0, ENCODER, noise.shape[1:])[None]
    monkeypatch.setattr("diffusers.models.autoencoders.vae.randn_tensor", lambda *_, **__: torch.from_numpy(encoded))
    monkeypatch.setattr(sys.modules[type(theirs).__module__], "randn_tensor", lambda *_, **__: torch.from_numpy(noise))
    options: dict[str, Any] = {"strength": strength, "image": image}
    if made.ours.manifest.guidance == "classifier_free":
        options["negative_prompt"] = NEGATIVE
    size = {"height": 72, "width": 64} if made.name == "sd3" else {}  # there the default is the model's own size
    wanted = made.expected(noise, theirs, guidance_scale=4.0, **options, **size)
    equal(made.generate(latents=noise, seed=5, scheduler=scheduler, guidance_scale=4.0, **options), wanted)


@every("sdxl", "sd3")
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_clip_skip_equals_the_diffusers_pipeline(made: Made, clip_skip: int, rng: np.random.Generator) -> None:
    noise = noise_of(made, rng)
    wanted = made.expected(noise, clip_skip=clip_skip, guidance_scale=4.0)
    equal(made.generate(latents=noise, clip_skip=clip_skip, guidance_scale=4.0), wanted)


@every("sd1", "sd2")
@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_is_the_normalized_state_of_an_earlier_layer(
    made: Made, clip_skip: int, rng: np.random.Generator
) -> None:
    """What diffusers' code for it says, and cannot run with this version of transformers."""
    import torch

    ids = made.theirs.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    encoder = made.theirs.text_encoder
    with torch.no_grad():
        states = encoder(ids, output_hidden_states=True).hidden_states
        embeds = encoder.final_layer_norm(states[-(clip_skip + 1)]).numpy()
    noise = noise_of(made, rng)
    given = made.generate(None, prompt_embeds=embeds, latents=noise)
    near(made.generate(latents=noise, clip_skip=clip_skip).latents, given.latents, 1e-5)


@every("sdxl")
def test_no_negative_prompt_is_zeros_where_diffusers_says_so(made: Made, rng: np.random.Generator) -> None:
    noise = noise_of(made, rng)
    for negative in (None, "", NEGATIVE):
        wanted = made.expected(noise, negative_prompt=negative, guidance_scale=4.0)
        equal(made.generate(latents=noise, negative_prompt=negative, guidance_scale=4.0), wanted)


@every("sdxl", "sd3", "flux")
def test_embeddings_stand_in_for_prompts(made: Made) -> None:
    names = ["prompt_embeds", "pooled_prompt_embeds"]
    encoded = made.theirs.encode_prompt(PROMPT, *([PROMPT] * (2 if made.name == "sd3" else 1)))
    chosen = {"sdxl": (0, 2), "sd3": (0, 2), "flux": (0, 1)}[made.name]
    embeds = {name: encoded[n].detach().numpy() for name, n in zip(names, chosen, strict=True)}
    given = made.generate(None, seed=4, **embeds)
    near(given.latents, made.generate(seed=4).latents)
    with pytest.raises(ParameterError, match="give all embeddings or none"):
        made.generate(None, prompt_embeds=embeds["prompt_embeds"])


@every()
def test_every_mode_runs_on_two_lanes(made: Made) -> None:
    own = {"scheduler": "euler"} if made.name == "sd1" else {}  # srds runs no multistep solver
    reference = made.generate(seed=1, **own).latents
    if made.name == "lcm":
        for mode in ("conservative", "aggressive", "srds", "adaptive"):
            with pytest.raises(ParameterError, match="lcm"):
                made.generate(seed=1, mode=mode)
        return
    assert np.array_equal(made.generate(seed=1, mode="srds", **own).latents, reference)
    for mode in ("conservative", "aggressive"):
        result = made.generate(seed=1, mode=mode, k=3, **own)
        assert result.report.rounds < STEPS and np.isfinite(result.latents).all()
        assert np.linalg.norm(result.latents - reference) > 0
    near(made.generate(seed=1, mode="adaptive", k=2, **own).latents, reference, 1e-5)


@every()
def test_the_c_library_makes_the_same_images(made: Made, tmp_path: Path) -> None:
    """From words, by the tokenizers of CLIP and T5; the negative prompt where there are two passes."""
    bundle = made.ours.machine.bundle
    options: dict[str, Any] = {
        "mode": "sequential" if made.name == "lcm" else "aggressive",
        "num_inference_steps": STEPS,
    }
    write_program(program_of(bundle, parse_devices("cpu*2"), Call("", **options)), tmp_path / "one.program")
    engine = Library(built()).open(bundle.folder, tmp_path / "one.program", "cpu*2")
    negative = NEGATIVE if bundle.manifest.guidance == "classifier_free" else None
    result = made.ours.generate(PROMPT, negative_prompt=negative, seed=6, **options)
    own = engine.generate(PROMPT, negative=negative, seed=6)
    near(own.latents.reshape(result.latents.shape), result.latents, 1e-5)
    assert np.abs(own.rgb.astype(int) - np.stack([np.asarray(image, int) for image in result.images])).max() <= 1
    engine.close()


@every()
def test_one_lane_gives_what_two_give(made: Made) -> None:
    other = Pipeline(made.ours.machine.bundle, "cpu@1")
    a, b = (one.generate(PROMPT, num_inference_steps=STEPS, mode="sequential", seed=2) for one in (made.ours, other))
    other.close()
    near(a.latents, b.latents, 1e-4)


@pytest.mark.slow
@every("sdxl", "flux")
def test_the_baseline_of_benchmarks_draws_the_same_latents(made: Made, rng: np.random.Generator) -> None:
    baseline = TorchBaseline(Wanted(str(made.folder)), 120)
    try:
        noise = noise_of(made, rng, side=(16, 24))
        _, latents = baseline.image(PROMPT, noise, Setting(SCHEDULERS[made.name][0], STEPS, 4.0))
        near(made.generate(latents=noise, width=96, height=64, guidance_scale=4.0).latents, latents)
    finally:
        baseline.close()


@every()
def test_defaults_are_those_of_the_diffusers_pipeline(made: Made) -> None:
    import inspect

    theirs = inspect.signature(type(made.theirs).__call__).parameters
    defaults = made.ours.manifest.defaults
    assert defaults.num_inference_steps == theirs["num_inference_steps"].default
    assert defaults.guidance_scale == theirs["guidance_scale"].default


@every()
def test_prompts_become_the_ids_that_transformers_gives(made: Made) -> None:
    prompts = ["", PROMPT, "red star " * 40]
    ids, warnings = made.ours._tokenizer(prompts)
    for spec in made.ours.manifest.tokenizers:
        theirs = getattr(made.theirs, spec.input.replace("input_ids", "tokenizer"))
        wanted = theirs(
            prompts, padding="max_length", max_length=spec.max_length, truncation=True, return_tensors="np"
        ).input_ids
        assert np.array_equal(ids[spec.input], wanted), spec.input
    assert any("was cut" in warning for warning in warnings)


NARROW = [*((name, "fp16") for name in SCHEDULERS), ("sd1", "bf16"), ("flux", "bf16")]


@pytest.mark.parametrize(("made", "precision"), NARROW, indirect=["made"], ids=["-".join(case) for case in NARROW])
def test_networks_for_gpus_stay_near_torch(made: Made, precision: str, tmp_path: Path) -> None:
    """The export itself refuses what is beyond its bound; here no network may come near it."""
    from export.families import Sides
    from export.loading import configs, open_source
    from export.networks.vae import vae_factor
    from export.to_onnx import export_network

    source = open_source(made.folder)
    factor, with_t5 = vae_factor(configs(source)), made.name in ("sd3", "flux") and precision == "fp16"
    for name in ("denoiser", "text_encoder") if with_t5 else ("denoiser",):
        parts, make = source.family.networks[name]
        load = exporter(make, source, parts, precision)
        network = export_network(name, load, tmp_path, Sides(64, 64, 128, 16), factor)
        assert 0 < network.parity.relative_error < 2e-3, name
        if name == "denoiser":
            types = {one.name: one.dtype for one in network.inputs}
            assert types["sample"] == {"fp16": "float16", "bf16": "bfloat16"}[precision]
            assert types["timestep"] == "float32"


@every("flux", "lcm")
def test_what_a_family_cannot_do_is_refused(made: Made) -> None:
    with pytest.raises(ParameterError, match="second pass"):
        made.generate(negative_prompt=NEGATIVE)
    with pytest.raises(ParameterError, match="cannot start from an image"):
        made.generate(image=Image.new("RGB", (64, 64)))


@every("sd1")
def test_wrong_arguments(made: Made) -> None:
    for options, message in (
        ({"width": 68}, "width=68 is not among the sizes of this engine: each side may be 32 to 128 pixels in steps"),
        ({"height": 256}, "height=256 is not among the sizes"),
        ({"strength": 0.5}, "strength belongs to image"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 2.0}, "from 0 to 1"),
        ({"image": Image.new("RGB", (64, 64)), "strength": 0.1}, "none of 6 steps is left"),
        ({"image": Image.new("RGB", (640, 64))}, "image is 640×64 pixels: each side may be"),
        ({"image": "image.png"}, "must be a PIL image"),
        ({"clip_skip": 3}, "clip_skip must be a whole number from 0 to 2"),
        ({"pooled_prompt_embeds": np.zeros((1, 4))}, "takes no pooled_prompt_embeds"),
        ({"scheduler": "HeunDiscreteScheduler"}, "unknown scheduler .HeunDiscreteScheduler.; name one of .*heun"),
    ):
        with pytest.raises(ParameterError, match=message):
            made.generate(**options)
    assert not made.generate().report.warnings
