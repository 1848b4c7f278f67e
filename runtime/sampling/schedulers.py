"""The schedulers by name: from a diffusers scheduler config to the rows of a `Schedule`.

A scheduler is one function that returns its rows and one line in `RULES`. Fields of the config that a rule does not
honour are refused by name, so that no image is silently another one than diffusers would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import ParameterError
from engines.manifest import Manifest
from runtime.sampling.schedule import Schedule, Step

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScheduleSpec:
    """What a rule works from: the config's fields with diffusers' defaults filled in, ᾱ per training timestep, N, η.

    `image_seq_len` is the number of latent tokens of an image, which dynamic shifting depends on. `even_sigmas` spaces
    the noise levels of flow matching evenly from 1 to 1/N, as some pipelines do. `first` is the step that begins: a
    multistep solver knows no step before it.
    """

    config: Mapping[str, Any]
    alphas_cumprod: Floats
    steps: int
    eta: float
    image_seq_len: int | None
    even_sigmas: bool = False
    first: int = 0

    @property
    def training(self) -> int:
        """T."""
        return int(self.config["num_train_timesteps"])

    @property
    def sigmas(self) -> Floats:
        """σ/α per training timestep."""
        result: Floats = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        return result

    def timesteps(self, intervals: int = 0) -> Floats:
        """Timesteps by `timestep_spacing` (Lin et al. 2023, table 2); multistep solvers leave `intervals` = 1 out."""
        spacing, n = self.config["timestep_spacing"], self.steps
        steps: NDArray[Any]
        if spacing == "linspace":
            steps = np.linspace(0.0, self.training - 1.0, n + intervals)[::-1][:n]
        elif spacing == "leading":
            stride = float(self.training // (n + intervals))
            steps = stride * np.arange(n + intervals)[::-1][:n] + float(self.config["steps_offset"])
        else:
            steps = np.arange(self.training, 0, -self.training / n).round() - 1
        if len(steps) != n or steps[-1] < 0 or steps[0] >= self.training or len(np.unique(steps.round())) != n:
            offset = f" with steps_offset {self.config['steps_offset']}" if self.config["steps_offset"] else ""
            raise ParameterError(
                "num_inference_steps",
                f"{spacing} spacing{offset} cannot give {n} different steps within the {self.training} timesteps that "
                "the model knows: use fewer steps",
            )
        return np.asarray(steps, np.float64)


def _ddim(spec: ScheduleSpec) -> Schedule:
    """Song et al. 2021, eq. 12 and 16. A step goes from t to t − T//N, below 0 to the final ᾱ."""
    alphas, stride = spec.alphas_cumprod, spec.training // spec.steps
    final = 1.0 if spec.config["set_alpha_to_one"] else float(alphas[0])
    rows = []
    for t in spec.timesteps().round().astype(int):
        source, target = alphas[t], alphas[t - stride] if t >= stride else final
        fresh = spec.eta * math.sqrt((1 - target) / (1 - source) * (1 - source / target))
        rows.append(_row(t, source, math.sqrt(target), math.sqrt(1 - target - fresh**2), fresh=fresh))
    return _schedule("ddim", spec, rows)


def _ddpm(spec: ScheduleSpec) -> Schedule:
    """Ho et al. 2020, eq. 7: the posterior mean, with the variance that `variance_type` names."""
    timesteps = spec.timesteps().round().astype(int)
    rows = []
    for t, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        source, target = spec.alphas_cumprod[t], spec.alphas_cumprod[following] if following >= 0 else 1.0
        beta = 1 - source / target
        keep = math.sqrt(source / target) * (1 - target) / (1 - source)  # of x_t
        data = math.sqrt(target) * beta / (1 - source) + keep * math.sqrt(source)
        variance = beta if spec.config["variance_type"] == "fixed_large" else beta * (1 - target) / (1 - source)
        fresh = math.sqrt(variance) if t > 0 else 0.0
        rows.append(_row(t, source, data, keep * math.sqrt(1 - source), fresh=fresh))
    return _schedule("ddpm", spec, rows)


