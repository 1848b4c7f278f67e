"""The schedulers by name: from a diffusers scheduler config to the rows of a `Schedule`.

A scheduler is one function of `step_rules` and one entry in `RULES`. Fields of the config that a rule does not honour
are refused by name, so that no image is silently another one than diffusers would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engines.errors import ParameterError
from engines.manifest import Manifest
from runtime.sampling import multistep_rules, step_rules
from runtime.sampling.schedule import Schedule
from runtime.sampling.spacing import CURVES, ScheduleSpec


@dataclass(frozen=True)
class Rule:
    """A scheduler: diffusers' class, the function that makes its rows, and the fields it reads with their defaults.

    `allowed` lists the values of the fields that decide between things a rule can and cannot do; `fixed` has those that
    the name stands for, where several share a class. `words` translates what another class of the same config calls a
    thing, as diffusers' own constructors do. `terminal` is the last ᾱ under `rescale_betas_zero_snr`.
    """

    class_name: str
    make: Callable[[ScheduleSpec], Schedule]
    fields: Mapping[str, Any]
    allowed: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    terminal: float = 0.0


_NO = (False, None)
_ALPHAS = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "rescale_betas_zero_snr": False}
_SPACED = _ALPHAS | {"steps_offset": 0}
_LEADING = _SPACED | {"timestep_spacing": "leading"}
_LINSPACE = _SPACED | {"timestep_spacing": "linspace"}
_SPACINGS = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}
_UNCLIPPED = _SPACINGS | {"clip_sample": (False,), "thresholding": (False,)}  # neither is linear
_CURVED = dict.fromkeys(CURVES, False) | {"sigma_min": None, "sigma_max": None}
_SIGMAS = _SPACINGS | {"final_sigmas_type": ("zero", "sigma_min")}
_NEARLY_ZERO = 2.0**-24  # in place of 0 where σ/α is wanted
_DPM = _LINSPACE | _CURVED | {
    "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False,
    "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "use_flow_sigmas": False, "flow_shift": 1.0,
}  # fmt: skip
_DPM_ALLOWED = _SIGMAS | {
    "prediction_type": (*_SPACINGS["prediction_type"], "flow_prediction"),
    "solver_type": ("midpoint", "heun"),
    "algorithm_type": ("dpmsolver++",), "thresholding": (False,), "use_lu_lambdas": _NO,
    "variance_type": (None,), "lambda_min_clipped": (-math.inf, "-inf", None), "use_dynamic_shifting": _NO,
}  # fmt: skip
_SOLVER = _LINSPACE | _CURVED | {
    "solver_order": 2, "lower_order_final": True, "use_flow_sigmas": False, "flow_shift": 1.0,
}  # fmt: skip
_SOLVER_ALLOWED = _SPACINGS | {
    "prediction_type": _DPM_ALLOWED["prediction_type"], "solver_order": (1, 2, 3), "thresholding": (False,),
    "use_dynamic_shifting": _NO,
}  # fmt: skip
_DPM_WORDS = {
    "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    "algorithm_type": dict.fromkeys(("deis", "sde-dpmsolver++"), "dpmsolver++"),
}
RULES: dict[str, Rule] = {
    "ddim": Rule(
        "DDIMScheduler", step_rules.ddim, _LEADING | {"set_alpha_to_one": True, "clip_sample": True}, _UNCLIPPED
    ),
    "ddpm": Rule(
        "DDPMScheduler", step_rules.ddpm, _LEADING | {"variance_type": "fixed_small", "clip_sample": True},
        _UNCLIPPED | {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
    ),
    "euler": Rule(
        "EulerDiscreteScheduler", step_rules.euler, _LINSPACE | _CURVED | {"final_sigmas_type": "zero"},
        _SIGMAS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)}, terminal=_NEARLY_ZERO,
    ),
    "euler_a": Rule(
        "EulerAncestralDiscreteScheduler", step_rules.euler_ancestral, _LINSPACE, _SPACINGS, terminal=_NEARLY_ZERO
    ),
    "dpm++2m": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM, _DPM_ALLOWED | {"solver_order": (1, 2)},
        words=_DPM_WORDS, terminal=_NEARLY_ZERO,
    ),
    "dpm++2m_sde": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM,
        _DPM_ALLOWED | {"solver_order": (1, 2), "algorithm_type": ("sde-dpmsolver++",)}, words=_DPM_WORDS,
        terminal=_NEARLY_ZERO, fixed={"algorithm_type": "sde-dpmsolver++"},
    ),
    "dpm++3m": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM, _DPM_ALLOWED | {"solver_order": (3,)},
        words=_DPM_WORDS, terminal=_NEARLY_ZERO, fixed={"solver_order": 3},
    ),
    "dpm++3m_sde": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM,
        _DPM_ALLOWED | {"solver_order": (3,), "algorithm_type": ("sde-dpmsolver++",)}, words=_DPM_WORDS,
        terminal=_NEARLY_ZERO, fixed={"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": Rule(
        "UniPCMultistepScheduler", multistep_rules.unipc, _SOLVER | {
            "solver_type": "bh2", "final_sigmas_type": "zero", "disable_corrector": (),
        },
        _SOLVER_ALLOWED | {
            "solver_type": ("bh1", "bh2"), "final_sigmas_type": ("zero", "sigma_min"), "predict_x0": (True,),
            "solver_p": (None,), "shift_terminal": (None,),
        },
        words={"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}, terminal=_NEARLY_ZERO,
    ),
    "deis": Rule(
        "DEISMultistepScheduler", multistep_rules.deis, _SOLVER | {
            "solver_type": "logrho", "algorithm_type": "deis", "final_sigmas_type": "sigma_min",
        },
        _SOLVER_ALLOWED | {
            "solver_type": ("logrho",), "algorithm_type": ("deis",), "rescale_betas_zero_snr": _NO,
            "sigma_min": (None,), "sigma_max": (None,), "final_sigmas_type": ("sigma_min",),
        },
        words={
            "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
            "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        },
        fixed={},
    ),
    "lms": Rule(
        "LMSDiscreteScheduler", multistep_rules.lms, _LINSPACE | dict.fromkeys(CURVES, False),
        _SPACINGS | {"rescale_betas_zero_snr": _NO},
    ),
    "pndm": Rule(
        "PNDMScheduler", multistep_rules.pndm, _LEADING | {"set_alpha_to_one": False, "skip_prk_steps": False},
        _SPACINGS | {
            "prediction_type": ("epsilon", "v_prediction"), "skip_prk_steps": (True,), "rescale_betas_zero_snr": _NO,
        },
    ),
    "flow_euler": Rule(
        "FlowMatchEulerDiscreteScheduler", step_rules.flow_euler,
        {
            "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5,
            "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None,
            "time_shift_type": "exponential", "stochastic_sampling": False, "shift_by_steps": False,
            **dict.fromkeys(CURVES, False),
        },
        {"invert_sigmas": _NO, "time_shift_type": ("exponential", "linear")},
    ),
    "lcm": Rule(
        "LCMScheduler", step_rules.lcm,
        _ALPHAS | {"original_inference_steps": 50, "timestep_scaling": 10.0},
        _UNCLIPPED,
    ),
}  # fmt: skip


SCHEDULERS = tuple(RULES)
_UNSET = "_use_default_values"  # where diffusers lists the fields that have the defaults of the config's own class


# fields that are in ᾱ already, or that only say how to do what is refused
_NEUTRAL = {
    "beta_start", "beta_end", "beta_schedule", "trained_betas", "dynamic_thresholding_ratio", "clip_sample_range",
    "sample_max_value", "skip_prk_steps",
}  # fmt: skip


def schedule_from_config(
    config: Mapping[str, Any],
    alphas_cumprod: Sequence[float],
    num_inference_steps: int,
    *,
    scheduler: str | None = None,
    eta: float = 0.0,
    image_seq_len: int | None = None,
    even_sigmas: bool = False,
    first: int = 0,
) -> Schedule:
    """The schedule of a diffusers scheduler config, under its own rule or under the one that `scheduler` names.

    `alphas_cumprod` is ᾱ per training timestep (diffusers' `scheduler.alphas_cumprod`; empty for flow matching). As
    with diffusers' `from_config`, a scheduler of another name takes the fields that it knows from the config, but for
    those that were never set there. Steps before `first` are left out: an image to image run begins there.
    ParameterError, by field, for what cannot be made or would come out other than in diffusers.
    """
    own = _own(config)
    name = scheduler or own
    if name not in RULES:
        asked = str(scheduler or config.get("_class_name"))
        reason = next((one.reason for kind, one in UNKNOWN.items() if asked in kind.split()), None)
        what = f"{asked} cannot be drafted: {reason}" if reason else f"unknown scheduler {asked!r}"
        raise ParameterError("scheduler", f"{what}; name one of {', '.join(RULES)} that suits the model")
    rule = RULES[name]
    settings = _settings(config, name, own)
    training = int(config.get("num_train_timesteps", 1000))
    _check_kind(name, settings, config, alphas_cumprod, training)
    if not 1 <= num_inference_steps <= training:
        raise ParameterError(
            "num_inference_steps", f"num_inference_steps must be 1 to {training}, not {num_inference_steps}"
        )
    if not 0 <= eta <= 1:
        raise ParameterError("eta", f"eta must be between 0 and 1, not {eta!r}")
    if eta and name != "ddim":
        raise ParameterError("eta", f"eta belongs to ddim; {name} has none")
    alphas = np.array(alphas_cumprod, np.float64)
    if settings.get("rescale_betas_zero_snr"):
        alphas[-1] = rule.terminal
    made = rule.make(ScheduleSpec(settings, alphas, num_inference_steps, eta, image_seq_len, even_sigmas, first))
    return replace(made, rows=made.rows[first:]) if first else made


def _settings(config: Mapping[str, Any], name: str, own: str | None) -> dict[str, Any]:
    """The fields that a rule reads, with its defaults; ParameterError for values and fields that it does not honour."""
    rule = RULES[name]
    same_class = own is not None and RULES[own].class_name == rule.class_name
    if not same_class:
        config = {key: value for key, value in config.items() if key not in config.get(_UNSET, ())}
    said = dict(config)
    for key, words in rule.words.items():
        if said.get(key) in words:
            said[key] = words[said[key]]
    said |= rule.fixed
    settings = {key: said.get(key, default) for key, default in rule.fields.items()}
    for key, allowed in rule.allowed.items():
        value = said.get(key, rule.fields.get(key, allowed[0]))
        if value not in allowed:
            can = " or ".join(map(repr, allowed))
            says = "says" if key in config else "leaves the default"
            raise ParameterError("scheduler", f"the scheduler config {says} {key}={value!r}; {name} can do {can}")
    if same_class:
        known = _NEUTRAL.union(*((*one.fields, *one.allowed) for one in RULES.values()))  # others are left over
        for key in config:
            if key not in known and not key.startswith("_"):
                raise ParameterError("scheduler", f"{name} does not know the field {key} of the scheduler config")
    return settings


def _check_kind(
    name: str, settings: Mapping[str, Any], config: Mapping[str, Any], alphas_cumprod: Sequence[float], training: int
) -> None:
    """ParameterError where a rule is for models that were trained otherwise."""
    flow = trained_by_flow_matching(config, alphas_cumprod)
    if name != "flow_euler" and len(alphas_cumprod) != training:
        raise ParameterError("scheduler", f"{name} needs a noise schedule; this model was trained by flow matching")
    if flow != (name == "flow_euler" or bool(settings.get("use_flow_sigmas"))):
        raise ParameterError(
            "scheduler",
            f"{name} needs a noise schedule; this model was trained by flow matching" if flow
            else f"{name} is for models that were trained by flow matching; this was not",
        )  # fmt: skip
    if settings.get("use_flow_sigmas") and settings["prediction_type"] != "flow_prediction":
        raise ParameterError(
            "scheduler",
            f"the scheduler config says use_flow_sigmas with prediction_type={settings['prediction_type']!r}; it must "
            "be 'flow_prediction'",
        )
    without_signal = settings.get("rescale_betas_zero_snr") and not RULES[name].terminal
    if without_signal and settings["prediction_type"] == "epsilon":
        raise ParameterError(
            "scheduler",
            f"the scheduler config says rescale_betas_zero_snr with prediction_type='epsilon': at the first step of "
            f"{name} the noise says nothing about the image",
        )


def trained_by_flow_matching(config: Mapping[str, Any], alphas_cumprod: Sequence[float]) -> bool:
    """Some schedulers of flow models have an ᾱ table beside, which they do not use."""
    return not len(alphas_cumprod) or bool(config.get("use_flow_sigmas"))


def make_schedule(
    manifest: Manifest, scheduler: str | None, num_inference_steps: int, size: tuple[int, int] | None = None, *,
    eta: float = 0.0, first: int = 0,
) -> Schedule:  # fmt: skip
    """The schedule for an exported model and images of (width, height); see `schedule_from_config`.

    Without a name it is the model's own, or `substitute` where that one cannot be drafted.
    """
    width, height = size or (manifest.sizes.width, manifest.sizes.height)
    token = manifest.patch and manifest.patch * manifest.vae_scale_factor
    return schedule_from_config(
        manifest.scheduler, manifest.alphas_cumprod, num_inference_steps,
        scheduler=scheduler or substitute(manifest.scheduler),
        eta=eta, image_seq_len=width // token * (height // token) if token else None,
        even_sigmas=manifest.even_sigmas, first=first,
    )  # fmt: skip


@dataclass(frozen=True)
class Unknown:
    """Why there is no rule for some classes of diffusers, and what takes their place, if anything does, and why."""

    reason: str
    substitute: str | None = None
    fits: str = ""


def substitute(config: Mapping[str, Any]) -> str | None:
    """The scheduler that takes the place of a config's own where that one cannot be drafted, else None."""
    found = _unknown(config)
    return found.substitute if found else None


def substituted(manifest: Manifest, scheduler: str | None) -> str | None:
    """A warning where a call without a scheduler gets another one than the model's own."""
    found, own = _unknown(manifest.scheduler), manifest.scheduler.get("_class_name")
    if scheduler is not None or found is None or found.substitute is None:
        return None
    return (
        f"{own}, the model's own scheduler, cannot be drafted: {found.reason}; {found.substitute} was used in its "
        f"place, which {found.fits}"
    )


def _unknown(config: Mapping[str, Any]) -> Unknown | None:
    if _own(config) is not None:
        return None
    own = str(config.get("_class_name"))
    return next((one for kind, one in UNKNOWN.items() if own in kind.split()), None)


def _own(config: Mapping[str, Any]) -> str | None:
    """The rule of a config's class, the most particular one."""
    kind = str(config.get("_class_name"))
    rules = {name: rule for name, rule in RULES.items() if rule.class_name == kind}
    fitting = [name for name, rule in rules.items() if all(config.get(key) == is_ for key, is_ in rule.fixed.items())]
    return max(fitting, key=lambda name: len(rules[name].fixed), default=None)


_SAME_ODE = "solves the same differential equation from the same table of ᾱ"
# Diffusers' classes that have no rule, by all their names. Nothing else is ever put in a scheduler's place.
UNKNOWN: dict[str, Unknown] = {
    "HeunDiscreteScheduler KDPM2DiscreteScheduler heun": Unknown(
        "a step needs two evaluations, the second where the first leads", "dpm++2m", _SAME_ODE
    ),
    "DPMSolverSinglestepScheduler": Unknown(
        "its steps go in groups that start anew", "dpm++2m", _SAME_ODE
    ),
    "KDPM2AncestralDiscreteScheduler": Unknown(
        "a step needs two evaluations, the second where the first leads", "euler_a",
        "adds the same noise to steps of lower order",
    ),
    "DPMSolverSDEScheduler": Unknown(
        "a step needs two evaluations, and its noise comes from a Brownian tree", "dpm++2m_sde",
        "solves the same stochastic differential equation from the same table of ᾱ",
    ),
    "DDIMParallelScheduler": Unknown("it is DDIM under another name", "ddim", "makes the same steps"),
    "DDPMParallelScheduler": Unknown("it is DDPM under another name", "ddpm", "makes the same steps"),
    "FlowMatchHeunDiscreteScheduler": Unknown(
        "a step needs two evaluations, the second where the first leads", "flow_euler",
        "solves the same differential equation from the same noise levels",
    ),
    "EDMEulerScheduler EDMDPMSolverMultistepScheduler CosineDPMSolverMultistepScheduler": Unknown(
        "EDM preconditioning (Karras et al. 2022: inputs and outputs scaled by σ and sigma_data) is not among the "
        "rules here"
    ),
    "SCMScheduler": Unknown("TrigFlow (x = cos t·x_0 + sin t·z) is not among the rules here"),
    "TCDScheduler": Unknown("trajectory consistency models need the steps that they were distilled for"),
    "FlowMatchLCMScheduler": Unknown("consistency models of flow matching need the steps that they were distilled for"),
    "DPMSolverMultistepInverseScheduler DDIMInverseScheduler": Unknown("it goes from images to noise"),
    "ScoreSdeVeScheduler ScoreSdeVpScheduler IPNDMScheduler KarrasVeScheduler": Unknown(
        "models for it were trained on other noise levels than those known here"
    ),
}  # fmt: skip
