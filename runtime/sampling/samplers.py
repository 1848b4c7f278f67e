"""All samplers by name, and which schedules and options each of them can play."""

from __future__ import annotations

import math
from collections.abc import Callable

from engines.errors import ParameterError
from runtime.sampling.adaptive import adaptive
from runtime.sampling.drafts import DRAFTS
from runtime.sampling.driffusion import aggressive, conservative
from runtime.sampling.operations import Operations, Options
from runtime.sampling.schedule import Schedule
from runtime.sampling.sequential import sequential
from runtime.sampling.speculative import speculative
from runtime.sampling.srds import srds, srds_blocks

Sampler = Callable[[Schedule, Options], Operations]


CACHING = ("sequential", "conservative", "aggressive")


def check(mode: str, schedule: Schedule, options: Options) -> None:
    """ParameterError for a sampler that cannot play a schedule with these options."""
    for name, low in (("k", 1), ("blocks", 1), ("iterations", 1), ("cache_interval", 1), ("tolerance", 0)):
        value = getattr(options, name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is None and name in ("blocks", "iterations"):
            continue
        if not (whole or (name == "tolerance" and isinstance(value, float))) or not low <= value < math.inf:
            kind = "number" if name == "tolerance" else "whole number"
            raise ParameterError(name, f"{name} must be a finite {kind} of at least {low}, not {value!r}")
    if options.first_blocks and mode not in ("conservative", "aggressive"):
        raise ParameterError("first_blocks", f"{mode} has no blocks of drafts: use mode conservative or aggressive")
    for drafts in options.first_blocks:
        if isinstance(drafts, bool) or not isinstance(drafts, int) or drafts < 1:
            raise ParameterError("first_blocks", f"first_blocks must be whole numbers of at least 1, not {drafts!r}")
    if options.drafts not in DRAFTS:
        raise ParameterError("drafts", f"unknown drafts {options.drafts!r}: use one of auto, {', '.join(DRAFTS)}")
    if options.cache_interval > 1 and mode not in CACHING:
        raise ParameterError("cache_interval", f"{mode} cannot reuse features: use mode {' or '.join(CACHING)}")
    if mode == "adaptive" and DRAFTS[options.drafts].extrapolates:
        raise ParameterError("drafts", "adaptive has no anchors to extrapolate from: use frozen or corrected drafts")
    if mode == "speculative":
        _check_speculative(schedule, options)
    if mode != "sequential" and not schedule.draftable:
        raise ParameterError("mode", f"{schedule.name} takes steps that are too long to draft: use mode sequential")
    if mode == "srds":
        if schedule.multistep:
            raise ParameterError(
                "mode",
                f"srds cannot run {schedule.name}: a step reads earlier ones, and a block loses its history",
            )
        srds_blocks(schedule.steps, options.blocks)


def _check_speculative(schedule: Schedule, options: Options) -> None:
    if not schedule.stochastic_steps:
        raise ParameterError(
            "mode",
            f"speculative needs a scheduler that adds noise, and {schedule.name} adds none: use ddpm, euler_a, or ddim "
            "with eta above 0; or a mode that is exact without noise, such as srds",
        )
    if options.tolerance:
        raise ParameterError(
            "tolerance", "speculative is exact and has no tolerance: leave it out, or use adaptive, srds or auto"
        )
    if DRAFTS[options.drafts].extrapolates or DRAFTS[options.drafts].own_noise:
        raise ParameterError("drafts", f"speculative cannot use {options.drafts} drafts: use frozen or corrected ones")


def measures(mode: str, options: Options) -> bool:
    """Whether a sampler decides by what it measures, so that each image must be made by itself."""
    return mode in ("adaptive", "speculative") or (mode == "srds" and options.tolerance > 0)


SAMPLERS: dict[str, Sampler] = {
    "sequential": sequential,
    "conservative": conservative,
    "aggressive": aggressive,
    "srds": srds,
    "adaptive": adaptive,
    "speculative": speculative,
}