def _euler(spec: ScheduleSpec) -> Schedule:
    """Karras et al. 2022, algorithm 2 without churn; states are divided by √(1 + σ²), which is what the model sees."""
    sigmas, timesteps = _euler_sigmas(spec)
    if spec.config["use_karras_sigmas"]:
        low, high = spec.config["sigma_min"], spec.config["sigma_max"]
        sigmas = _karras(sigmas[0] if high is None else high, sigmas[-1] if low is None else low, spec.steps)
        timesteps = _timestep_of(sigmas, spec.sigmas)
    last = float(spec.sigmas[0]) if spec.config["final_sigmas_type"] == "sigma_min" else 0.0
    rows = []
    for t, source, target in zip(timesteps, sigmas, [*sigmas[1:], last], strict=True):
        scale = 1 / math.sqrt(1 + target**2)
        rows.append(_row(t, 1 / (1 + source**2), scale, scale * target))
    return _schedule("euler", spec, rows, _euler_start(spec, sigmas))


def _euler_ancestral(spec: ScheduleSpec) -> Schedule:
    """Euler to below the next σ, then fresh noise up to it."""
    sigmas, timesteps = _euler_sigmas(spec)
    rows = []
    for t, source, target in zip(timesteps, sigmas, [*sigmas[1:], 0.0], strict=True):
        up = math.sqrt(target**2 * (source**2 - target**2) / source**2)
        scale = 1 / math.sqrt(1 + target**2)
        rows.append(_row(t, 1 / (1 + source**2), scale, scale * math.sqrt(target**2 - up**2), fresh=scale * up))
    return _schedule("euler_a", spec, rows, _euler_start(spec, sigmas))


def _dpmpp_2m(spec: ScheduleSpec) -> Schedule:
    """DPM-Solver++ (Lu et al. 2022, algorithm 2): second order in x̂_0, first order at the start and the end."""
    config, n = spec.config, spec.steps
    timesteps = spec.timesteps(intervals=0 if config["timestep_spacing"] == "trailing" else 1).round()
    sigmas = spec.sigmas[timesteps.astype(int)]
    if config["use_karras_sigmas"]:
        sigmas = _karras(float(spec.sigmas[-1]), float(spec.sigmas[0]), n)
        timesteps = _timestep_of(sigmas, spec.sigmas).round()
    last = float(spec.sigmas[0]) if config["final_sigmas_type"] == "sigma_min" else 0.0
    lower_at_end = (
        config["final_sigmas_type"] == "zero" or config["euler_at_final"] or (config["lower_order_final"] and n < 15)
    )
    rows = []
    targets = [*map(float, sigmas[1:]), last]
    for i, (t, source, target) in enumerate(zip(timesteps, sigmas, targets, strict=True)):
        alpha = 1 / math.sqrt(1 + target**2)
        data, previous = alpha, 0.0  # first order: that of DDIM
        if config["solver_order"] == 2 and i > spec.first and not (i == n - 1 and lower_at_end):
            h, h_before = math.log(source / target), math.log(sigmas[i - 1] / source)
            grow = alpha * -math.expm1(-h)
            curve = grow / 2 if config["solver_type"] == "midpoint" else alpha * (math.expm1(-h) / h + 1)
            previous = -curve * h / h_before
            data -= previous
        rows.append(_row(t, 1 / (1 + source**2), data, alpha * target, previous=previous))
    return _schedule("dpm++2m", spec, rows)


