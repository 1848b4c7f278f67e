"""The table of schedulers: what each reads of a diffusers scheduler config, and what takes the place of those without.

A scheduler is one function of a module of rules and one entry in `RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.sampling import multistep_rules, step_rules, two_stage_rules
from runtime.sampling.schedule import Schedule
from runtime.sampling.spacing import CURVES, ScheduleSpec

# how models are trained, which decides what their scheduler may be
TRAINING = {
    "discrete": "with a table of noise levels per timestep",
    "flow": "by flow matching",
}


@dataclass(frozen=True)
class Rule:
    """A scheduler: diffusers' class, the function that makes its rows, and the fields it reads with their defaults.

    `allowed` lists the values of the fields that decide between things a rule can and cannot do; `fixed` has those that
    the name stands for, where several share a class. `words` translates what another class of the same config calls a
    thing, as diffusers' own constructors do. `terminal` is the last ᾱ under `rescale_betas_zero_snr`. `stages` is the
    number of rows per step. `training` has the keys of `TRAINING` of the models that it is for.
    """

    class_name: str
    make: Callable[[ScheduleSpec], Schedule]
    fields: Mapping[str, Any]
    allowed: Mapping[str, tuple[Any, ...]]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    terminal: float = 0.0
    stages: int = 1
    training: tuple[str, ...] = ("discrete",)


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
_BOTH = ("discrete", "flow")
_TWO_STAGES = _LINSPACE | dict.fromkeys(CURVES, False)
_KDPM2_ALLOWED = _SPACINGS | {"prediction_type": ("epsilon", "v_prediction"), "rescale_betas_zero_snr": _NO}
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
        words=_DPM_WORDS, terminal=_NEARLY_ZERO, training=_BOTH,
    ),
    "dpm++2m_sde": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM,
        _DPM_ALLOWED | {"solver_order": (1, 2), "algorithm_type": ("sde-dpmsolver++",)}, words=_DPM_WORDS,
        terminal=_NEARLY_ZERO, fixed={"algorithm_type": "sde-dpmsolver++"}, training=_BOTH,
    ),
    "dpm++3m": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM, _DPM_ALLOWED | {"solver_order": (3,)},
        words=_DPM_WORDS, terminal=_NEARLY_ZERO, fixed={"solver_order": 3}, training=_BOTH,
    ),
    "dpm++3m_sde": Rule(
        "DPMSolverMultistepScheduler", multistep_rules.dpmpp, _DPM,
        _DPM_ALLOWED | {"solver_order": (3,), "algorithm_type": ("sde-dpmsolver++",)}, words=_DPM_WORDS,
        terminal=_NEARLY_ZERO, fixed={"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, training=_BOTH,
    ),
    "unipc": Rule(
        "UniPCMultistepScheduler", multistep_rules.unipc, _SOLVER | {
            "solver_type": "bh2", "final_sigmas_type": "zero", "disable_corrector": (),
        },
        _SOLVER_ALLOWED | {
            "solver_type": ("bh1", "bh2"), "final_sigmas_type": ("zero", "sigma_min"), "predict_x0": (True,),
            "solver_p": (None,), "shift_terminal": (None,),
        },
        words={"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")},
        terminal=_NEARLY_ZERO, training=_BOTH,
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
        training=_BOTH,
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
    "heun": Rule(
        "HeunDiscreteScheduler", two_stage_rules.heun, _TWO_STAGES, _SPACINGS | {
            "clip_sample": (False,), "rescale_betas_zero_snr": _NO,
        }, stages=2,
    ),
    "kdpm2": Rule("KDPM2DiscreteScheduler", two_stage_rules.kdpm2, _TWO_STAGES, _KDPM2_ALLOWED, stages=2),
    "kdpm2_a": Rule(
        "KDPM2AncestralDiscreteScheduler", two_stage_rules.kdpm2_ancestral, _TWO_STAGES, _KDPM2_ALLOWED, stages=2
    ),
    "flow_euler": Rule(
        "FlowMatchEulerDiscreteScheduler", step_rules.flow_euler,
        {
            "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5,
            "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None,
            "time_shift_type": "exponential", "stochastic_sampling": False, "shift_by_steps": False,
            **dict.fromkeys(CURVES, False),
        },
        {"invert_sigmas": _NO, "time_shift_type": ("exponential", "linear")}, training=("flow",),
    ),
    "flow_heun": Rule(
        "FlowMatchHeunDiscreteScheduler", two_stage_rules.flow_heun, {"num_train_timesteps": 1000, "shift": 1.0}, {},
        stages=2, training=("flow",),
    ),
    "lcm": Rule(
        "LCMScheduler", step_rules.lcm,
        _ALPHAS | {"original_inference_steps": 50, "timestep_scaling": 10.0},
        _UNCLIPPED,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Unknown:
    """Why there is no rule for some classes of diffusers, and what takes their place, if anything does, and why."""

    reason: str
    substitute: str | None = None
    fits: str = ""


_SAME_ODE = "solves the same differential equation from the same table of ᾱ"
# Diffusers' classes that have no rule, by all their names. Nothing else is ever put in a scheduler's place.
UNKNOWN: dict[str, Unknown] = {
    "DPMSolverSinglestepScheduler": Unknown(
        "its steps go in groups that start anew", "dpm++2m", _SAME_ODE
    ),
    "DPMSolverSDEScheduler": Unknown(
        "a step needs two evaluations, and its noise comes from a Brownian tree", "dpm++2m_sde",
        "solves the same stochastic differential equation from the same table of ᾱ",
    ),
    "DDIMParallelScheduler": Unknown("it is DDIM under another name", "ddim", "makes the same steps"),
    "DDPMParallelScheduler": Unknown("it is DDPM under another name", "ddpm", "makes the same steps"),
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
