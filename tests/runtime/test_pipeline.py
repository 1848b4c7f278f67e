"""The pipeline on the embedded model: equal to diffusers, the same on any lanes, and clear about bad input."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from engines.base import Array, LaneCall
from engines.errors import DeviceError, NonFiniteError, ParameterError
from engines.host import HostBackend
from engines.store import Bundle
from export.spec import EMBEDDED
from runtime import Pipeline, Result
from runtime.lane_policy import ELASTIC
from runtime.sampling.drafts import DRAFTS, resolve
from runtime.sampling.noise import gaussian

PROMPT = "a large red star at the left on blue background"
MODES = ("sequential", "conservative", "aggressive", "srds", "adaptive")


def draw(pipeline: Pipeline, prompt: str = PROMPT, **options: Any) -> Result:
    return pipeline.generate(prompt, **{"num_inference_steps": 6, **options})


def same(a: Result, b: Result) -> bool:
    return np.array_equal(a.latents, b.latents)


def assert_near(a: Array, b: Array, tolerance: float) -> None:
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_sequential_equals_the_diffusers_pipeline(
    steps: int, guidance: float, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    import torch
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(EMBEDDED["shapes"])
    theirs.set_progress_bar_config(disable=True)
    noise = rng.standard_normal((1, 4, 16, 16), np.float32)
    options: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "negative_prompt": "a small blue ring",
    }
    expected = theirs(PROMPT, latents=torch.from_numpy(noise), output_type="latent", **options).images.numpy()
    pixels = np.asarray(theirs(PROMPT, latents=torch.from_numpy(noise), **options).images[0], int)
    ours = pipeline.generate(PROMPT, latents=noise, **options)
    assert_near(ours.latents, expected, 1e-4)
    assert np.abs(np.asarray(ours.images[0], int) - pixels).max() <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_lanes_change_nothing_but_rounding(mode: str, k: int, pipeline: Pipeline, shapes: Bundle) -> None:
    for devices in ("cpu@1", "cpu*3"):
        other = Pipeline(shapes, devices)
        a, b = (draw(p, mode=mode, k=k, num_inference_steps=9) for p in (pipeline, other))
        other.close()
        assert_near(a.latents, b.latents, 1e-4)
        difference = np.asarray(a.images[0], int) - np.asarray(b.images[0], int)
        assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_bytes_again(mode: str, pipeline: Pipeline) -> None:
    assert same(draw(pipeline, mode=mode, seed=0), draw(pipeline, mode=mode, seed=0))
    assert not same(draw(pipeline, mode=mode, seed=0), draw(pipeline, mode=mode, seed=1))


def test_noise_depends_on_seed_image_and_step_alone() -> None:
    first = gaussian(0, 0, 0, (4, 3, 3))
    assert np.array_equal(first, gaussian(0, 0, 0, (4, 3, 3)))
    others = [gaussian(*key, (4, 3, 3)) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, 0, 0))]
    assert all(not np.allclose(first, other) for other in others)
    large = [gaussian(2**63 + seed, 0, 0, (8,)) for seed in (0, 1, 1000)]
    assert not np.allclose(large[0], large[1]) and not np.allclose(large[0], large[2])
    sample = gaussian(7, 0, 0, (100_000,))
    assert abs(sample.mean()) < 0.02 and abs(sample.std() - 1) < 0.02


def test_images_of_one_call_differ_and_the_first_is_the_single_one(pipeline: Pipeline) -> None:
    several, one = draw(pipeline, num_images_per_prompt=3), draw(pipeline)
    assert len(several.images) == several.report.images == 3
    assert_near(several.latents[:1], one.latents, 1e-4)
    assert not np.allclose(several.latents[0], several.latents[1])


def test_each_prompt_of_a_list_is_its_own(pipeline: Pipeline) -> None:
    both = pipeline.generate([PROMPT, "a small green ring"], num_inference_steps=6)
    assert_near(both.latents[:1], draw(pipeline).latents, 1e-4)
    assert len(both.images) == 2


def test_embeddings_stand_in_for_prompts(pipeline: Pipeline, shapes: Bundle) -> None:
    ids, _ = pipeline._tokenizer([PROMPT, ""])
    run = pipeline.machine.engines.runners["text_encoder"].run
    embeds = run(**ids, clip_skip=np.zeros(2, np.int64))["encoder_hidden_states"]
    given = pipeline.generate(prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:], num_inference_steps=6)
    assert same(given, draw(pipeline)) or np.allclose(given.latents, draw(pipeline).latents, atol=1e-4)


def test_latents_are_the_initial_noise(pipeline: Pipeline) -> None:
    noise = gaussian(5, 0, 0, (4, 16, 16))[None]
    assert same(draw(pipeline, latents=noise), draw(pipeline, seed=5))


def test_the_report_says_what_happened(pipeline: Pipeline) -> None:
    report = draw(pipeline, mode="aggressive", num_inference_steps=7).report
    assert (report.mode, report.k, report.lanes, report.steps) == ("aggressive", 2, 2, 7)
    assert (report.rounds, report.evaluations, report.calls) == (4, 7, 8)
    assert report.guidance_split and report.devices == "cpu/0,cpu/1" and report.scheduler == "ddim"
    assert report.critical_seconds
    assert 0 < report.critical_seconds <= report.seconds["denoise"] <= report.seconds["total"]
    assert set(report.seconds) == {"text", "wait", "denoise", "decode", "total"} and report.lanes_per_round == 2


@pytest.mark.parametrize("mode", MODES)
def test_fewer_lanes_change_nothing_but_rounding(mode: str, pipeline: Pipeline) -> None:
    """k stays the number of all lanes, or the choice would change the image."""
    both, one = (draw(pipeline, mode=mode, num_inference_steps=9, lanes=lanes, timeline=True) for lanes in (None, 1))
    assert_near(one.latents, both.latents, 1e-4)
    assert (one.report.lanes, one.report.devices, one.report.guidance_split) == (1, "cpu/0", False)
    assert one.report.k == both.report.k == both.report.lanes == 2
    assert one.report.rounds == both.report.rounds == one.report.calls
    assert one.report.timeline and {span.lane for span in one.report.timeline} == {None, 0}


def test_the_report_names_the_lanes_that_were_used(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lane of two is the second where lanes are divided and another request owns the first."""
    monkeypatch.setattr(pipeline.lanes, "policy", ELASTIC)
    with pipeline.lanes.lease((1.0, 1.0)) as other, ThreadPoolExecutor(1) as pool:
        limited = pool.submit(draw, pipeline, lanes=1, timeline=True)
        while not limited.done():
            pipeline.lanes.update(other)
            time.sleep(0.002)
    report = limited.result().report
    assert (report.lanes, report.devices, report.lanes_per_round) == (1, "cpu/1", 1)
    assert report.timeline is not None and {span.lane for span in report.timeline if span.kind == "call"} == {1}
    assert draw(pipeline, lanes=1).report.devices == "cpu/0"


