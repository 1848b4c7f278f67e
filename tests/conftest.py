"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from engines.manifest import MANIFEST, Defaults, File, Manifest, Network, Parity, Sizes, TensorSpec
from engines.store import BUILD, Bundle
from runtime.auto import call_seconds
from runtime.pipeline import Pipeline
from tests import ROOT
from tests.client import serving
from tests.libcuda import plugin
from tests.transcription import stable_diffusion_alphas_cumprod


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the image of the page for the README goes."""
    parser.addoption("--page-image", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    """Adds what runs tests on imaginary GPUs."""
    config.pluginmanager.register(plugin)


@pytest.fixture
def rng() -> np.random.Generator:
    """Fresh random numbers; pytest shows the seed of a test that fails."""
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def shapes() -> Bundle:
    """The embedded model, exported and compiled by `make engines`."""
    if not (BUILD / "shapes" / MANIFEST).is_file():
        pytest.fail("the embedded model is not exported: run `make engines` first")
    return Bundle.open("shapes")


@pytest.fixture(scope="module")
def pipeline(shapes: Bundle) -> Iterator[Pipeline]:
    """The embedded model on two lanes."""
    loaded = Pipeline(shapes, "cpu*2")
    yield loaded
    loaded.close()


@pytest.fixture
def usual_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of more branches cost less than in proportion, whatever this machine measured: loaded lanes are shared."""
    costs = call_seconds({1: 1.0, 2: 1.7, 4: 3.1, 8: 6.0})
    # a property, because pipelines that are there already have what was measured
    monkeypatch.setattr(Pipeline, "_call_seconds", property(lambda _: costs, lambda *_: None), raising=False)


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[httpx.Client]:
    """A client of a server of its own in this process."""
    with serving(pipeline) as connected:
        yield connected


@pytest.fixture(scope="session")
def manifest() -> Manifest:
    """A manifest with Stable Diffusion's schedule and no files behind it."""
    sample = TensorSpec(name="sample", dtype="float32", shape=("batch", 4, 16, 16))
    network = Network(
        file=File(name="denoiser.onnx", sha256="", bytes=0),
        inputs=(sample,),
        outputs=(sample,),
        parity=Parity(relative_error=0, max_abs_error=0, bound=1e-4, batches=(1,)),
    )
    alphas = tuple(stable_diffusion_alphas_cumprod().tolist())
    return Manifest(
        schema_version=2,
        model="fake",
        family="StableDiffusionPipeline",
        origin="fake",
        source="",
        versions={},
        precision="fp32",
        networks={"denoiser": network},
        tokenizers=(),
        scheduler={"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
        alphas_cumprod=alphas,
        latent_channels=4,
        vae_scale_factor=4,
        sizes=Sizes(width=64, height=64, least=32, most=128, multiple=16),
        guidance="classifier_free",
        zero_negative=False,
        clip_skip=0,
        patch=None,
        even_sigmas=False,
        strength_up=False,
        defaults=Defaults(num_inference_steps=50, guidance_scale=4.0, strength=0.8),
        examples=(),
    )


@pytest.fixture
def checkout() -> Path:
    """The root of the checkout."""
    return ROOT
