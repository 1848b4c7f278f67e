"""A noise schedule as a table with one row per step, and the linear expressions that samplers build of it.

The state at step i is `x_i = α_i·x̂_0 + σ_i·ε`, as the model sees it. Every scheduler's step is one row over the two
estimates that the model's output gives, the data x̂_0 and the noise ε:

    x_{i+1} = data·x̂_0(i) + noise·ε(i) + Σ_j previous_j·m(i−1−j) + fresh·z_i

where m(i), what a step leaves to later ones, is x̂_0 or another combination of the two, such as ε. DDIM, DDPM and the
Euler family differ in the numbers; only multistep solvers have `previous`, only stochastic ones `fresh`. So a step, a
draft over many steps and a refined block are linear expressions over slots, multiplied out in float64 on the host
before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Linear = Mapping[str, float]
"""A linear expression over slots: slot name → coefficient, none of them zero."""
Past = Sequence[Linear]
"""What the steps before one kept for it, newest first."""


def unit(slot: str) -> Linear:
    """The expression that is one slot."""
    return {slot: 1.0}


def weighted_sum(*terms: tuple[float, Linear]) -> Linear:
    """Σ weight · expression."""
    total: dict[str, float] = {}
    for weight, expression in terms:
        for slot, coefficient in expression.items():
            total[slot] = total.get(slot, 0.0) + weight * coefficient
    return {slot: coefficient for slot, coefficient in total.items() if coefficient}


@dataclass(frozen=True)
class Step:
    """One row: where the model is evaluated (timestep, α, σ) and the coefficients of the step from there.

    `previous` has the coefficients of what earlier steps kept, newest first; `kept` those of x̂_0 and ε in what this one
    keeps.
    """

    timestep: float
    alpha: float
    sigma: float
    data: float
    noise: float
    previous: tuple[float, ...] = ()
    fresh: float = 0.0
    kept: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class Estimate:
    """What a model's output says about a state x: x = α·data + σ·noise."""

    data: Linear
    noise: Linear


def _conversion(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float, float, float]:
    """x̂_0 and ε from state and model output: (x̂_0 per state, x̂_0 per output, ε per state, ε per output)."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha, 0.0, 1.0
    if prediction_type == "v_prediction":
        return alpha, -sigma, sigma, alpha
    if prediction_type == "sample":
        return 0.0, 1.0, 1 / sigma, -alpha / sigma
    assert prediction_type == "flow_prediction", prediction_type
    return 1.0, -sigma, 1.0, alpha


@dataclass(frozen=True)
class Schedule:
    """N steps. The initial state is unit variance noise times `init_noise_sigma`.

    A schedule that is not `draftable` has steps so long that only `sequential` makes sense.
    """

    name: str
    prediction_type: str
    rows: tuple[Step, ...]
    init_noise_sigma: float = 1.0
    draftable: bool = True

    @property
    def steps(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timestep that goes into the model at each step."""
        return tuple(row.timestep for row in self.rows)

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """The steps that add noise of their own."""
        return tuple(i for i, row in enumerate(self.rows) if row.fresh)

    @property
    def multistep(self) -> bool:
        """Whether a step needs the estimates before it."""
        return self.depth > 0

    @cached_property
    def depth(self) -> int:
        """How many steps back the steps of a multistep solver reach."""
        return max((len(row.previous) for row in self.rows), default=0)

    @cached_property
    def oldest(self) -> tuple[int, ...]:
        """Per step, the earliest step that it or a later one reads; itself if there is none."""
        reach = [i - len(row.previous) for i, row in enumerate(self.rows)]
        return tuple(min(reach[i:]) for i in range(len(reach)))

    def estimate(self, i: int, output: Linear, at: Linear, x: Linear, variance: float | None = None) -> Estimate:
        """The estimate for state x at step i, from the model's output at the state `at`, which may be a draft of x.

        The output is converted with the state that the model saw. What is then handed over to x is, as in the paper, ε
        itself (v for flow matching, whose steps are made of it), so that all of x − at goes into x̂_0. With `variance`
        the difference is split as a Gaussian with that data variance splits it: v/(s² + v) of it, s = σ/α, into x̂_0.
        """
        row = self.rows[i]
        data_at, data_output, noise_at, noise_output = _conversion(self.prediction_type, row.alpha, row.sigma)
        data = weighted_sum((data_at, at), (data_output, output))
        noise = weighted_sum((noise_at, at), (noise_output, output))
        if at == x:
            return Estimate(data, noise)
        if variance is not None:
            share = variance / ((row.sigma / row.alpha) ** 2 + variance)
        else:
            share = row.alpha if self.prediction_type == "flow_prediction" else 1.0
        rest = (1 - share) / row.sigma
        return Estimate(
            weighted_sum((1.0, data), (share / row.alpha, x), (-share / row.alpha, at)),
            weighted_sum((1.0, noise), (rest, x), (-rest, at)),
        )

    def assumed(self, i: int, data: Linear, x: Linear) -> Estimate:
        """The estimate for state x at step i if the model's x̂_0 were `data`: what drafts are made with."""
        row = self.rows[i]
        return Estimate(data, weighted_sum((1 / row.sigma, x), (-row.alpha / row.sigma, data)))

    def past(self, i: int) -> Past:
        """What the steps before i kept, in the slots where it lies: as many of them as a later step may read."""
        return tuple(unit(self._kept_slot(j)) for j in range(i - 1, max(0, i - self.depth) - 1, -1))

    def keep(self, i: int, estimate: Estimate, past: Past) -> Past:
        """The past of step i + 1."""
        if not self.depth:
            return ()
        data, noise = self.rows[i].kept
        return (weighted_sum((data, estimate.data), (noise, estimate.noise)), *past[: self.depth - 1])

    def history(self, i: int, past: Past) -> dict[str, Linear]:
        """Where to write what steps before i kept, as far as step i or a later one reads it and it is not there yet."""
        if i >= self.steps:
            return {}
        slots = {j: self._kept_slot(j) for j in range(i - 1, self.oldest[i] - 1, -1)}
        return {slot: kept for (j, slot), kept in zip(slots.items(), past, strict=False) if kept != unit(slot)}

    def _kept_slot(self, i: int) -> str:
        """The slot of what step i keeps: in turn, so that nothing has to move when steps go on."""
        return f"kept {i % self.depth}"

    def step(self, i: int, estimate: Estimate, past: Past, fresh: str) -> Linear:
        """x_{i+1}; `past` is what the steps before kept, newest first, `fresh` names the slot of z_i."""
        row = self.rows[i]
        terms = [(row.data, estimate.data), (row.noise, estimate.noise)]
        assert len(row.previous) <= len(past), f"step {i} reads steps before the first"
        terms += zip(row.previous, past, strict=False)
        if row.fresh:
            terms.append((row.fresh, unit(fresh)))
        return weighted_sum(*terms)