@pytest.mark.parametrize("lanes", [0, 3, True, 1.0])
def test_lanes_that_are_not_there(lanes: Any, pipeline: Pipeline) -> None:
    with pytest.raises(ParameterError, match="lanes must be a whole number from 1 to 2"):
        draw(pipeline, lanes=lanes)


@pytest.mark.parametrize("mode", MODES)
def test_the_timeline_says_what_each_lane_did_when(mode: str, pipeline: Pipeline) -> None:
    report = draw(pipeline, mode=mode, num_inference_steps=9, num_images_per_prompt=2, timeline=True).report
    assert report.timeline
    calls = [span for span in report.timeline if span.kind == "call"]
    assert len(calls) == report.calls
    assert {span.round for span in calls} == set(range(1, report.rounds + 1))
    assert sum(span.branches for span in calls) == 2 * report.evaluations
    assert {step for span in calls for step in span.steps} == set(range(9))
    times = [(span.start, span.end) for span in report.timeline]
    assert all(start is not None and end is not None and 0 <= start <= end for start, end in times)
    assert max(end or 0 for _, end in times) <= report.seconds["denoise"]
    for lane in (0, 1):  # a lane does one thing at a time
        own = [(span.start or 0.0, span.end or 0.0) for span in calls if span.lane == lane]
        assert all(end <= start for (_, end), (start, _) in pairwise(own))
    longest: dict[int, float] = {}
    for span in calls:
        longest[span.round] = max(longest.get(span.round, 0.0), (span.end or 0.0) - (span.start or 0.0))
    assert sum(longest.values()) == pytest.approx(report.critical_seconds)


