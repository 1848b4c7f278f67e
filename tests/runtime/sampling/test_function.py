"""The algorithms on a plain function, and the noise that they draw."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from engines.errors import NonFiniteError, ParameterError
from engines.manifest import Manifest
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.function import sample
from runtime.sampling.noise import gaussian, step_noise
from runtime.sampling.operations import Options
from runtime.sampling.samplers import SAMPLERS
from runtime.sampling.schedulers import make_schedule
from tests import transcription
from tests.transcription import stable_diffusion_alphas_cumprod

MEANS = np.random.default_rng(0).standard_normal((12, 16))
ALPHAS = stable_diffusion_alphas_cumprod()


def mixture(states: Array, timesteps: Array) -> Array:
    """The exact noise prediction for a mixture of twelve narrow Gaussians in 16 dimensions."""
    abar = ALPHAS[timesteps.astype(int)][:, None]
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    variance = alpha**2 * 0.1**2 + sigma**2
    distances = ((states[:, None] - alpha[:, :, None] * MEANS) ** 2).sum(-1) / (2 * variance)
    weights = np.exp(distances.min(1, keepdims=True) - distances)
    mean = weights / weights.sum(1, keepdims=True) @ MEANS
    result: Array = (sigma * (states - alpha * mean) / variance).astype(np.float32)
    return result


def distances(manifest: Manifest, scheduler: str, steps: int, mode: str, **options: Any) -> float:
    """Median distance to sequential over 64 samples."""
    schedule = make_schedule(manifest, scheduler, steps)
    noise = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)
    exact, _ = sample(mixture, noise, schedule, mode="sequential", seed=3)
    result, _ = sample(mixture, noise, schedule, mode=mode, seed=3, **options)
    return float(np.median(np.linalg.norm(result - exact, axis=1) / np.linalg.norm(exact, axis=1)))


def test_sequential_equals_the_transcription(manifest: Manifest) -> None:
    noise = np.random.default_rng(5).standard_normal((3, 16)).astype(np.float32)
    result, counts = sample(mixture, noise, make_schedule(manifest, "ddim", 20), mode="sequential")

    def model(x: transcription.Array, t: float) -> transcription.Array:
        return mixture(x.astype(np.float32), np.full(len(x), t, np.float32)).astype(np.float64)

    expected, rounds = transcription.sequential(
        model, noise.astype(np.float64), transcription.ddim_schedule(np.array(manifest.alphas_cumprod), 20)
    )
    np.testing.assert_allclose(result, expected, atol=1e-4)
    assert counts.rounds == counts.evaluations == rounds


@pytest.mark.parametrize("mode", ["conservative", "aggressive"])
@pytest.mark.parametrize(("steps", "k"), [(50, 2), (50, 3), (50, 4), (28, 2), (28, 3)])
def test_other_drafts_than_the_papers_come_closer(mode: str, steps: int, k: int, manifest: Manifest) -> None:
    """On narrow mixtures, which is what the local variance is about."""
    frozen, corrected, extrapolated = (
        distances(manifest, "ddim", steps, mode, k=k, drafts=kind) for kind in ("frozen", "corrected", "extrapolated")
    )
    assert frozen > 2 * corrected > 0
    assert frozen > 0.97 * extrapolated > 0


@pytest.mark.parametrize("scheduler", ["ddpm", "euler_a"])
@pytest.mark.parametrize("mode", ["conservative", "aggressive"])
def test_drafts_with_the_noise_of_the_refined_steps_beat_fresh_noise(
    mode: str, scheduler: str, manifest: Manifest
) -> None:
    shared = distances(manifest, scheduler, 50, mode, k=4, drafts="frozen")
    assert distances(manifest, scheduler, 50, mode, k=4, drafts="fresh") > 5 * shared
    assert distances(manifest, scheduler, 50, mode, k=4, drafts="corrected") < shared


@pytest.mark.parametrize("mode", SAMPLERS)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_every_sampler_plays_every_kind_of_drafts(mode: str, drafts: str, manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "euler_a", 13)
    noise = np.random.default_rng(2).standard_normal((2, 16)).astype(np.float32)
    if mode == "adaptive" and DRAFTS[drafts].extrapolates:
        with pytest.raises(ParameterError, match="no anchors"):
            sample(mixture, noise, schedule, mode=mode, k=3, drafts=drafts)
        return
    if mode == "speculative" and drafts not in ("auto", "frozen", "corrected"):
        with pytest.raises(ParameterError, match="use frozen or corrected"):
            sample(mixture, noise, schedule, mode=mode, k=3, drafts=drafts)
        return
    result, counts = sample(mixture, noise, schedule, mode=mode, k=3, drafts=drafts)
    assert np.isfinite(result).all() and counts.rounds <= 13 * (2 if mode == "adaptive" else 1)


def test_a_state_does_not_depend_on_its_neighbours(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "euler_a", 20)
    noise = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    measuring: list[dict[str, Any]] = [
        {"mode": "adaptive", "k": 4, "tolerance": 0.05},
        {"mode": "srds", "tolerance": 0.01},
    ]
    for options in measuring:
        together, _ = sample(mixture, noise, schedule, seed=1, **options)
        alone, _ = sample(mixture, noise[:1], schedule, seed=1, **options)
        np.testing.assert_array_equal(together[:1], alone)


def test_bad_input_is_named(manifest: Manifest) -> None:
    schedule, noise = make_schedule(manifest, "ddim", 5), np.zeros((1, 16), np.float32)
    with pytest.raises(ParameterError, match="unknown mode 'fast'"):
        sample(mixture, noise, schedule, mode="fast")
    with pytest.raises(ParameterError, match="unknown drafts 'better'"):
        sample(mixture, noise, schedule, mode="aggressive", drafts="better")
    for name, value in (
        ("k", 0), ("k", 2.5), ("tolerance", -1), ("tolerance", float("nan")), ("blocks", -2), ("iterations", 0),
        ("seed", -1),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=name) as caught:
            sample(mixture, noise, schedule, mode="srds", **{name: value})  # type: ignore[arg-type]
        assert caught.value.param == name
    for shape in ((), (16,), (0, 16)):
        with pytest.raises(ParameterError, match=r"noise must be finite and of shape \(images, …\)"):
            sample(mixture, np.zeros(shape, np.float32), schedule, mode="sequential")
    with pytest.raises(ParameterError, match=r"one output per state, \(2, 16\), not \(1, 16\)"):
        sample(lambda states, timesteps: states[:1], noise.repeat(2, 0), schedule, mode="sequential")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        sample(lambda states, timesteps: states * np.float32(np.nan), noise, schedule, mode="sequential")


def test_noise_depends_on_seed_image_and_step_alone(manifest: Manifest) -> None:
    schedule = make_schedule(manifest, "ddpm", 7)
    both = dict(step_noise(schedule, Options(drafts="fresh"), 9, [3, 5], (4, 2)))
    alone = dict(step_noise(schedule, Options(), 9, [5], (4, 2)))
    assert len(both) == 2 * len(alone) == 2 * len(schedule.stochastic_steps)
    for slot, value in alone.items():
        np.testing.assert_array_equal(both[slot][1:], value)
    drawn = [gaussian(9, 5, 0, (4, 2)), *(row for value in both.values() for row in value)]
    assert len({value.tobytes() for value in drawn}) == len(drawn)


def test_the_samplers_alone_need_no_onnx_runtime() -> None:
    code = "import sys, runtime.sampling.function; print('onnxruntime' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
