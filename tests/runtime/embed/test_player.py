"""The C library makes what Python makes: latents bit for bit where the calls are placed alike, and the same images."""
# covers: runtime/embed/src/player.cc, runtime/embed/src/engine.cc, runtime/embed/src/noise.cc

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.pipeline import Pipeline
from runtime.sampling.noise import step_noise
from runtime.sampling.operations import Options
from runtime.sampling.schedulers import make_schedule
from tests.runtime.embed.conftest import Open
from tests.runtime.embed.library import StatusError

PROMPT = "a large red star at the left on blue background"


def ids(pipeline: Pipeline, prompt: str) -> list[int]:
    found, _ = pipeline._tokenizer([prompt])
    return found["input_ids"][0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["sequential", "conservative", "aggressive"])
@pytest.mark.parametrize("scheduler", ["ddim", "euler_a", "dpm++2m", "dpm++3m_sde", "unipc", "deis", "lms", "kdpm2_a"])
def test_latents_and_images_are_those_of_python(
    pipeline: Pipeline, open_engine: Open, rng: np.random.Generator, mode: str, scheduler: str
) -> None:
    steps, k, seed = int(rng.integers(3, 12)), int(rng.integers(1, 5)), int(rng.integers(2**63)) * 2 + 1
    scale = float(rng.choice([1.0, 4.0, 7.3]))
    engine = open_engine(mode=mode, scheduler=scheduler, num_inference_steps=steps, k=k)
    made = engine.generate(ids(pipeline, PROMPT), negative=ids(pipeline, ""), seed=seed, guidance=scale)
    own = pipeline.generate(
        PROMPT, mode=mode, scheduler=scheduler, num_inference_steps=steps, k=k, seed=seed, guidance_scale=scale
    )
    np.testing.assert_array_equal(made.latents, own.latents.ravel())
    np.testing.assert_array_equal(made.rgb[0], np.asarray(own.images[0]))
    report = own.report
    counts = (made.result.rounds, made.result.evaluations, made.result.calls, made.result.lanes_per_round)
    assert counts == (report.rounds, report.evaluations, report.calls, report.lanes_per_round)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "srds", "scheduler": "ddim", "num_inference_steps": 9},
        {
            "mode": "srds",
            "scheduler": "euler",
            "num_inference_steps": 10,
            "blocks": 2,
            "iterations": 1,
            "pipelined": False,
        },
        {"mode": "aggressive", "scheduler": "ddpm", "num_inference_steps": 6, "k": 3, "drafts": "fresh"},
        {
            "mode": "conservative",
            "num_inference_steps": 8,
            "k": 3,
            "drafts": "extrapolated+corrected",
            "first_blocks": (1, 2),
        },
        {"mode": "aggressive", "num_inference_steps": 3, "width": 48, "height": 96},
        {"mode": "aggressive", "num_inference_steps": 3, "clip_skip": 1},
    ],
)
def test_every_option_of_a_program(pipeline: Pipeline, open_engine: Open, options: dict[str, Any]) -> None:
    engine = open_engine(**options)
    made = engine.generate(ids(pipeline, PROMPT), negative=ids(pipeline, "a blue ring"), seed=3)
    given: dict[str, Any] = {"mode": "aggressive", "k": 2} | options
    own = pipeline.generate(PROMPT, negative_prompt="a blue ring", seed=3, **given)
    np.testing.assert_array_equal(made.latents, own.latents.ravel())
    np.testing.assert_array_equal(made.rgb[0], np.asarray(own.images[0]))


@pytest.mark.parametrize("devices", ["cpu@1", "cpu", "cpu*3"])
def test_placement_is_pythons(shapes: object, open_engine: Open, devices: str) -> None:
    pipeline = Pipeline.load("shapes", devices)
    engine = open_engine(devices, k=3, num_inference_steps=5)
    made = engine.generate(ids(pipeline, PROMPT), negative=ids(pipeline, ""), images=2, seed=9)
    own = pipeline.generate(PROMPT, mode="aggressive", k=3, num_inference_steps=5, seed=9, num_images_per_prompt=2)
    pipeline.close()
    np.testing.assert_array_equal(made.latents, own.latents.ravel())
    for image, reference in zip(made.rgb, own.images, strict=True):
        np.testing.assert_array_equal(image, np.asarray(reference))


def test_latents_and_noise_of_the_caller(pipeline: Pipeline, open_engine: Open, rng: np.random.Generator) -> None:
    engine = open_engine(scheduler="euler_a", num_inference_steps=5, k=2)
    words: dict[str, Any] = {"prompt": ids(pipeline, PROMPT), "negative": ids(pipeline, "")}
    schedule = make_schedule(pipeline.manifest, "euler_a", 5)
    drawn = [value for _, value in step_noise(schedule, Options(k=2), 4, [0, 1], (4, 16, 16))]
    start = rng.standard_normal((2, 4, 16, 16), np.float32)
    assert engine.sizes(2).noise_count == sum(value.size for value in drawn)
    made = engine.generate(**words, images=2, seed=4, latents=start)
    again = engine.generate(**words, images=2, seed=77, latents=start, noise=np.stack(drawn))
    own = pipeline.generate(
        PROMPT, mode="aggressive", k=2, scheduler="euler_a", num_inference_steps=5, seed=4, latents=start,
        num_images_per_prompt=2,
    )  # fmt: skip
    np.testing.assert_array_equal(made.latents, own.latents.ravel())
    np.testing.assert_array_equal(again.latents, own.latents.ravel())


def test_other_shapes_of_a_call_do_not_disturb_the_next(pipeline: Pipeline, open_engine: Open) -> None:
    """Memory is kept between images: guidance, branches and the number of images change what it holds."""
    engine = open_engine(num_inference_steps=5)
    words: dict[str, Any] = {"prompt": ids(pipeline, PROMPT), "negative": ids(pipeline, "")}
    first = engine.generate(**words, seed=1)
    for images, scale in ((1, 2.5), (3, 4.0), (1, 1.0), (2, 0.0), (1, -3.0)):
        engine.generate(**words, images=images, guidance=scale)
    np.testing.assert_array_equal(engine.generate(**words, seed=1).latents, first.latents)
    assert not np.array_equal(engine.generate(**words, seed=2).latents, first.latents)


def test_an_id_that_the_model_does_not_have(open_engine: Open, capfd: pytest.CaptureFixture[str]) -> None:
    """What ONNX Runtime says is the request's message, and nothing is written to the host's standard error."""
    engine = open_engine()
    ids = [2**40] * engine.sizes().token_count
    with pytest.raises(StatusError, match="out of data bounds"):
        engine.generate(ids, negative=ids)
    assert capfd.readouterr() == ("", "")
