"""Where the steps of a schedule lie: timesteps by spacing, noise levels by curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import ParameterError

Floats = NDArray[np.float64]


def karras(high: float, low: float, steps: int) -> Floats:
    """Karras et al. 2022, eq. 5 with ρ = 7."""
    ramp = np.linspace(0, 1, steps)
    result: Floats = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return result


def exponential(high: float, low: float, steps: int) -> Floats:
    """Even in log σ."""
    result: Floats = np.exp(np.linspace(np.log(high), np.log(low), steps))
    return result


def beta(high: float, low: float, steps: int) -> Floats:
    """Lee et al. 2024, "Beta Sampling is All You Need": quantiles of the beta distribution with a = b = 0.6."""
    return low + _beta_quantiles(steps) * (high - low)


@lru_cache(maxsize=256)
def _beta_quantiles(steps: int, a: float = 0.6) -> Floats:
    """The quantiles of 1 … 0 of the symmetric beta distribution, by bisection.

    Its density is even about ½, so the lower half is enough: B(x) = xᵃ Σ (1−a)ₙ xⁿ / (n! (a+n)), which 64 terms give to
    rounding for x ≤ ½.
    """
    shares = 1 - np.linspace(0, 1, steps)
    lower = np.minimum(shares, 1 - shares)
    n = np.arange(64)
    terms = np.concatenate([[1.0], np.cumprod((n[1:] - a) / n[1:])]) / (a + n)

    def mass(x: Floats) -> Floats:
        result: Floats = x**a * (x[:, None] ** n @ terms)
        return result

    wanted = lower * 2 * mass(np.array([0.5]))
    left, right = np.zeros(steps), np.full(steps, 0.5)
    for _ in range(80):
        middle = (left + right) / 2
        below = mass(middle) < wanted
        left, right = np.where(below, middle, left), np.where(below, right, middle)
    found = np.where(lower > 0, right, 0.0)
    result = np.where(shares > 0.5, 1 - found, found)
    result.flags.writeable = False
    return result


# diffusers' fields that spread the noise levels along a curve, whatever the spacing of the timesteps
CURVES = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential, "use_beta_sigmas": beta}


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

    @cached_property
    def sigmas(self) -> Floats:
        """σ/α per training timestep."""
        result: Floats = np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)
        return result

    @cached_property
    def rounded_sigmas(self) -> NDArray[np.float32]:
        """The same, calculated in float32 as in diffusers."""
        alphas = self.alphas_cumprod.astype(np.float32)
        result: NDArray[np.float32] = np.sqrt((1 - alphas) / alphas)
        return result

    def spread(self, high: float, low: float) -> Floats | None:
        """N noise levels from `high` to `low` as the config's one of CURVES spreads them; None without one."""
        wanted = [curve for field, curve in CURVES.items() if self.config.get(field)]
        if len(wanted) > 1:
            raise ParameterError("scheduler", f"the scheduler config sets more than one of {', '.join(CURVES)}")
        least, most = self.config.get("sigma_min"), self.config.get("sigma_max")
        high, low = high if most is None else float(most), low if least is None else float(least)
        return wanted[0](high, low, self.steps) if wanted else None

    def timestep_of(self, sigmas: Floats) -> Floats:
        """The fractional training timestep of each σ/α, linear in its logarithm.

        To the bit as in diffusers, whose table is float32: some solvers cut the fraction off, so that 998.9999 is 998.
        """
        logs, wanted = np.log(self.rounded_sigmas), np.log(sigmas)
        low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, self.training - 2)
        share = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0, 1)
        result: Floats = (1 - share) * low + share * (low + 1)
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
