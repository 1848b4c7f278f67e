"""Exact stochastic sampling by speculation: drafts that are kept by chance, so that the chain's law stays the same.

Sources: De Bortoli et al., "Accelerated Diffusion Models via Speculative Sampling" (ICML 2025); Hu et al., "Diffusion
Models are Secretly Exchangeable: Parallelizing DDPMs via Autospeculation" (ICML 2025).

A stochastic step is x_{n+1} = m_p + σz with z ~ N(0, I) and m_p made of the model's output at x_n. A draft of it is
x̃ = m_q + σz with the same z, where m_q is made of what was known before. With Δ = (m_p − m_q)/σ and u uniform:

    x_{n+1} = x̃                          if u < exp(⟨z, Δ⟩ − ½‖Δ‖²), the draft is kept,
    x_{n+1} = m_p + σ(z − 2⟨z, e⟩e)       otherwise, e = Δ/‖Δ‖, the noise is reflected.

Proof that x_{n+1} ~ N(m_p, σ²I) in either case. Write everything in units of σ and relative to m_q: the draft is z with
density φ(z), the wanted law has density φ(z − Δ). The ratio of the two at the draft is φ(z − Δ)/φ(z) =
exp(⟨z, Δ⟩ − ½‖Δ‖²), so that kept drafts have density min(φ(z), φ(z − Δ)), and rejected ones max(0, φ(z) − φ(z − Δ)).
A rejected z is moved to T(z) = Δ + z − 2⟨z, e⟩e. T is its own inverse, since ⟨T(z), e⟩ = ‖Δ‖ − ⟨z, e⟩, and preserves
volume. It swaps the two densities: φ(T(z)) = φ(z − Δ), for z − 2⟨z, e⟩e + Δ is the reflection of z − Δ, and
φ(T(z) − Δ) = φ(z), for T(z) − Δ is the reflection of z. So the moved ones have density max(0, φ(z − Δ) − φ(z)) at z,
and both together have min(φ(z), φ(z − Δ)) + max(0, φ(z − Δ) − φ(z)) = φ(z − Δ). ∎

The chance of being kept is ∫ min(φ(z), φ(z − Δ)) dz = 2Φ(−‖Δ‖/2). That is 1 minus the total variation of the two laws,
and no coupling keeps more: neither a whitened one nor one per channel. Only a better m_q does, or more noise.

The proof is for one step, given all before it. It holds along the chain as long as z_n and u_n are independent of m_q
and x_n. So m_q may be made of any evaluation at a state that depends on z_0 … z_{n−1} alone, which includes that of the
rejected draft of x_n itself, but none of the drafts behind it. These are thrown away; z_n, z_{n+1}, … have then left no
trace and serve again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from runtime.sampling.drafts import DRAFTS, Window
from runtime.sampling.operations import (
    STATE,
    Combine,
    Evaluation,
    InnerProducts,
    Operations,
    Options,
    Predict,
    Uniforms,
    combination,
    fresh,
    inner_products,
)  # fmt: skip
from runtime.sampling.schedule import Estimate, Linear, Past, Schedule, unit, weighted_sum

GUESS = "guess"  # what is known of x̂_0 before a round
Numbers = float | NDArray[np.float64]


@dataclass(frozen=True)
class Position:
    """Where a round begins: STATE is at step i, exact and not yet evaluated; `ahead` drafts are to follow it."""

    i: int
    ahead: int


@dataclass(frozen=True)
class Tested:
    """The test of one draft: how far the mean of its step was off, as an expression, and the step's σ."""

    difference: Linear
    sigma: float


def keeps(inner: Numbers, square: Numbers, sigma: float, uniform: Numbers) -> bool | NDArray[np.bool_]:
    """Whether drafts are kept, from ⟨z, D⟩ and ‖D‖² with D = m_p − m_q = σΔ; numbers or arrays of them."""
    kept: NDArray[np.bool_] = uniform < np.exp(np.minimum(0.0, inner / sigma - square / (2 * sigma**2)))
    return kept


def reflection(inner: Numbers, square: Numbers, sigma: float) -> Numbers:
    """c of x_{n+1} = m_p + σz − c·D: σ·2⟨z, e⟩e = c·D."""
    return 2 * sigma * inner / square


