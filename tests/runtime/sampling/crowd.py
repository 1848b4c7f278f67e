"""Many samples at once through the operations of a sampler, and tests of whether two sets of samples have one law."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.base import Array
from runtime.sampling import speculative as module
from runtime.sampling.operations import STATE, Combine, Operation, Options, Predict, fresh
from runtime.sampling.schedule import Schedule
from runtime.sampling.sequential import sequential

PERMUTATIONS = 1999  # the smallest p is 1/2000
FEATURES = 128
BLOCK = 10  # samples that the permutation test keeps together


@dataclass(frozen=True)
class Mixture:
    """Gaussians of one variance around `means`, (components, dimensions), equally often."""

    means: Array
    deviation: float

    def noise(self, x: Array, alpha: float, sigma: float) -> Array:
        """E[ε | α·x_0 + σ·ε = x], the exact output of a model that predicts ε."""
        variance = np.float32(alpha**2 * self.deviation**2 + sigma**2)
        means = np.float32(alpha) * self.means
        closeness = (x @ means.T - 0.5 * (means**2).sum(1)) / variance
        weights = np.exp(closeness - closeness.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        result: Array = np.float32(sigma) * (x - weights @ means) / variance
        return result


@dataclass
class Crowd:
    """Slots of many samples, (samples, dimensions), in which a sampler's operations run for some of them.

    Samples that wait at the same step do the next round together, the rearmost first, so that noise is needed for a
    few steps at a time only.
    """

    mixture: Mixture
    schedule: Schedule
    samples: int
    seed: int
    slots: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """The law of the first state is exact, also of a schedule that begins in the middle."""
        row, means = self.schedule.rows[0], self.mixture.means
        which = np.random.default_rng((self.seed, 1, 1)).integers(len(means), size=self.samples)
        scale = np.hypot(row.alpha * self.mixture.deviation, row.sigma)
        self.slots[STATE] = np.float32(row.alpha) * means[which] + np.float32(scale) * self.noise(-1)

    def noise(self, step: int) -> Array:
        """What a step adds; −1 is the start."""
        generator = np.random.default_rng((self.seed, step + 1))
        return generator.standard_normal((self.samples, self.mixture.means.shape[1]), np.float32)

    def uniforms(self) -> Any:
        return np.random.default_rng((self.seed, 1 << 20)).random((self.samples, self.schedule.steps))

    def _rows(self, slot: str, which: Any) -> Array:
        if slot not in self.slots and slot.startswith("fresh "):
            self.slots[slot] = self.noise(int(slot.split()[1]))
        rows: Array = self.slots[slot][which]
        return rows

    def combination(self, sources: tuple[str, ...], rows: Any, which: Any) -> list[Array]:
        inputs = [self._rows(slot, which) for slot in sources]
        made = []
        for row in rows:
            total = np.zeros_like(self.slots[STATE][which])
            for weight, value in zip(row, inputs, strict=True):
                if weight:
                    total += np.float32(weight) * value
            made.append(total)
        return made

    def store(self, slot: str, which: Any, value: Array) -> None:
        if slot not in self.slots:
            self.slots[slot] = np.empty_like(self.slots[STATE])
        self.slots[slot][which] = value

    def play(self, operation: Operation, which: Any) -> None:
        if isinstance(operation, Predict):
            for one in operation.evaluations:
                row = self.schedule.rows[one.step]
                self.store(one.output, which, self.mixture.noise(self._rows(one.latent, which), row.alpha, row.sigma))
            return
        assert isinstance(operation, Combine)
        made = self.combination(operation.sources, operation.rows, which)
        for slot, value in zip(operation.targets, made, strict=True):
            self.store(slot, which, value)

    def sequential(self) -> Array:
        for operation in sequential(self.schedule, Options()):
            self.play(operation, slice(None))
            if isinstance(operation, Combine):
                self.slots.pop(fresh(operation.finished - 1), None)
        return self.slots[STATE]

    def speculative(self, options: Options) -> tuple[Array, Counted]:
        """The samples of mode speculative, by its own operations and its own rule."""
        rounds = module.Speculation(self.schedule, options)
        self.play(rounds.start(), slice(None))
        steps = np.zeros(self.samples, int)
        uniforms = self.uniforms()
        counted = Counted()
        while (i := int(steps.min())) < self.schedule.steps:
            for n in range(i):
                self.slots.pop(fresh(n), None)
            which = np.flatnonzero(steps == i)
            at = rounds.position(i)
            drafts, predict, products, tested = rounds.round(at)
            if drafts is not None:
                self.play(drafts, which)
            self.play(predict, which)
            taken, reflected = np.ones(len(which), int), np.zeros(len(which))
            undecided = np.ones(len(which), bool)
            for j, (one, product) in enumerate(zip(tested, products.products, strict=True)):
                a, b = self.combination(product.sources, (product.a, product.b), which)
                inner, square = (np.einsum("nd,nd->n", a, c).astype(np.float64) for c in (b, a))
                kept = np.broadcast_to(module.keeps(inner, square, one.sigma, uniforms[which, i + j]), undecided.shape)
                counted.note(np.sqrt(square[undecided]) / one.sigma, kept[undecided])
                rejected = undecided & ~kept
                reflected[rejected] = module.reflection(inner[rejected], square[rejected], one.sigma)
                undecided &= kept
                taken[undecided] += 1
            for n in np.unique(taken):
                self._finish(rounds, at, int(n), which[taken == n], reflected[taken == n])
            steps[which] += taken
            counted.rounds += len(which)
        counted.rounds /= self.samples
        return self.slots[STATE], counted

    def _finish(self, rounds: module.Speculation, at: module.Position, taken: int, which: Any, c: Any) -> None:
        """`finish` is affine in the coefficient: between what it is at 0 and at 1."""
        operations = [rounds.finish(at, taken, coefficient) for coefficient in (0.0, 1.0)]
        ends = [self.combination(one.sources, one.rows, which) for one in operations]
        weight = c[:, np.newaxis].astype(np.float32)
        for slot, without, reflected in zip(operations[0].targets, *ends, strict=True):
            self.store(slot, which, without + weight * (reflected - without))


@dataclass
class Counted:
    """Rounds per sample, and how often drafts were kept by their ‖Δ‖."""

    rounds: float = 0.0
    tested: int = 0
    kept: int = 0
    expected: float = 0.0
    variance: float = 0.0

    def note(self, shift: Any, kept: Any) -> None:
        chance = np.array([math.erfc(value / math.sqrt(8)) for value in shift])  # 2Φ(−‖Δ‖/2)
        self.tested += len(shift)
        self.kept += int(kept.sum())
        self.expected += float(chance.sum())
        self.variance += float((chance * (1 - chance)).sum())


def p_values(x: Array, y: Array) -> dict[str, float]:
    """The chance of a difference at least this large between two sets of samples of the same law.

    mean: of the whitened difference of means, χ². covariance: of the largest z of all entries, Bonferroni. mmd: of a
    maximum mean discrepancy on random Fourier features at four bandwidths, by permutation.
    """
    return {"mean": _mean(x, y), "covariance": _covariance(x, y), "mmd": _mmd(x, y)}


def _mean(x: Array, y: Array) -> float:
    apart = (x.mean(0) - y.mean(0)).astype(np.float64)
    spread = np.cov(x.T.astype(np.float64)) / len(x) + np.cov(y.T.astype(np.float64)) / len(y)
    square, d = float(apart @ np.linalg.solve(spread, apart)), len(apart)
    return _normal_tail(((square / d) ** (1 / 3) - (1 - 2 / (9 * d))) / math.sqrt(2 / (9 * d)))  # Wilson and Hilferty


def _covariance(x: Array, y: Array) -> float:
    means, variances = [], []
    for one in (x, y):
        centred = one.astype(np.float64) - one.mean(0, dtype=np.float64)
        product = centred.T @ centred / len(one)
        squares = (centred**2).T @ (centred**2) / len(one)
        means.append(product)
        variances.append((squares - product**2) / len(one))
    z = np.abs(means[0] - means[1]) / np.sqrt(variances[0] + variances[1])
    d = len(z)
    return min(1.0, d * (d + 1) / 2 * math.erfc(float(z.max()) / math.sqrt(2)))


def _mmd(x: Array, y: Array) -> float:
    generator, together = np.random.default_rng(0), np.concatenate([x, y])
    scale = float(np.sqrt(together.var(0).sum()))
    bandwidths = np.repeat([0.25, 0.5, 1.0, 2.0], FEATURES // 8)
    directions = generator.standard_normal((x.shape[1], FEATURES // 2)) / (scale * bandwidths)
    phase = together @ directions.astype(np.float32)
    features = np.concatenate([np.cos(phase), np.sin(phase)], 1)
    features -= features.mean(0)
    sums = features.reshape(-1, BLOCK, FEATURES).sum(1)  # blocks can be exchanged as well as samples can
    labels = np.repeat(np.array([1, -1], np.float32), len(x) // BLOCK)
    permuted = np.concatenate([labels[np.newaxis], generator.permuted(np.tile(labels, (PERMUTATIONS, 1)), axis=1)])
    found = ((permuted @ sums) ** 2).sum(1)
    return float(np.mean(found >= found[0]))


def _normal_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))
