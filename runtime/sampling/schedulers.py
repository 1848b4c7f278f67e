"""The schedulers by name: from a diffusers scheduler config to the rows of a `Schedule`.

Fields of the config that a rule does not honour are refused by name, so that no image is silently another one than
diffusers would make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engines.errors import ParameterError
from engines.manifest import Manifest
from runtime.sampling.rules import RULES, TRAINING, UNKNOWN, Unknown
from runtime.sampling.schedule import Schedule
from runtime.sampling.spacing import ScheduleSpec

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
    return replace(made, rows=made.rows[rule.stages * first :]) if first else made


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
    trained = training_of(config, alphas_cumprod)
    fitting = RULES[name].training
    if settings.get("use_flow_sigmas"):
        fitting = ("flow",)
    elif "use_flow_sigmas" in settings:
        fitting = tuple(one for one in fitting if one != "flow")
    if trained not in fitting:
        raise ParameterError(
            "scheduler",
            f"{name} is for models that were trained {' or '.join(TRAINING[one] for one in fitting)}; this one was "
            f"trained {TRAINING[trained]}",
        )
    if trained == "discrete" and len(alphas_cumprod) != training:
        raise ParameterError("scheduler", f"{name} needs ᾱ of {training} timesteps, and here are {len(alphas_cumprod)}")
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


def training_of(config: Mapping[str, Any], alphas_cumprod: Sequence[float]) -> str:
    """How a model was trained, a key of `TRAINING`; some schedulers of flow models have an ᾱ table beside."""
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return "flow"
    own = {one for rule in RULES.values() if rule.class_name == config.get("_class_name") for one in rule.training}
    trained = own.pop() if len(own) == 1 else "discrete"
    return "flow" if trained == "discrete" and not len(alphas_cumprod) else trained


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