class Speculation:
    """The operations of rounds by where they begin, for a schedule and options."""

    def __init__(self, schedule: Schedule, options: Options) -> None:
        self.schedule, self.k = schedule, options.k
        self.variance = DRAFTS[options.drafts].variance or 0.0
        self._rounds: dict[Position, tuple[Combine | None, Predict, InnerProducts, tuple[Tested, ...]]] = {}

    def position(self, i: int) -> Position:
        """The next round: drafts end before the step behind a step without noise, which keeps no draft."""
        ahead, most = 0, min(self.k, self.schedule.steps - i) - 1
        while ahead < most and self.schedule.rows[i + ahead].fresh:
            ahead += 1
        return Position(i, ahead)

    def start(self) -> Combine:
        """What is known before the first evaluation: x̂_0 of latents of unit variance, x·α/(α² + σ²)."""
        row = self.schedule.rows[0]
        made = {GUESS: self._known(0, {STATE: row.alpha / (row.alpha**2 + row.sigma**2)}, unit(STATE))}
        return combination(made, 0)

    def round(self, at: Position) -> tuple[Combine | None, Predict, InnerProducts, tuple[Tested, ...]]:
        """Drafts, evaluations, and the measurements that decide on the drafts."""
        if at not in self._rounds:
            window = Window("", at.ahead)
            evaluations = (Evaluation(STATE, at.i, window.output(0)), *window.predict(at.i).evaluations)
            tested = tuple(self._tested(at, window, j) for j in range(at.ahead))
            pairs = [(one.difference, unit(fresh(at.i + j))) for j, one in enumerate(tested)]
            drafts = combination(self._drafts(at, window), at.i) if at.ahead else None
            self._rounds[at] = drafts, Predict(evaluations), inner_products(pairs), tested
        return self._rounds[at]

    def finish(self, at: Position, taken: int, coefficient: float) -> Combine:
        """The state after `taken` steps and what is known there; the coefficient is that of a reflection, or 0."""
        schedule, window, n = self.schedule, Window("", at.ahead), at.i + taken
        x = self._refined(at, window, taken - 1)
        if coefficient:
            x = weighted_sum((1.0, x), (-coefficient, self._tested(at, window, taken - 1).difference))
        made = {STATE: x} | schedule.history(n, self._past(at, window, taken))
        if n < schedule.steps:
            seen = min(taken, at.ahead)  # the rejected draft of the new state, or the state before it
            data = self._estimate(at, window, seen).data
            made[GUESS] = self._known(at.i + seen, data, unit(self._slot(window, seen)))
        return combination(made, n)

    @staticmethod
    def _slot(window: Window, j: int) -> str:
        return window.draft(j) if j else STATE

    def _estimate(self, at: Position, window: Window, j: int) -> Estimate:
        """What the model said of the j-th state of a round."""
        x = unit(self._slot(window, j))
        return self.schedule.estimate(at.i + j, unit(window.output(j)), x, x)

    def _past(self, at: Position, window: Window, j: int) -> Past:
        """What the steps before the j-th state kept."""
        past = self.schedule.past(at.i)
        for m in range(j):
            past = self.schedule.keep(at.i + m, self._estimate(at, window, m), past)
        return past

    def _refined(self, at: Position, window: Window, j: int) -> Linear:
        """m_p + σz of the step from the j-th state of a round."""
        n = at.i + j
        return self.schedule.step(n, self._estimate(at, window, j), self._past(at, window, j), fresh(n))

    def _tested(self, at: Position, window: Window, j: int) -> Tested:
        """m_p − m_q of the step from the j-th state; not measured at the draft itself, whose storage rounds."""
        n, past = at.i + j, self.schedule.past(at.i)
        for m in range(j):
            past = self.schedule.keep(at.i + m, self._guess(at.i + m, unit(self._slot(window, m))), past)
        drafted = self.schedule.step(n, self._guess(n, unit(self._slot(window, j))), past, fresh(n))
        difference = weighted_sum((1.0, self._refined(at, window, j)), (-1.0, drafted))
        difference = {slot: value for slot, value in difference.items() if slot != fresh(n)}
        return Tested(difference, self.schedule.rows[n].fresh)

    def _drafts(self, at: Position, window: Window) -> dict[str, Linear]:
        made: dict[str, Linear] = {}
        x, past = unit(STATE), self.schedule.past(at.i)
        for n in range(at.i, at.i + at.ahead):
            guess = self._guess(n, x)
            x, past = self.schedule.step(n, guess, past, fresh(n)), self.schedule.keep(n, guess, past)
            made[window.draft(n - at.i + 1)] = x
        return made

    def _known(self, n: int, data: Linear, x: Linear) -> Linear:
        """What GUESS holds: the mean μ for which x̂_0 = μ + v/(s² + v)·(x/α − μ), s = σ/α; x̂_0 itself for v = 0."""
        row, v = self.schedule.rows[n], self.variance
        return weighted_sum((1 + v * (row.alpha / row.sigma) ** 2, data), (-v * row.alpha / row.sigma**2, x))

    def _guess(self, n: int, x: Linear) -> Estimate:
        """The estimate for a state of step n: x̂_0 as of a Gaussian of variance v around GUESS."""
        row, v = self.schedule.rows[n], self.variance
        total = row.sigma**2 + v * row.alpha**2
        data = weighted_sum((row.sigma**2 / total, unit(GUESS)), (v * row.alpha / total, x))
        return self.schedule.assumed(n, data, x)


@lru_cache(maxsize=16)
def speculation(schedule: Schedule, options: Options) -> Speculation:
    """Rounds that come again with every image."""
    return Speculation(schedule, options)


def speculative(schedule: Schedule, options: Options) -> Operations:
    """Samples with the law of `sequential`, in between N/k and N rounds of the state itself and up to k − 1 drafts.

    Returns ‖Δ‖ of the drafts that it kept.
    """
    rounds, distances = speculation(schedule, options), list[float]()
    yield rounds.start()
    at = rounds.position(0)
    while at.i < schedule.steps:
        drafts, predict, products, tested = rounds.round(at)
        if drafts is not None:
            yield drafts
        yield predict
        taken, coefficient = 1, 0.0
        if tested:
            measured = yield products
            uniforms = yield Uniforms(tuple(range(at.i, at.i + at.ahead)))
            taken, coefficient = decide(measured, tested, uniforms)
            distances += [math.sqrt(measured[3 * j + 1]) / tested[j].sigma for j in range(taken - 1)]
        yield rounds.finish(at, taken, coefficient)
        at = rounds.position(at.i + taken)
    return tuple(distances)


def decide(measured: Sequence[float], tested: Sequence[Tested], uniforms: Sequence[float]) -> tuple[int, float]:
    """The steps that a round makes, and c of the reflection that makes the last one; 0 where every draft was kept."""
    for j, (one, uniform) in enumerate(zip(tested, uniforms, strict=True)):
        inner, square, _ = measured[3 * j : 3 * j + 3]
        if not keeps(inner, square, one.sigma, uniform):
            return j + 1, float(reflection(inner, square, one.sigma))
    return len(tested) + 1, 0.0
