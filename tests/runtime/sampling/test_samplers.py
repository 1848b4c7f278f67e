"""Samplers, placement and execution against the independent transcription of the paper's listings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engines.base import Array, Branch
from engines.errors import ParameterError
from engines.host import FunctionLane, HostBackend
from engines.manifest import Manifest
from engines.null import CallCosts, NullBackend
from runtime.sampling.execute import Counts, execute
from runtime.sampling.operations import STATE, Combine, Options, Predict, fresh
from runtime.sampling.place import place
from runtime.sampling.program import program
from runtime.sampling.samplers import SAMPLERS, check
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import make_schedule
from tests import transcription

STEPS = (1, 2, 7, 28, 50)
KS = range(1, 9)
SHAPE = (1, 4, 6, 5)
GUIDANCE = 4.0


def predictor(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
    """A smooth non-linear function that mixes neighbours and depends on timestep and conditioning."""
    t = timestep.reshape(-1, 1, 1, 1) / 1000
    c = conditioning["c"].reshape(-1, 1, 1, 1)
    mixed = sample + 0.3 * np.roll(sample, 1, axis=-1)
    return (np.tanh(mixed * (0.6 + 0.4 * t) + c) + 0.1 * np.sin(3 * sample)).astype(np.float32)


def guided(x: transcription.Array, t: float) -> transcription.Array:
    """What the transcription calls the model: ε after guidance, batch of one, float64."""
    branches = [
        predictor(x.astype(np.float32), np.array([t], np.float32), {"c": np.array([c], np.float32)}) for c in (0.0, 0.5)
    ]
    return (1 - GUIDANCE) * branches[0].astype(np.float64) + GUIDANCE * branches[1]


def play(schedule: Schedule, mode: str, k: int, lanes: int, noise: Array, guidance: float = GUIDANCE) -> Array:
    backend = HostBackend([FunctionLane(predictor) for _ in range(lanes)])
    try:
        backend.bind(noise.shape, schedule.timesteps, [{"c": np.array([c], np.float32)} for c in (0.0, 0.5)])
        backend.write(STATE, noise)
        execute(program(mode, schedule, Options(k), guidance), backend, lambda finished: None)
        return backend.read(STATE)
    finally:
        backend.close()


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("steps", STEPS)
def test_latents_equal_the_transcription(steps: int, lanes: int, manifest: Manifest, rng: np.random.Generator) -> None:
    schedule = make_schedule(manifest, "ddim", steps)
    reference = transcription.ddim_schedule(np.array(manifest.alphas_cumprod), steps)
    noise = rng.standard_normal(SHAPE, np.float32)
    exact = transcription.sequential(guided, noise.astype(np.float64), reference)[0]
    assert_close(play(schedule, "sequential", 1, lanes, noise), exact)
    for k in KS:
        for mode, listing in (("conservative", transcription.conservative), ("aggressive", transcription.aggressive)):
            expected, _ = listing(guided, noise.astype(np.float64), reference, k)
            assert_close(play(schedule, mode, k, lanes, noise), expected)


@pytest.mark.parametrize("first", [(1,), (2, 3), (6, 1, 1), (1, 2, 3, 4, 5), (99,)])
@pytest.mark.parametrize("mode", ["conservative", "aggressive"])
def test_blocks_of_other_sizes_equal_the_transcription(
    mode: str, first: tuple[int, ...], manifest: Manifest, rng: np.random.Generator
) -> None:
    for steps in (1, 2, 7, 28):
        schedule = make_schedule(manifest, "ddim", steps)
        reference = transcription.ddim_schedule(np.array(manifest.alphas_cumprod), steps)
        noise = rng.standard_normal(SHAPE, np.float32)
        listing = {"conservative": transcription.conservative, "aggressive": transcription.aggressive}[mode]
        expected, rounds = listing(guided, noise.astype(np.float64), reference, 3, first)
        latents, counts = play_any(schedule, mode, Options(k=3, first_blocks=first), noise)
        assert counts.rounds == rounds
        assert_close(latents, expected)


@pytest.mark.parametrize("first", [(0,), (-1, 2), (1.5,), (True,)])
def test_blocks_that_cannot_be(first: Any, manifest: Manifest) -> None:
    with pytest.raises(ParameterError, match="first_blocks must be whole numbers of at least 1"):
        check("aggressive", make_schedule(manifest, "ddim", 9), Options(first_blocks=first))


def test_only_blocks_of_drafts_have_sizes(manifest: Manifest) -> None:
    with pytest.raises(ParameterError, match="adaptive has no blocks of drafts"):
        check("adaptive", make_schedule(manifest, "ddim", 9), Options(first_blocks=(1,)))


def assert_close(actual: Array, expected: transcription.Array) -> None:
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["conservative", "aggressive"])
def test_drafting_changes_the_result_and_one_draft_does_not(
    mode: str, manifest: Manifest, rng: np.random.Generator
) -> None:
    """The comparison above could not fail if drafts were not used at all."""
    schedule = make_schedule(manifest, "ddim", 28)
    noise = rng.standard_normal(SHAPE, np.float32)
    sequential = play(schedule, "sequential", 1, 2, noise)
    assert np.abs(play(schedule, mode, 1, 2, noise) - sequential).max() <= 1e-4 * np.abs(sequential).max()
    assert np.abs(play(schedule, mode, 4, 2, noise) - sequential).max() > 1e-3 * np.abs(sequential).max()


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_guidance_of_at_most_one_is_one_half(guidance: float, manifest: Manifest, rng: np.random.Generator) -> None:
    schedule = make_schedule(manifest, "ddim", 5)
    noise = rng.standard_normal(SHAPE, np.float32)
    reference = transcription.ddim_schedule(np.array(manifest.alphas_cumprod), 5)

    def conditional(x: transcription.Array, t: float) -> transcription.Array:
        c = {"c": np.array([0.5], np.float32)}
        return predictor(x.astype(np.float32), np.array([t], np.float32), c).astype(np.float64)

    expected, _ = transcription.aggressive(conditional, noise.astype(np.float64), reference, 2)
    assert_close(play(schedule, "aggressive", 2, 2, noise, guidance), expected)


@pytest.mark.parametrize("mode", ["sequential", "conservative", "aggressive"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 9, 28, 50])
def test_counts_equal_the_closed_forms(mode: str, steps: int, manifest: Manifest) -> None:
    def rounds(k: int) -> int:
        if mode == "sequential":
            return steps
        closed = transcription.rounds_conservative if mode == "conservative" else transcription.rounds_aggressive
        return closed(steps, k)

    schedule = make_schedule(manifest, "ddim", steps)
    for k in (1, 2, 3, 5, 8, 60):
        for lanes in (1, 2, 3, 16):
            backend = NullBackend(lanes, CallCosts(float))
            backend.bind(SHAPE, schedule.timesteps, ())
            backend.write(STATE, np.zeros(SHAPE, np.float32))
            finished: list[int] = []
            counts = execute(program(mode, schedule, Options(k), GUIDANCE), backend, finished.append)
            assert (counts.rounds, counts.evaluations) == (rounds(k), steps)
            assert backend.rounds == counts.rounds and backend.branches == 2 * steps and backend.calls == counts.calls
            assert finished == sorted(set(finished)) and finished[-1] == steps
            if lanes == 1:
                assert backend.seconds == 2 * steps, "one lane works through every branch, whatever the sampler"


def test_rounds_of_aggressive_write_one_combination_each(manifest: Manifest) -> None:
    """Refining a block and drafting the next is one pass over memory."""
    operations = list(SAMPLERS["aggressive"](make_schedule(manifest, "ddim", 50), Options(4)))
    assert sum(isinstance(op, Combine) for op in operations) == sum(isinstance(op, Predict) for op in operations)


@pytest.mark.parametrize("lanes", range(1, 9))
@pytest.mark.parametrize("count", range(1, 20))
def test_placement_is_even_complete_and_ordered(count: int, lanes: int) -> None:
    branches = tuple(Branch("x", n, f"noise {n}", n % 2) for n in range(count))
    for held in (range(lanes), range(0, lanes, 2), range(lanes - 1, lanes)):
        calls = place(branches, held, lanes)
        assert tuple(branch for call in calls for branch in call) == branches
        sizes = [len(calls[lane]) for lane in held]
        assert len(calls) == lanes and sum(sizes) == count, "nothing runs on lanes that are not held"
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 28, 50, 333, 999])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_sequential_equals_diffusers(
    steps: int, set_alpha_to_one: bool, manifest: Manifest, rng: np.random.Generator
) -> None:
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=set_alpha_to_one, timestep_spacing="leading",
    )  # fmt: skip
    own = manifest.model_copy(
        update={
            "alphas_cumprod": tuple(scheduler.alphas_cumprod.tolist()),
            "scheduler": {**manifest.scheduler, "set_alpha_to_one": set_alpha_to_one},
        }
    )
    schedule = make_schedule(own, "ddim", steps)
    noise = rng.standard_normal(SHAPE, np.float32)
    x = noise * np.float32(scheduler.init_noise_sigma)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        noise_prediction = torch.from_numpy(guided(x.astype(np.float64), float(t)).astype(np.float32))
        x = scheduler.step(noise_prediction, t, torch.from_numpy(x)).prev_sample.numpy()
    assert schedule.timesteps == tuple(map(float, scheduler.timesteps.tolist()))
    assert_close(play(schedule, "sequential", 1, 2, noise), x.astype(np.float64))


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        ("heun3", 50, "unknown scheduler 'heun3'; name one of ddim, ddpm"),
        ("magic", 50, "unknown scheduler 'magic'; name one of ddim, ddpm"),
        (None, 0, "must be 1 to 1000, not 0"),
        (None, 1001, "must be 1 to 1000, not 1001"),
        (None, 1000, "leading spacing with steps_offset 1 cannot give 1000 different steps .* use fewer"),
    ],
)
def test_a_schedule_that_cannot_be_made_says_why(
    scheduler: str | None, steps: int, message: str, manifest: Manifest
) -> None:
    with pytest.raises(ParameterError, match=message):
        make_schedule(manifest, scheduler, steps)


@pytest.mark.parametrize(
    "field",
    [
        {"clip_sample": True},
        {"thresholding": True},
        {"timestep_spacing": "even"},
        {"prediction_type": "other"},
        {"rescale_betas_zero_snr": True},
        {"new_field": 3},
    ],
)
def test_a_scheduler_field_that_would_change_the_result_is_refused(
    field: dict[str, object], manifest: Manifest
) -> None:
    other = manifest.model_copy(update={"scheduler": {**manifest.scheduler, **field}})
    with pytest.raises(ParameterError, match=next(iter(field))):
        make_schedule(other, None, 50)


def test_a_plan_that_reads_an_unwritten_slot_is_caught(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "ddim", 3)
    backend = NullBackend(2)
    backend.bind(SHAPE, schedule.timesteps, ())
    with pytest.raises(AssertionError, match="'x' is read but was never written"):
        execute(program("sequential", schedule, Options(), GUIDANCE), backend, lambda finished: None)


def test_two_halves_in_one_slot_are_caught() -> None:
    backend = NullBackend(1)
    backend.bind(SHAPE, (1.0,), ())
    backend.write("x", np.zeros(SHAPE, np.float32))
    branch = Branch("x", 0, "noise/0", 0)
    with pytest.raises(AssertionError, match="write the same slot"):
        backend.predict([[branch, replace_conditioning(branch)]])


def replace_conditioning(branch: Branch) -> Branch:
    return branch._replace(conditioning=1)


def test_schedules_are_values(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, None, 50)
    assert schedule == make_schedule(manifest, "ddim", 50) != replace(schedule, name="other")


def play_any(schedule: Schedule, mode: str, options: Options, noise: Array, lanes: int = 2) -> tuple[Array, Counts]:
    """One image of any sampler with noise of its own for stochastic steps, and what it cost."""
    backend = HostBackend([FunctionLane(predictor) for _ in range(lanes)])
    try:
        backend.bind(noise.shape, schedule.timesteps, [{"c": np.array([c], np.float32)} for c in (0.0, 0.5)])
        backend.write(STATE, noise * np.float32(schedule.init_noise_sigma))
        for step in schedule.stochastic_steps:
            backend.write(fresh(step), np.random.default_rng(step).standard_normal(noise.shape, np.float32))
        counts = execute(program(mode, schedule, options, GUIDANCE), backend, lambda finished: None)
        return backend.read(STATE), counts
    finally:
        backend.close()


SINGLE_STEP = [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("euler", 0.0), ("euler_a", 0.0)]


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize(("name", "eta"), SINGLE_STEP)
def test_srds_to_the_end_is_sequential_to_the_bit(
    name: str, eta: float, pipelined: bool, manifest: Manifest, rng: np.random.Generator
) -> None:
    """Every number of blocks that fits, for odd lengths too; the placement is one branch per call for both."""
    for steps in (1, 2, 3, 7, 10, 13, 25):
        schedule = make_schedule(manifest, name, steps, eta=eta)
        noise = rng.standard_normal(SHAPE, np.float32)
        expected, _ = play_any(schedule, "sequential", Options(), noise)
        for blocks in {None, *(math.ceil(steps / size) for size in range(1, steps + 1))}:
            options = Options(blocks=blocks, pipelined=pipelined)
            actual, counts = play_any(schedule, "srds", options, noise)
            assert (actual == expected).all(), (steps, blocks, np.abs(actual - expected).max())
            if pipelined:
                assert counts.rounds == steps


def test_srds_rounds_equal_the_closed_forms_and_iterations_come_closer(
    manifest: Manifest, rng: np.random.Generator
) -> None:
    schedule = make_schedule(manifest, "ddim", 49)
    noise = rng.standard_normal(SHAPE, np.float32)
    expected, _ = play_any(schedule, "sequential", Options(), noise)
    size, blocks = 7, 7
    before = np.inf
    for p in range(1, 7):
        fast, counts = play_any(schedule, "srds", Options(iterations=p), noise)
        plain, plain_counts = play_any(schedule, "srds", Options(iterations=p, pipelined=False), noise)
        assert counts.rounds == p * size + blocks - p
        assert plain_counts.rounds == blocks + p * (size + blocks)
        assert_close(fast, plain.astype(np.float64))
        error = float(np.linalg.norm(fast - expected))
        assert error < before or error < 1e-4
        before = error


@pytest.mark.parametrize("pipelined", [True, False])
def test_srds_stops_at_its_tolerance(pipelined: bool, manifest: Manifest, rng: np.random.Generator) -> None:
    schedule = make_schedule(manifest, "ddim", 49)
    noise = rng.standard_normal(SHAPE, np.float32)
    result, counts = play_any(schedule, "srds", Options(tolerance=1e-2, pipelined=pipelined), noise)
    (change,) = counts.accepted
    assert change <= 1e-2
    stopped = next(
        p for p in range(1, 7)
        if (play_any(schedule, "srds", Options(iterations=p, pipelined=pipelined), noise)[0] == result).all()
    )  # fmt: skip
    law = stopped * 7 + 7 - stopped + 1 if pipelined else 7 + stopped * 14  # one round was under way
    assert counts.rounds == law < 49 + 14


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpm++2m"])
def test_adaptive_with_tolerance_zero_is_sequential(name: str, manifest: Manifest, rng: np.random.Generator) -> None:
    for steps in (1, 2, 7, 28):
        schedule = make_schedule(manifest, name, steps)
        noise = rng.standard_normal(SHAPE, np.float32)
        expected, _ = play_any(schedule, "sequential", Options(), noise)
        for k in (1, 2, 4):
            actual, counts = play_any(schedule, "adaptive", Options(k=k), noise)
            assert counts.rounds <= steps and not any(counts.accepted)  # a draft can be exact by chance
            assert_close(actual, expected.astype(np.float64))


def test_adaptive_trades_rounds_for_distance(manifest: Manifest, rng: np.random.Generator) -> None:
    schedule = make_schedule(manifest, "ddim", 50)
    noise = rng.standard_normal(SHAPE, np.float32)
    expected, _ = play_any(schedule, "sequential", Options(), noise)
    before = (50, 0.0)
    for tolerance in (1e-3, 1e-2, 1e-1, 10.0):
        result, counts = play_any(schedule, "adaptive", Options(k=4, tolerance=tolerance), noise)
        error = float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
        assert counts.rounds <= before[0] and all(distance <= tolerance for distance in counts.accepted)
        before = (counts.rounds, error)
    assert before[0] == 1 + math.ceil(49 / 4), "everything is accepted"
    assert before[1] > 1e-3


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpm++2m"])
@pytest.mark.parametrize("mode", ["conservative", "aggressive"])
def test_one_draft_is_sequential_for_every_scheduler(
    mode: str, name: str, manifest: Manifest, rng: np.random.Generator
) -> None:
    """With k = 1 a draft is the refined state itself, whatever the prediction type."""
    for kind in ("epsilon", "v_prediction", "sample"):
        own = manifest.model_copy(update={"scheduler": {**manifest.scheduler, "prediction_type": kind}})
        for steps in (1, 2, 7, 28):
            schedule = make_schedule(own, name, steps)
            noise = rng.standard_normal(SHAPE, np.float32)
            expected, _ = play_any(schedule, "sequential", Options(), noise)
            assert_close(play_any(schedule, mode, Options(k=1), noise)[0], expected.astype(np.float64))


@pytest.mark.parametrize("mode", ["conservative", "aggressive"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_a", "dpm++2m"])
def test_drafts_come_close_to_sequential_for_every_scheduler(
    mode: str, name: str, manifest: Manifest, rng: np.random.Generator
) -> None:
    for kind in ("epsilon", "v_prediction", "sample"):
        own = manifest.model_copy(update={"scheduler": {**manifest.scheduler, "prediction_type": kind}})
        schedule = make_schedule(own, name, 200)
        noise = rng.standard_normal(SHAPE, np.float32)
        expected, _ = play_any(schedule, "sequential", Options(), noise)
        errors = [
            np.linalg.norm(play_any(schedule, mode, Options(k=k), noise)[0] - expected) / np.linalg.norm(expected)
            for k in (2, 4)
        ]
        assert 0 < errors[0] < 0.1 and errors[1] < 0.25, (kind, errors)


@pytest.mark.parametrize(
    ("mode", "scheduler", "options", "message"),
    [
        ("srds", "dpm++2m", Options(), "loses its history"),
        ("srds", "ddim", Options(blocks=8), "12 steps cannot be cut into 8 blocks .* use one of 1, 2, 3, 4, 6, 12"),
        ("aggressive", "lcm", Options(), "too long to draft"),
    ],
)
def test_what_a_sampler_cannot_play_says_why(
    mode: str, scheduler: str, options: Options, message: str, manifest: Manifest
) -> None:
    with pytest.raises(ParameterError, match=message):
        check(mode, make_schedule(manifest, scheduler, 12), options)
