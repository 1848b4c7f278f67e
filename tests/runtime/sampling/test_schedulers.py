"""Every scheduler against diffusers' own `step`, and what a config cannot ask for."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest

from engines.errors import ParameterError
from runtime.sampling.rules import RULES, UNKNOWN
from runtime.sampling.schedulers import schedule_from_config, substitute
from runtime.sampling.spacing import CURVES
from tests.runtime.sampling.reference import INSIDE_DIFFUSERS, SHAPE, STABLE, diffusers_loop, play, play_in_float64

pytestmark = INSIDE_DIFFUSERS
UNCLIPPED = {**STABLE, "clip_sample": False}
SPACINGS = ("leading", "trailing", "linspace")
TYPES = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 7, 20, 28, 50)
SDE = {"algorithm_type": "sde-dpmsolver++"}
CURVED = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler")


def cases() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(class, config, arguments of step) for every scheduler, prediction type and spacing, and for its own options."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for spacing in SPACINGS:
        for kind in TYPES:
            common = {"timestep_spacing": spacing, "prediction_type": kind}
            for offset in (0, 1):
                for eta in (0.0, 0.5, 1.0):
                    found.append(("DDIMScheduler", UNCLIPPED | common | {"steps_offset": offset}, {"eta": eta}))
                found.append(("DDPMScheduler", UNCLIPPED | common | {"steps_offset": offset}, {}))
            found.append(("DDIMScheduler", UNCLIPPED | common | {"set_alpha_to_one": False}, {}))
            found.append(("DDPMScheduler", UNCLIPPED | common | {"variance_type": "fixed_large"}, {}))
            found.append(("EulerDiscreteScheduler", STABLE | common, {}))
            found.append(("EulerDiscreteScheduler", STABLE | common | {"use_karras_sigmas": True}, {}))
            found.append(("EulerDiscreteScheduler", STABLE | common | {"final_sigmas_type": "sigma_min"}, {}))
            for curve in ("use_exponential_sigmas", "use_beta_sigmas"):
                found.append(("EulerDiscreteScheduler", STABLE | common | {curve: True}, {}))
                bounds = {"sigma_min": 0.05, "sigma_max": 10.0}
                found.append(("EulerDiscreteScheduler", STABLE | common | bounds | {curve: True}, {}))
            if kind != "sample":  # diffusers has not written that one
                found.append(("EulerAncestralDiscreteScheduler", STABLE | common | {"steps_offset": 1}, {}))
            own: dict[str, Any]
            for own in (
                {}, {"use_karras_sigmas": True}, {"solver_type": "heun"}, {"final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min", "euler_at_final": True}, {"solver_order": 1},
                {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, {"steps_offset": 1},
                {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}, SDE, SDE | {"solver_type": "heun"},
                SDE | {"solver_order": 1}, SDE | {"use_karras_sigmas": True}, SDE | {"final_sigmas_type": "sigma_min"},
            ):  # fmt: skip
                found.append(("DPMSolverMultistepScheduler", STABLE | common | own, {}))
    found += multistep_cases()
    found += two_stage_cases()
    for spacing in SPACINGS:  # no signal at the last training timestep, which trailing spacing begins with
        for kind in ("v_prediction", "sample"):
            zero: dict[str, Any] = {
                "timestep_spacing": spacing, "prediction_type": kind, "rescale_betas_zero_snr": True,
            }  # fmt: skip
            found += [(name, UNCLIPPED | zero, {}) for name in ("DDIMScheduler", "DDPMScheduler")]
            for own in ({}, {"use_karras_sigmas": True}):
                found += [(name, STABLE | zero | own, {}) for name in CURVED]
            if kind != "sample":
                found.append(("EulerAncestralDiscreteScheduler", STABLE | zero, {}))
    for own in ({}, {"flow_shift": 3.0}, {"flow_shift": 3.0, "solver_order": 1}, {"flow_shift": 5.0} | SDE):
        flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        found.append(("DPMSolverMultistepScheduler", flow | own, {}))
    found += [("LCMScheduler", {"prediction_type": kind}, {}) for kind in TYPES]
    for own in (
        {}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 3.0, "shift_terminal": 0.1}, {"stochastic_sampling": True}, {"shift": 3.0, "use_karras_sigmas": True},
        {"shift": 3.0, "use_exponential_sigmas": True}, {"shift": 3.0, "use_beta_sigmas": True},
    ):  # fmt: skip
        found.append(("FlowMatchEulerDiscreteScheduler", own, {}))
    return found


def multistep_cases() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The solvers that read more than one step before, at every spacing for each prediction type."""
    zero: dict[str, Any] = {"final_sigmas_type": "sigma_min"}
    third: dict[str, Any] = {"solver_order": 3}
    curves: list[dict[str, Any]] = [{curve: True} for curve in CURVES]
    dpm = [third, third | SDE, third | zero, third | {"use_karras_sigmas": True}, third | {"lower_order_final": False}]
    deis = [{}, third, {"solver_order": 1}, third | {"lower_order_final": False}, *curves]
    unipc: list[dict[str, Any]] = [
        {}, third, third | zero, zero | {"lower_order_final": False}, {"disable_corrector": [0, 1]}, *curves,
        zero | {"use_karras_sigmas": True}, {"solver_order": 1},
    ]  # fmt: skip
    own: dict[str, Any]
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for n, kind in enumerate(TYPES):
        for m, spacing in enumerate(SPACINGS):
            common = STABLE | {"timestep_spacing": spacing, "prediction_type": kind}
            found += [("DPMSolverMultistepScheduler", common | own, {}) for own in dpm]
            found += [("DEISMultistepScheduler", common | own, {}) for own in deis]
            solver = {"solver_type": ("bh1", "bh2")[(n + m) % 2]}
            found += [("UniPCMultistepScheduler", common | solver | own, {}) for own in unipc]
            for own in [{}, *curves]:
                found.append(("LMSDiscreteScheduler", common | own, {}))
            if kind != "sample":
                for own in ({}, {"set_alpha_to_one": True}, {"steps_offset": 1}):
                    found.append(("PNDMScheduler", common | {"skip_prk_steps": True} | own, {}))
    flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    for own in [{}, third, {"flow_shift": 1.0}]:
        found.append(("DEISMultistepScheduler", flow | own, {}))
        found += [("UniPCMultistepScheduler", flow | own | {"solver_type": kind}, {}) for kind in ("bh1", "bh2")]
    return found