def test_the_timeline_is_for_who_asks_and_changes_nothing(pipeline: Pipeline) -> None:
    asked, plain = (draw(pipeline, mode="adaptive", tolerance=0.01, timeline=timeline) for timeline in (True, False))
    assert plain.report.timeline is None and same(asked, plain)
    assert asked.report.timeline
    assert {span.kind for span in asked.report.timeline} == {"call", "combine", "distances"}


def test_the_timeline_shows_who_looks_between_rounds(pipeline: Pipeline) -> None:
    report = draw(pipeline, progress=lambda finished, steps: finished == 3 and pipeline.preview(), timeline=True).report
    (look,) = [span for span in report.timeline or () if span.kind == "callback"]
    assert look.round == 3 and look.lane is None


def test_the_callback_sees_refined_states_in_order(pipeline: Pipeline) -> None:
    seen: list[tuple[int, float, Array]] = []

    def look(_: Pipeline, step: int, timestep: float, state: dict[str, Any]) -> None:
        seen.append((step, timestep, state["latents"]))

    result = draw(pipeline, mode="conservative", k=2, num_inference_steps=8, callback_on_step_end=look)
    assert [step for step, _, _ in seen] == [2, 5, 7]
    assert seen[-1][1] == 1.0 and np.array_equal(seen[-1][2], result.latents)


def test_a_callback_that_raises_cancels_and_the_next_image_is_untouched(pipeline: Pipeline) -> None:
    expected = draw(pipeline, mode="aggressive")

    class CancelledError(Exception):
        pass

    def cancel(*_: Any) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        draw(pipeline, "a small white circle", mode="aggressive", seed=9, callback_on_step_end=cancel)
    assert same(draw(pipeline, mode="aggressive"), expected)


def test_nan_is_an_error_and_never_an_image(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    predict = pipeline.backend.predict

    def poisoned(calls: Sequence[LaneCall]) -> None:
        predict(calls)
        output = calls[1][0].output
        pipeline.backend.write(output, pipeline.backend.read(output) * np.float32(np.nan))

    monkeypatch.setattr(pipeline.backend, "predict", poisoned)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        draw(pipeline, mode="aggressive")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside diffusers
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("euler", "EulerDiscreteScheduler"), ("dpm++2m", "DPMSolverMultistepScheduler"), ("ddim", "DDIMScheduler")],
)
def test_a_scheduler_of_another_name_equals_the_diffusers_pipeline_with_it(
    name: str, scheduler: str, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    import diffusers
    import torch

    theirs = diffusers.StableDiffusionPipeline.from_pretrained(EMBEDDED["shapes"])
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config)
    noise = rng.standard_normal((1, 4, 16, 16), np.float32)
    options: dict[str, Any] = {"num_inference_steps": 9, "guidance_scale": 4.0}
    expected = theirs(PROMPT, latents=torch.from_numpy(noise), output_type="latent", **options).images.numpy()
    assert_near(pipeline.generate(PROMPT, latents=noise, scheduler=name, **options).latents, expected, 1e-4)


@pytest.mark.parametrize("scheduler", ["ddpm", "euler_a"])
@pytest.mark.parametrize("mode", MODES)
def test_an_image_of_a_stochastic_scheduler_depends_on_seed_and_number_alone(
    mode: str, scheduler: str, pipeline: Pipeline
) -> None:
    options: dict[str, Any] = {"mode": mode, "scheduler": scheduler, "seed": 4, "tolerance": 0.05}
    two = draw(pipeline, num_images_per_prompt=2, **options)
    one = draw(pipeline, **options)
    assert_near(two.latents[:1], one.latents, 1e-4)
    assert not same(one, draw(pipeline, **{**options, "seed": 5}))


