"""Mode speculative: its samples have the law of sequential ones, which wrong rules are seen not to have."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from engines.errors import ParameterError
from runtime.sampling import speculative as module
from runtime.sampling.function import sample
from runtime.sampling.noise import gaussian, uniforms
from runtime.sampling.operations import STATE, Options
from runtime.sampling.samplers import check
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import schedule_from_config
from tests.runtime.sampling.crowd import Crowd, Mixture, p_values
from tests.transcription import stable_diffusion_alphas_cumprod

SAMPLES = 20_000
CONFIG = {"_class_name": "DDPMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000}  # fmt: skip


def schedule(steps: int, name: str = "ddpm", eta: float = 0.0) -> Schedule:
    return schedule_from_config(CONFIG, stable_diffusion_alphas_cumprod().tolist(), steps, scheduler=name, eta=eta)


def mixture(dimensions: int) -> Mixture:
    means = np.random.default_rng(dimensions).standard_normal((5, dimensions)).astype(np.float32)
    return Mixture(means * np.float32(2 / dimensions**0.5), 0.3)


WRONG: dict[str, Any] = {
    "accept always": ("keeps", lambda inner, square, sigma, uniform: np.True_),
    "no reflection": ("reflection", lambda inner, square, sigma: 0.0 * inner),
    "reflect without the sign": ("reflection", lambda inner, square, sigma: -2 * sigma * inner / square),
}


@cache
def sequential(dimensions: int, plan: Schedule) -> Array:
    return Crowd(mixture(dimensions), plan, SAMPLES, 1).sequential()


def assert_same_law(dimensions: int, plan: Schedule, options: Options) -> None:
    samples, counted = Crowd(mixture(dimensions), plan, SAMPLES, 2).speculative(options)
    found = p_values(sequential(dimensions, plan), samples)
    assert min(found.values()) > 0.001, found
    assert abs(counted.kept - counted.expected) < 4 * counted.variance**0.5, "kept with another chance than 2Φ(−‖Δ‖/2)"
    assert 0.3 < counted.kept / counted.tested < 0.999, "a test of nothing"
    assert plan.steps / options.k < counted.rounds < plan.steps


@pytest.mark.parametrize("drafts", ["frozen", "corrected"])
@pytest.mark.parametrize(("dimensions", "k"), [(2, 4), (16, 2)])
def test_samples_have_the_law_of_sequential_ones(dimensions: int, k: int, drafts: str) -> None:
    assert_same_law(dimensions, schedule(20), Options(k=k, drafts=drafts))


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize(("dimensions", "steps"), [(d, n) for d in (2, 16, 256) for n in (20, 50, 200)])
def test_samples_have_the_law_of_sequential_ones_everywhere(dimensions: int, steps: int, k: int) -> None:
    plan = schedule(steps)
    last = {2: 200, 16: 80, 256: 10}[dimensions]  # from an exact sample of the state before them
    plan = replace(plan, rows=plan.rows[-last:])
    assert_same_law(dimensions, plan, Options(k=k))


@pytest.mark.parametrize(("name", "eta"), [("euler_a", 0.0), ("ddim", 0.5), ("dpm++2m_sde", 0.0)])
def test_every_scheduler_that_adds_noise(name: str, eta: float) -> None:
    assert_same_law(2, schedule(20, name, eta), Options(k=4, drafts="corrected"))


def test_a_step_without_noise_ends_the_drafts() -> None:
    plan = schedule(20)
    plan = replace(plan, rows=(*plan.rows[:9], replace(plan.rows[9], fresh=0.0), *plan.rows[10:]))
    rounds = module.Speculation(plan, Options(k=4))
    assert [rounds.position(i).ahead for i in (5, 6, 7, 8, 9, 10, 16, 17, 18, 19)] == [3, 3, 2, 1, 0, 3, 3, 2, 1, 0]
    assert_same_law(2, plan, Options(k=4))


@pytest.mark.parametrize("dimensions", [2, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", WRONG)
def test_wrong_rules_are_seen(rule: str, dimensions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, *WRONG[rule])
    samples, _ = Crowd(mixture(dimensions), schedule(20), SAMPLES, 2).speculative(Options(k=4))
    assert min(p_values(sequential(dimensions, schedule(20)), samples).values()) < 0.001


class Drawn(Crowd):
    """Samples with the noise that the engine draws for images."""

    def noise(self, step: int) -> Array:
        shape = self.mixture.means.shape[1:]
        return np.stack([gaussian(self.seed, image, step + 1, shape) for image in range(self.samples)])

    def uniforms(self) -> Any:
        return np.array([uniforms(self.seed, image, self.schedule.steps) for image in range(self.samples)])


@pytest.mark.parametrize(("name", "eta"), [("ddpm", 0.0), ("euler_a", 0.0), ("ddim", 1.0), ("dpm++2m_sde", 0.0)])
def test_the_engine_plays_what_was_proved(name: str, eta: float) -> None:
    plan, known, k = schedule(20, name, eta), mixture(16), 4
    crowd = Drawn(known, plan, 40, 3)
    start = crowd.slots[STATE] / np.float32(plan.init_noise_sigma)
    wanted, counted = crowd.speculative(Options(k=k, drafts="corrected"))
    rows = {row.timestep: row for row in plan.rows}

    def model(x: Array, timesteps: Array) -> Array:
        (row,) = {rows[float(t)] for t in timesteps}
        return known.noise(x, row.alpha, row.sigma)

    found, counts = sample(one_by_one(model), start, plan, mode="speculative", k=k, drafts="corrected", seed=3)
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    assert counts.rounds == round(40 * counted.rounds)
    assert len(counts.accepted) == 40 * plan.steps - counts.rounds
    assert min(counts.accepted) > 0 and max(counts.accepted) < 6


def one_by_one(model: Any) -> Any:
    return lambda x, timesteps: np.concatenate([model(x[n : n + 1], timesteps[n : n + 1]) for n in range(len(x))])


def test_one_draft_per_round_is_sequential() -> None:
    rng = np.random.default_rng(1)
    noise, plan, known = rng.standard_normal((3, 16), np.float32), schedule(20), mixture(16)
    rows = {row.timestep: row for row in plan.rows}

    def model(x: Array, timesteps: Array) -> Array:
        row = rows[float(timesteps[0])]
        return known.noise(x, row.alpha, row.sigma)

    found, counts = sample(one_by_one(model), noise, plan, mode="speculative", k=1)
    wanted, _ = sample(one_by_one(model), noise, plan, mode="sequential")
    np.testing.assert_array_equal(found, wanted)
    assert counts.rounds == counts.evaluations == 3 * 20


def test_uniform_numbers_are_a_stream_of_their_own() -> None:
    first = uniforms(1, 0, 50)
    assert first == uniforms(1, 0, 50) == uniforms(1, 0, 80)[:50] and all(0 <= one < 1 for one in first)
    assert not set(first) & {*uniforms(1, 1, 50), *uniforms(2, 0, 50)}


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        (
            "ddim",
            {},
            "needs a scheduler that adds noise, and ddim adds none: use ddpm, euler_a, or ddim with eta above 0",
        ),
        ("euler", {}, "euler adds none"),
        ("ddpm", {"tolerance": 0.1}, "is exact and has no tolerance"),
        ("ddpm", {"drafts": "fresh"}, "cannot use fresh drafts: use frozen or corrected"),
        ("ddpm", {"drafts": "extrapolated"}, "cannot use extrapolated drafts"),
        ("lcm", {}, "too long to draft"),
    ],
)
def test_what_it_cannot_play_says_why(scheduler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        check("speculative", schedule(12, scheduler), Options(k=2, **options))