def two_stage_cases() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Two rows per step: every curve and prediction type at one spacing each, and no curve at every spacing."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for name in ("Heun", "KDPM2", "KDPM2Ancestral"):
        kinds = TYPES if name == "Heun" else TYPES[:2]
        options: list[dict[str, Any]] = [{}, {}, {"steps_offset": 1}, *({curve: True} for curve in CURVES)]
        for n, own in enumerate(options):
            common = STABLE | {"timestep_spacing": SPACINGS[n % 3], "prediction_type": kinds[n % len(kinds)]}
            found.append((f"{name}DiscreteScheduler", common | own, {}))
    return [*found, *(("FlowMatchHeunDiscreteScheduler", own, {}) for own in ({}, {"shift": 3.0}))]


@pytest.mark.parametrize(("name", "config", "step"), cases())
def test_sequential_equals_diffusers(
    name: str, config: dict[str, Any], step: dict[str, Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = getattr(diffusers, name)(**config)
    alphas = scheduler.alphas_cumprod.tolist() if hasattr(scheduler, "alphas_cumprod") else ()
    for steps in STEPS[1:] if config.get("shift_terminal") else STEPS:
        arguments: dict[str, Any] = {"image_seq_len": 1024} if config.get("use_dynamic_shifting") else {}
        schedule = schedule_from_config(
            {**scheduler.config, "_class_name": name}, alphas, steps, eta=step.get("eta", 0.0), **arguments
        )
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (1024 - 256)
        scheduler.set_timesteps(steps, **({"mu": mu} if config.get("use_dynamic_shifting") else {}))
        # σ² − σ_up² in float32 loses five of seven digits where one step goes from σ = 14.6 to 0.03; what is left
        # depends on the processor
        lossy = schedule.name == "kdpm2_a" and steps == 2
        times = scheduler.timesteps.numpy()
        np.testing.assert_allclose(schedule.timesteps, times, rtol=1e-6, atol=0.02 if lossy else 1e-4)
        noise = rng.standard_normal(SHAPE, np.float32)
        stages = RULES[schedule.name].stages  # the last row of a step adds noise
        z = {i: rng.standard_normal(SHAPE, np.float32) for i in range(stages - 1, schedule.steps, stages)}
        # with ε from a difference of states at σ = 0.03, which is extrapolated, float32 states have no five digits
        steep = schedule.name == "lms" and config["prediction_type"] == "sample"
        wide = steep or stages == 2
        expected = diffusers_loop(scheduler, noise, z, monkeypatch, wide=wide, **step)
        actual = play_in_float64(schedule, noise, z) if wide else play(schedule, noise, z)
        bound = 1e-3 if lossy else 1e-5
        assert np.abs(actual - expected).max() <= bound * np.abs(expected).max(), (steps, schedule.name)


@pytest.mark.parametrize(
    ("own", "fields"),
    [
        ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "zero"}),
        ("DPMSolverSinglestepScheduler", {"final_sigmas_type": "zero", "use_karras_sigmas": True}),
    ],
)
@pytest.mark.parametrize("steps", STEPS)
def test_a_substitute_equals_diffusers_from_config(
    own: str, fields: dict[str, Any], steps: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the model's own class calls its solver by a word of its own."""
    saved = getattr(diffusers, own)(**STABLE, **fields)
    name = substitute({**saved.config, "_class_name": own})
    assert name == "dpm++2m"
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(saved.config)
    theirs.set_timesteps(steps)
    alphas = theirs.alphas_cumprod.tolist()
    schedule = schedule_from_config({**saved.config, "_class_name": own}, alphas, steps, scheduler=name)
    noise = rng.standard_normal(SHAPE, np.float32)
    expected = diffusers_loop(theirs, noise, {}, monkeypatch)
    assert np.abs(play(schedule, noise, {}) - expected).max() <= 1e-5 * np.abs(expected).max()


DRAFTED: list[tuple[str, dict[str, Any]]] = [
    *((name, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
      for name in ("DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler")),
    *((name, {curve: True}) for name in CURVED for curve in ("use_exponential_sigmas", "use_beta_sigmas")),
    *(("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, curve: True}) for curve in CURVES),
    ("DPMSolverMultistepScheduler", SDE),
    *(("DPMSolverMultistepScheduler", {"solver_order": 3} | own) for own in ({}, SDE)),
    *((name, {"solver_order": 3}) for name in ("DEISMultistepScheduler", "UniPCMultistepScheduler")),
    ("UniPCMultistepScheduler", {"solver_type": "bh1", "use_karras_sigmas": True}),
    *((f"{name}Scheduler", {}) for name in ("HeunDiscrete", "KDPM2AncestralDiscrete", "FlowMatchHeunDiscrete")),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", {}), ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    *(("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": kind}) for kind in ("epsilon", "v_prediction")),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), DRAFTED)
@pytest.mark.parametrize("steps", STEPS)
def test_drafted_and_verified_equals_sequential(
    name: str, fields: dict[str, Any], steps: int, rng: np.random.Generator
) -> None:
    """What `adaptive` accepts at tolerance 0 is the sequential result, and every mode's drafts are finite."""
    own = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**fields, **own)
    alphas = scheduler.alphas_cumprod.tolist() if hasattr(scheduler, "alphas_cumprod") else ()
    schedule = schedule_from_config({**scheduler.config, "_class_name": name}, alphas, steps)
    noise = rng.standard_normal(SHAPE, np.float32)
    z = {i: rng.standard_normal(SHAPE, np.float32) for i in schedule.stochastic_steps}
    expected = play(schedule, noise, z)
    assert schedule.steps == RULES[schedule.name].stages * (steps - 1) + 1 + (name == "PNDMScheduler" and steps > 1)
    for mode in ("conservative", "aggressive"):  # a draft over one step is the refined state
        one = play(schedule, noise, z, mode, k=1)
        assert np.abs(one - expected).max() <= 1e-5 * np.abs(expected).max(), mode
    verified = play(schedule, noise, z, "adaptive", k=3, tolerance=0.0)
    assert np.abs(verified - expected).max() <= 1e-5 * np.abs(expected).max()
    for mode in ("conservative", "aggressive"):
        for drafts in ("frozen", "extrapolated", "corrected"):
            assert np.isfinite(play(schedule, noise, z, mode, k=3, drafts=drafts)).all(), (mode, drafts)


def test_nothing_but_the_table_is_put_in_the_place_of_a_scheduler() -> None:
    import inspect

    kinds = [
        name for name, _ in inspect.getmembers(diffusers.schedulers, inspect.isclass) if name.endswith("Scheduler")
    ]
    known = {rule.class_name for rule in RULES.values()}
    listed = {kind for names in UNKNOWN for kind in names.split()}
    assert not known & listed and {name for name in listed if name.endswith("Scheduler")} <= {
        *kinds,
        "KarrasVeScheduler",
    }
    for kind in kinds:
        name = substitute({"_class_name": kind})
        if kind not in listed:
            assert name is None
        elif name is None:
            with pytest.raises(ParameterError, match=f"{kind} cannot be drafted: "):
                schedule_from_config({"_class_name": kind}, ALPHAS, 5)
        else:
            assert name in RULES and all(one.fits for names, one in UNKNOWN.items() if kind in names.split())


def config(name: str = "DDIMScheduler", **fields: Any) -> dict[str, Any]:
    return {"_class_name": name, "clip_sample": False, **fields}


ALPHAS = np.linspace(0.999, 0.005, 1000).tolist()


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ((config("DPMSolverSinglestepScheduler"), ALPHAS, 5), "scheduler", "cannot be drafted: its steps go in groups"),
        ((config("MagicScheduler"), ALPHAS, 5), "scheduler", "unknown scheduler 'MagicScheduler'; name one of ddim"),
        ((config(clip_sample=True), ALPHAS, 5), "scheduler", "says clip_sample=True; ddim can do False"),
        (({"_class_name": "DDIMScheduler"}, ALPHAS, 5), "scheduler", "leaves the default clip_sample=True"),
        ((config(rescale_betas_zero_snr=True), ALPHAS, 5), "scheduler", "rescale_betas_zero_snr with pred"),
        ((config(timestep_spacing="even"), ALPHAS, 5), "scheduler", "timestep_spacing='even'"),
        ((config(new=1), ALPHAS, 5), "scheduler", "does not know the field new"),
        (
            (config("EulerDiscreteScheduler", use_beta_sigmas=True, use_karras_sigmas=True), ALPHAS, 5),
            "scheduler", "more than one of use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas",
        ),
        ((config("EDMDPMSolverMultistepScheduler"), (), 5), "scheduler", "EDM preconditioning"),
        ((config("SCMScheduler"), (), 5), "scheduler", "TrigFlow"),
        ((config("DPMSolverMultistepScheduler", use_flow_sigmas=True), ALPHAS, 5), "scheduler", "'flow_prediction'"),
        ((config("DPMSolverMultistepScheduler", solver_order=4), ALPHAS, 5), "scheduler", "solver_order=4"),
        ((config("PNDMScheduler"), ALPHAS, 5), "scheduler", "leaves the default skip_prk_steps=False; pndm"),
        ((config("UniPCMultistepScheduler", predict_x0=False), ALPHAS, 5), "scheduler", "predict_x0=False"),
        (
            (config("UniPCMultistepScheduler", lower_order_final=False), ALPHAS, 5),
            "scheduler", "lower_order_final=False: its last step",
        ),
        (
            (config("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver"), ALPHAS, 5),
            "scheduler", "algorithm_type='sde-dpmsolver'; dpm",
        ),
        ((config("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True), (), 5), "scheduler", "latent tokens"),
        ((config(), (), 5), "scheduler", "trained by flow matching"),
        ((config(), ALPHAS, 0), "num_inference_steps", "must be 1 to 1000, not 0"),
        ((config(), ALPHAS, 1001), "num_inference_steps", "must be 1 to 1000, not 1001"),
        ((config(steps_offset=1), ALPHAS, 1000), "num_inference_steps", "with steps_offset 1 cannot give 1000"),
        ((config("LCMScheduler"), ALPHAS, 51), "num_inference_steps", "at most 50 steps"),
        ((config("DPMSolverMultistepScheduler"), ALPHAS, 1000), "num_inference_steps", "linspace spacing cannot give"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused_by_field(
    arguments: tuple[Any, ...], param: str, message: str
) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        schedule_from_config(*arguments)
    assert caught.value.param == param


@pytest.mark.parametrize(("name", "eta"), [("ddim", 1.5), ("ddim", -0.1), ("euler", 0.5)])
def test_an_eta_that_cannot_be_is_refused(name: str, eta: float) -> None:
    with pytest.raises(ParameterError, match="eta") as caught:
        schedule_from_config(config(), ALPHAS, 5, scheduler=name, eta=eta)
    assert caught.value.param == "eta"


def test_another_scheduler_takes_the_fields_that_it_knows() -> None:
    own = config(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
    euler = schedule_from_config(own, ALPHAS, 10, scheduler="euler")
    assert euler.timesteps == schedule_from_config(own, ALPHAS, 10).timesteps


@pytest.mark.parametrize("steps", STEPS)
def test_ddpm_and_euler_ancestral_are_one_sampler_at_whole_timesteps(steps: int) -> None:
    """The posterior of Ho et al. is a step to below the next σ with fresh noise up to it: equal where timesteps are."""
    own = config(timestep_spacing="leading", steps_offset=1)
    ddpm, euler = (schedule_from_config(own, ALPHAS, steps, scheduler=name) for name in ("ddpm", "euler_a"))
    assert ddpm.timesteps == euler.timesteps and ddpm.init_noise_sigma == euler.init_noise_sigma
    rows, others = (
        [(row.timestep, row.alpha, row.sigma, row.data, row.noise, row.fresh) for row in one.rows]
        for one in (ddpm, euler)
    )
    assert not ddpm.depth and not euler.depth
    np.testing.assert_allclose(rows, others, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if "discrete" in rule.training])
def test_every_row_keeps_the_scale_of_its_state(name: str) -> None:
    """If ε and x̂_0 are right and constant, a step ends at α′·x̂_0 + σ′·ε with the fresh noise in σ′."""
    schedule = schedule_from_config(
        config(skip_prk_steps=True, solver_order=2 if "2m" in name else 3), ALPHAS, 10, scheduler=name
    )
    for i, (row, following) in enumerate(zip(schedule.rows, schedule.rows[1:], strict=False)):
        kept = [schedule.rows[i - 1 - j].kept for j in range(len(row.previous))]
        data, noise = (
            start + sum(weight * one[part] for weight, one in zip(row.previous, kept, strict=True))
            for part, start in enumerate((row.data, row.noise))
        )
        assert data == pytest.approx(following.alpha, abs=0.02)
        assert math.hypot(noise, row.fresh) == pytest.approx(following.sigma, abs=0.02)