def test_the_report_says_what_auto_drafts_were_and_what_was_accepted(pipeline: Pipeline) -> None:
    assert draw(pipeline, mode="aggressive").report.drafts == resolve("auto") in DRAFTS
    assert draw(pipeline, mode="aggressive", drafts="extrapolated").report.drafts == "extrapolated"
    report = draw(pipeline, mode="adaptive", k=3, tolerance=10.0, num_inference_steps=9).report
    assert report.rounds < 9 and report.accepted is not None
    assert 0 < report.accepted["median"] <= report.accepted["p90"] <= report.accepted["max"] <= 10
    assert draw(pipeline, mode="adaptive", k=3, num_inference_steps=9).report.rounds == 9
    report = draw(pipeline, mode="speculative", scheduler="ddpm", k=3, num_inference_steps=50).report
    assert report.accepted is not None and report.rounds < 45
    drafts, kept = report.accepted["drafts"], report.accepted["kept"]
    assert drafts == report.evaluations - report.rounds > kept == 50 - report.rounds
    assert 0 < report.accepted["median"] <= report.accepted["p90"] <= report.accepted["max"] < 6


def test_speculative_images_depend_on_seed_and_k_alone(pipeline: Pipeline) -> None:
    options: dict[str, Any] = {"mode": "speculative", "scheduler": "ddpm", "k": 3, "num_inference_steps": 30}
    both = draw(pipeline, seed=4, num_images_per_prompt=2, **options)
    first = draw(pipeline, seed=4, **options)
    assert_near(both.latents[:1], first.latents, 1e-4)
    assert_near(draw(pipeline, seed=4, lanes=1, **options).latents, first.latents, 1e-4)
    sequential = draw(pipeline, seed=4, **{**options, "mode": "sequential"})
    assert np.abs(sequential.latents - first.latents).max() > 0.1  # another image of the same law
    with pytest.raises(ParameterError, match="speculative needs a scheduler that adds noise"):
        draw(pipeline, mode="speculative")
    with pytest.raises(ParameterError, match="speculative is exact and has no tolerance"):
        draw(pipeline, mode="speculative", scheduler="ddpm", tolerance=0.1)


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_rest(pipeline: Pipeline) -> None:
    long = "a large red star at the left on blue background and " * 3 + "a small white ring"
    result = draw(pipeline, long)
    (warning,) = result.report.warnings
    assert "longer than 32 tokens" in warning and warning.endswith("a small white ring'")
    assert not draw(pipeline).report.warnings


