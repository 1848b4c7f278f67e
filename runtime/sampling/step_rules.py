"""The rules of the schedulers: each one function from a `ScheduleSpec` to the rows of a `Schedule`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from engines.errors import ParameterError
from runtime.sampling.schedule import Schedule, Step
from runtime.sampling.spacing import Floats, ScheduleSpec


def ddim(spec: ScheduleSpec) -> Schedule:
    """Song et al. 2021, eq. 12 and 16. A step goes from t to t − T//N, below 0 to the final ᾱ."""
    alphas, stride = spec.alphas_cumprod, spec.training // spec.steps
    final = 1.0 if spec.config["set_alpha_to_one"] else float(alphas[0])
    rows = []
    for t in spec.timesteps().round().astype(int):
        source, target = alphas[t], alphas[t - stride] if t >= stride else final
        fresh = spec.eta * math.sqrt((1 - target) / (1 - source) * (1 - source / target))
        rows.append(_row(t, source, math.sqrt(target), math.sqrt(1 - target - fresh**2), fresh=fresh))
    return schedule_of("ddim", spec, rows)


def ddpm(spec: ScheduleSpec) -> Schedule:
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
    return schedule_of("ddpm", spec, rows)


def euler(spec: ScheduleSpec) -> Schedule:
    """Karras et al. 2022, algorithm 2 without churn; states are divided by √(1 + σ²), which is what the model sees."""
    sigmas, timesteps = curved_sigmas(spec)
    last = float(spec.sigmas[0]) if spec.config["final_sigmas_type"] == "sigma_min" else 0.0
    rows = []
    for t, source, target in zip(timesteps, sigmas, [*sigmas[1:], last], strict=True):
        scale = 1 / math.sqrt(1 + target**2)
        rows.append(_row(t, 1 / (1 + source**2), scale, scale * target))
    return schedule_of("euler", spec, rows, euler_start(spec, sigmas))


def euler_ancestral(spec: ScheduleSpec) -> Schedule:
    """Euler to below the next σ, then fresh noise up to it."""
    sigmas, timesteps = euler_sigmas(spec)
    rows = []
    for t, source, target in zip(timesteps, sigmas, [*sigmas[1:], 0.0], strict=True):
        up = math.sqrt(target**2 * (source**2 - target**2) / source**2)
        scale = 1 / math.sqrt(1 + target**2)
        rows.append(_row(t, 1 / (1 + source**2), scale, scale * math.sqrt(target**2 - up**2), fresh=scale * up))
    return schedule_of("euler_a", spec, rows, euler_start(spec, sigmas))


def flow_euler(spec: ScheduleSpec) -> Schedule:
    """Flow matching (Esser et al. 2024): x = (1−σ)·x_0 + σ·ε, and Euler steps in σ; `shift` moves steps to high σ."""
    sigmas = flow_sigmas(spec)
    rows = []
    for source, target in zip(sigmas.tolist(), [*sigmas[1:].tolist(), 0.0], strict=True):
        noise, fresh = (0.0, target) if spec.config["stochastic_sampling"] else (target, 0.0)
        row = Step(source * spec.training, 1 - source, source, 1 - target, noise, fresh=fresh)
        rows.append(row)
    return Schedule("flow_euler", "flow_prediction", tuple(rows))


def flow_sigmas(spec: ScheduleSpec) -> Floats:
    """The N noise levels of flow matching, shifted, stretched and spread as the config says."""
    config, training = spec.config, spec.training
    shift = config["shift"]
    dynamic = config.get("use_dynamic_shifting")
    low = 1 / training if dynamic else shift / training / (1 + (shift - 1) / training)
    if spec.even_sigmas:
        low = 1 / spec.steps
    sigmas = np.linspace(1.0, low, spec.steps)
    if dynamic:
        grow = _dynamic_shift(spec)
        sigmas = grow / (grow + (1 / sigmas - 1))
    else:
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if config.get("shift_terminal"):
        if spec.steps == 1:
            raise ParameterError("num_inference_steps", "shift_terminal stretches a schedule of at least 2 steps")
        sigmas = 1 - (1 - sigmas) * (1 - config["shift_terminal"]) / (1 - sigmas[-1])
    spread = spec.spread(float(sigmas[0]), float(sigmas[-1]))
    return sigmas if spread is None else spread


def lcm(spec: ScheduleSpec) -> Schedule:
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
    return schedule_of("lcm", spec, rows, draftable=False)


def _row(timestep: float, source: float, data: float, noise: float, *, fresh: float = 0.0) -> Step:
    """A row from a source ᾱ."""
    alpha, sigma = math.sqrt(source), math.sqrt(1 - source)
    return Step(float(timestep), alpha, sigma, float(data), float(noise), fresh=float(fresh))


def schedule_of(
    name: str, spec: ScheduleSpec, rows: Sequence[Step], init_noise_sigma: float = 1.0, *, draftable: bool = True
) -> Schedule:
    """The schedule of a rule, which has the config's prediction type."""
    return Schedule(name, str(spec.config["prediction_type"]), tuple(rows), init_noise_sigma, draftable)


def euler_sigmas(spec: ScheduleSpec) -> tuple[Floats, Floats]:
    """σ and timesteps, interpolated where the spacing falls between timesteps."""
    timesteps = spec.timesteps().astype(np.float32).astype(np.float64)  # as diffusers gives them to the model
    return np.interp(timesteps, np.arange(spec.training), spec.sigmas), timesteps


def curved_sigmas(spec: ScheduleSpec, *, rounded: bool = False) -> tuple[Floats, Floats]:
    """The same, or spread along the config's curve; with `rounded` in diffusers' float32."""
    sigmas, timesteps = euler_sigmas(spec)
    if rounded:
        sigmas = np.interp(timesteps, np.arange(spec.training), spec.rounded_sigmas)
    spread = spec.spread(float(sigmas[0]), float(sigmas[-1]))
    if spread is not None:
        sigmas, timesteps = spread, spec.timestep_of(spread)
    return (sigmas.astype(np.float32).astype(np.float64) if rounded else sigmas), timesteps


def euler_start(spec: ScheduleSpec, sigmas: Floats) -> float:
    """Diffusers starts at √(σ² + 1) with leading spacing and at σ with the others; here divided by √(σ² + 1)."""
    return 1.0 if spec.config["timestep_spacing"] == "leading" else float(sigmas[0] / math.sqrt(1 + sigmas[0] ** 2))


def _dynamic_shift(spec: ScheduleSpec) -> float:
    """The shift for an image's size: its logarithm (or itself) grows linearly with the number of latent tokens."""
    config = spec.config
    if spec.image_seq_len is None:
        raise ParameterError("scheduler", "use_dynamic_shifting needs image_seq_len, the number of latent tokens")
    if config["shift_by_steps"]:
        mu = shift_by_steps(spec.image_seq_len, spec.steps)
        return float(math.exp(mu) if config["time_shift_type"] == "exponential" else mu)
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = config["base_shift"] + slope * (spec.image_seq_len - config["base_image_seq_len"])
    return float(math.exp(mu) if config["time_shift_type"] == "exponential" else mu)


def shift_by_steps(tokens: int, steps: int) -> float:
    """FLUX.2's µ: a line in the number of tokens for 10 steps, another one for 200, and a line in N between them.

    Above 4300 tokens it is that of 200 steps for any N (diffusers' `compute_empirical_mu`).
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190
    return slope * steps + many - 200 * slope