def _flow_euler(spec: ScheduleSpec) -> Schedule:
    """Flow matching (Esser et al. 2024): x = (1−σ)·x_0 + σ·ε, and Euler steps in σ; `shift` moves steps to high σ."""
    config, training = spec.config, spec.training
    shift = config["shift"]
    dynamic = config["use_dynamic_shifting"]
    low = 1 / training if dynamic else shift / training / (1 + (shift - 1) / training)
    if spec.even_sigmas:
        low = 1 / spec.steps
    sigmas = np.linspace(1.0, low, spec.steps)
    if dynamic:
        grow = _dynamic_shift(spec)
        sigmas = grow / (grow + (1 / sigmas - 1))
    else:
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if config["shift_terminal"]:
        if spec.steps == 1:
            raise ParameterError("num_inference_steps", "shift_terminal stretches a schedule of at least 2 steps")
        sigmas = 1 - (1 - sigmas) * (1 - config["shift_terminal"]) / (1 - sigmas[-1])
    rows = []
    for source, target in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        noise, fresh = (0.0, target) if config["stochastic_sampling"] else (target, 0.0)
        rows.append(Step(*map(float, (source * training, 1 - source, source, 1 - target, noise, 0.0, fresh))))
    return Schedule("flow_euler", "flow_prediction", tuple(rows))


def _lcm(spec: ScheduleSpec) -> Schedule:
    """Latent consistency (Luo et al. 2023): a jump to x̂_0 at every step, then fresh noise for the next."""
    original, n = int(spec.config["original_inference_steps"]), spec.steps
    if n > original:
        raise ParameterError("num_inference_steps", f"lcm makes at most {original} steps, not {n}")
    trained = np.arange(original, 0, -1) * (spec.training // original) - 1
    timesteps = trained[np.floor(np.linspace(0, original, n, endpoint=False)).astype(int)]
    rows = []
    for i, t in enumerate(timesteps):
        source = float(spec.alphas_cumprod[t])
        scaled = t * spec.config["timestep_scaling"]
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        target = 1.0 if i == n - 1 else float(spec.alphas_cumprod[timesteps[i + 1]])
        data, noise = out + skip * math.sqrt(source), skip * math.sqrt(1 - source)
        scale = math.sqrt(target)
        rows.append(_row(t, source, scale * data, scale * noise, fresh=math.sqrt(1 - target)))
    return _schedule("lcm", spec, rows, draftable=False)


def _row(
    timestep: float, source: float, data: float, noise: float, *, previous: float = 0.0, fresh: float = 0.0
) -> Step:
    """A row from a source ᾱ."""
    alpha, sigma = math.sqrt(source), math.sqrt(1 - source)
    return Step(float(timestep), alpha, sigma, float(data), float(noise), float(previous), float(fresh))


def _schedule(
    name: str, spec: ScheduleSpec, rows: Sequence[Step], init_noise_sigma: float = 1.0, *, draftable: bool = True
) -> Schedule:
    return Schedule(name, str(spec.config["prediction_type"]), tuple(rows), init_noise_sigma, draftable)


def _euler_sigmas(spec: ScheduleSpec) -> tuple[Floats, Floats]:
    """σ and timesteps, interpolated where the spacing falls between timesteps."""
    timesteps = spec.timesteps().astype(np.float32).astype(np.float64)  # as diffusers gives them to the model
    return np.interp(timesteps, np.arange(spec.training), spec.sigmas), timesteps


def _euler_start(spec: ScheduleSpec, sigmas: Floats) -> float:
    """Diffusers starts at √(σ² + 1) with leading spacing and at σ with the others; here divided by √(σ² + 1)."""
    return 1.0 if spec.config["timestep_spacing"] == "leading" else float(sigmas[0] / math.sqrt(1 + sigmas[0] ** 2))


def _karras(high: float, low: float, steps: int) -> Floats:
    """Karras et al. 2022, eq. 5 with ρ = 7."""
    ramp = np.linspace(0, 1, steps)
    result: Floats = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return result


def _timestep_of(sigmas: Floats, table: Floats) -> Floats:
    """The fractional training timestep of each σ, linear in log σ."""
    result: Floats = np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))
    return result


def _dynamic_shift(spec: ScheduleSpec) -> float:
    """The shift for an image's size: its logarithm (or itself) grows linearly with the number of latent tokens."""
    config = spec.config
    if spec.image_seq_len is None:
        raise ParameterError("scheduler", "use_dynamic_shifting needs image_seq_len, the number of latent tokens")
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = config["base_shift"] + slope * (spec.image_seq_len - config["base_image_seq_len"])
    return float(math.exp(mu) if config["time_shift_type"] == "exponential" else mu)