def test_prompts_become_the_ids_that_transformers_gives(pipeline: Pipeline) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(EMBEDDED["shapes"] / "tokenizer")
    prompts = ["", PROMPT, "A LARGE  star!?", "zebra's Ünïcode 12 星", "red " * 50]
    expected = theirs(prompts, padding="max_length", max_length=32, truncation=True, return_tensors="np").input_ids
    ids, _ = pipeline._tokenizer(prompts)
    assert np.array_equal(ids["input_ids"], expected)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"mode": "fast"}, "mode", "use one of auto, sequential, conservative, aggressive"),
        ({"drafts": "linear"}, "drafts", "use one of auto, frozen"),
        ({"mode": "aggressive", "k": 0}, "k", "from 1"),
        ({"k": 2}, "k", "auto chooses k itself"),
        ({"tolerance": -0.1}, "tolerance", "at least 0"),
        ({"eta": 2.0}, "eta", "from 0 to 1"),
        ({"mode": "srds", "blocks": 0}, "blocks", "from 1"),
        ({"mode": "srds", "scheduler": "dpm++2m", "num_inference_steps": 9}, "mode", "loses its history"),
        ({"num_inference_steps": 0}, "num_inference_steps", "from 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "from 1 to 1000"),
        ({"num_inference_steps": 1000}, "num_inference_steps", "use fewer steps"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale", "finite"),
        ({"guidance_scale": "4"}, "guidance_scale", "finite"),
        ({"seed": -2}, "seed", "from -1 to 18446744073709551615"),
        ({"seed": 2**64}, "seed", "from -1"),
        ({"seed": True}, "seed", "whole number"),
        ({"scheduler": "heun3"}, "scheduler", "name one of ddim, ddpm"),
        ({"width": 63}, "width", "32 to 128 pixels in steps of 16"),
        ({"height": 144}, "height", "32 to 128 pixels in steps of 16"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt", "from 1"),
        ({"latents": np.zeros((1, 4, 8, 8), np.float32)}, "latents", r"shape \(1, 4, 16, 16\)"),
        ({"latents": np.full((1, 4, 16, 16), np.nan, np.float32)}, "latents", "NaN"),
        ({"prompt": None}, "prompt", "either prompt or prompt_embeds"),
        ({"prompt": []}, "prompt", "string"),
        ({"prompt": [1]}, "prompt", "string"),
        ({"negative_prompt": 3}, "negative_prompt", "string"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 3, 128))}, "prompt_embeds", "shape"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    options: dict[str, Any], param: str, message: str, pipeline: Pipeline
) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        pipeline.generate(**{"prompt": PROMPT, "num_inference_steps": 2, **options})
    assert caught.value.param == param


def test_a_lane_that_dies_costs_no_image(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made again on the other lane, the report says so, and the lane stays out."""
    pipeline = Pipeline(shapes, "cpu*2")
    wanted = draw(pipeline, mode="aggressive", k=2)
    backend, calls = pipeline.backend, []

    def dies(run: Callable[[], None]) -> Callable[[], None]:
        def broken() -> None:
            calls.append(0)
            if len(calls) == 3:
                raise DeviceError("the second lane has burnt out")
            run()

        return broken

    assert isinstance(backend, HostBackend)
    bind = backend._lanes[1].bind
    monkeypatch.setattr(backend._lanes[1], "bind", lambda inputs, output: dies(bind(inputs, output)), raising=False)
    backend._bound.clear()
    got = draw(pipeline, mode="aggressive", k=2)
    assert np.allclose(got.latents, wanted.latents, atol=1e-4)
    assert got.report.lanes == 1
    assert "cpu/1 stopped working (the second lane has burnt out)" in got.report.warnings[0]
    assert pipeline.lost == ("cpu/1",)
    again = draw(pipeline, mode="aggressive", k=2)
    assert not again.report.warnings
    pipeline.close()


def test_an_error_that_is_no_lanes_is_not_hidden(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(shapes, "cpu*2")
    monkeypatch.setattr(pipeline.backend, "combine", lambda *_: (_ for _ in ()).throw(DeviceError("no such luck")))
    with pytest.raises(DeviceError, match="no such luck"):
        draw(pipeline)
    assert pipeline.lost == ()
    pipeline.close()


def test_a_pipeline_closes_itself_and_says_what_it_is(shapes: Bundle) -> None:
    with Pipeline.load("shapes", "cpu", str(shapes.folder.parent)) as loaded:
        assert repr(loaded) == "<Pipeline shapes (StableDiffusionPipeline) on cpu/0>"
        assert len(draw(loaded).images) == 1
    assert repr(loaded) == "<Pipeline shapes (StableDiffusionPipeline) closed>"
    loaded.close()
    with pytest.raises(DeviceError, match="closed"):
        draw(loaded)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", "a \udcff star"), ("prompt", ["a star", "\ud800"]), ("negative_prompt", "\udfff")]
)
def test_text_that_is_no_unicode(pipeline: Pipeline, field: str, value: str | list[str]) -> None:
    """As a shell passes bytes that are no UTF-8, and JSON a lone surrogate."""
    options: dict[str, Any] = {"prompt": PROMPT, field: value}
    with pytest.raises(ParameterError, match=rf"{field} is no valid Unicode: .*ud.* at character \d") as error:
        pipeline.generate(**options)
    assert error.value.param == field