@dataclass(frozen=True)
class Rule:
    """A scheduler: diffusers' class, the function that makes its rows, and the fields it reads with their defaults.

    `allowed` lists the values of the fields that decide between things a rule can and cannot do.
    """

    class_name: str
    make: Callable[[ScheduleSpec], Schedule]
    fields: Mapping[str, Any]
    allowed: Mapping[str, tuple[Any, ...]]


_SPACED = {"num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 0}
_LEADING = _SPACED | {"timestep_spacing": "leading"}
_LINSPACE = _SPACED | {"timestep_spacing": "linspace"}
_SPACINGS = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "rescale_betas_zero_snr": (False,),
}


_NO = (False, None)
_UNCLIPPED = _SPACINGS | {"clip_sample": (False,), "thresholding": (False,)}  # neither is linear
_SIGMAS = _SPACINGS | {
    "use_exponential_sigmas": _NO,
    "use_beta_sigmas": _NO,
    "final_sigmas_type": ("zero", "sigma_min"),
}


_KARRAS = {"use_karras_sigmas": False, "final_sigmas_type": "zero"}
RULES: dict[str, Rule] = {
    "ddim": Rule("DDIMScheduler", _ddim, _LEADING | {"set_alpha_to_one": True, "clip_sample": True}, _UNCLIPPED),
    "ddpm": Rule(
        "DDPMScheduler", _ddpm, _LEADING | {"variance_type": "fixed_small", "clip_sample": True},
        _UNCLIPPED | {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
    ),
    "euler": Rule(
        "EulerDiscreteScheduler", _euler, _LINSPACE | _KARRAS | {"sigma_min": None, "sigma_max": None},
        _SIGMAS | {"interpolation_type": ("linear",), "timestep_type": ("discrete",)},
    ),
    "euler_a": Rule("EulerAncestralDiscreteScheduler", _euler_ancestral, _LINSPACE, _SPACINGS),
    "dpm++2m": Rule(
        "DPMSolverMultistepScheduler", _dpmpp_2m,
        _LINSPACE | _KARRAS | {
            "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True, "euler_at_final": False,
        },
        _SIGMAS | {
            "solver_order": (1, 2), "solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver++",),
            "thresholding": (False,), "use_lu_lambdas": _NO, "use_flow_sigmas": _NO, "variance_type": (None,),
            "lambda_min_clipped": (-math.inf, "-inf", None), "use_dynamic_shifting": _NO,
        },
    ),
    "flow_euler": Rule(
        "FlowMatchEulerDiscreteScheduler", _flow_euler,
        {
            "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5,
            "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096, "shift_terminal": None,
            "time_shift_type": "exponential", "stochastic_sampling": False,
        },
        {
            "invert_sigmas": _NO, "use_karras_sigmas": _NO, "use_exponential_sigmas": _NO, "use_beta_sigmas": _NO,
            "time_shift_type": ("exponential", "linear"),
        },
    ),
    "lcm": Rule(
        "LCMScheduler", _lcm,
        {
            "num_train_timesteps": 1000, "prediction_type": "epsilon", "original_inference_steps": 50,
            "timestep_scaling": 10.0,
        },
        _UNCLIPPED,
    ),
}  # fmt: skip


SCHEDULERS = tuple(RULES)
_UNSET = "_use_default_values"  # where diffusers lists the fields that have the defaults of the config's own class


# fields that are in ᾱ already, or that only say how to do what is refused
_NEUTRAL = {
    "beta_start", "beta_end", "beta_schedule", "trained_betas", "dynamic_thresholding_ratio", "clip_sample_range",
    "sample_max_value", "flow_shift", "skip_prk_steps",
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
        reason = next((why for kind, why in UNDRAFTED.items() if asked in kind.split()), None)
        what = f"{asked} cannot be drafted: {reason}" if reason else f"unknown scheduler {asked!r}"
        raise ParameterError("scheduler", f"{what}; name one of {', '.join(RULES)} that suits the model")
    rule = RULES[name]
    if name != own:
        config = {field: value for field, value in config.items() if field not in config.get(_UNSET, ())}
    settings = {field: config.get(field, default) for field, default in rule.fields.items()}
    for field, allowed in rule.allowed.items():
        value = config.get(field, rule.fields.get(field, allowed[0]))
        if value not in allowed:
            can = " or ".join(map(repr, allowed))
            says = "says" if field in config else "leaves the default"
            raise ParameterError("scheduler", f"the scheduler config {says} {field}={value!r}; {name} can do {can}")
    if name == own:
        known = _NEUTRAL.union(*((*rule.fields, *rule.allowed) for rule in RULES.values()))  # others are left over
        for field in config:
            if field not in known and not field.startswith("_"):
                raise ParameterError("scheduler", f"{name} does not know the field {field} of the scheduler config")
    training = int(config.get("num_train_timesteps", 1000))
    if name != "flow_euler" and len(alphas_cumprod) != training:
        raise ParameterError("scheduler", f"{name} needs a noise schedule; this model was trained by flow matching")
    if name == "flow_euler" and len(alphas_cumprod):
        raise ParameterError("scheduler", "flow_euler is for models that were trained by flow matching; this was not")
    if not 1 <= num_inference_steps <= training:
        raise ParameterError(
            "num_inference_steps", f"num_inference_steps must be 1 to {training}, not {num_inference_steps}"
        )
    if not 0 <= eta <= 1:
        raise ParameterError("eta", f"eta must be between 0 and 1, not {eta!r}")
    if eta and name != "ddim":
        raise ParameterError("eta", f"eta belongs to ddim; {name} has none")
    alphas = np.asarray(alphas_cumprod, np.float64)
    made = rule.make(ScheduleSpec(settings, alphas, num_inference_steps, eta, image_seq_len, even_sigmas, first))
    return replace(made, rows=made.rows[first:]) if first else made


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
        manifest.scheduler, manifest.alphas_cumprod, num_inference_steps, scheduler=scheduler or substitute(manifest),
        eta=eta, image_seq_len=width // token * (height // token) if token else None,
        even_sigmas=manifest.even_sigmas, first=first,
    )  # fmt: skip


def substitute(manifest: Manifest) -> str | None:
    """The scheduler that takes the place of a model's own where that one cannot be drafted, else None."""
    if _own(manifest.scheduler) is not None:
        return None
    return "dpm++2m" if manifest.alphas_cumprod else "flow_euler"


def substituted(manifest: Manifest, scheduler: str | None) -> str | None:
    """A warning where a spec without a scheduler gets another one than the model's own."""
    name = substitute(manifest)
    if scheduler is not None or name is None:
        return None
    own = manifest.scheduler.get("_class_name")
    why = next((f": {why}" for kind, why in UNDRAFTED.items() if own in kind.split()), "")
    return f"{own}, the model's own scheduler, cannot be drafted{why}; {name} was used in its place"


def _own(config: Mapping[str, Any]) -> str | None:
    """The rule of a config's class."""
    return {rule.class_name: name for name, rule in RULES.items()}.get(str(config.get("_class_name")))


# diffusers' classes that people meet and that have no rule, with the reason
UNDRAFTED = {
    "PNDMScheduler pndm": "a step mixes the last four outputs of the model, and the first needs two evaluations",
    "HeunDiscreteScheduler FlowMatchHeunDiscreteScheduler KDPM2DiscreteScheduler heun": (
        "a step needs two evaluations, the second where the first leads"
    ),
    "LMSDiscreteScheduler lms": "a step mixes the last four outputs of the model",
    "UniPCMultistepScheduler unipc": "each step first corrects the one before it with a new evaluation",
    "DEISMultistepScheduler deis": "its solver is not among those that are known here",
    "DPMSolverSinglestepScheduler DPMSolverSDEScheduler DPMSolverMultistepInverseScheduler": (
        "its solver is not among those that are known here; dpm++2m is the nearest"
    ),
    "TCDScheduler EDMEulerScheduler ScoreSdeVeScheduler": "its steps are not among those that are known here",
}
