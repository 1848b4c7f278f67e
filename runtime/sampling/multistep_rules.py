"""The rules of the multistep solvers, whose rows read what earlier steps kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.errors import ParameterError
from runtime.sampling.schedule import Schedule, Step
from runtime.sampling.spacing import CURVES, Floats, ScheduleSpec
from runtime.sampling.step_rules import curved_sigmas, euler_start, schedule_of

EPSILON = (0.0, 1.0)  # what a step keeps: ε instead of x̂_0


@dataclass(frozen=True)
class Level:
    """One noise level of x = α·x_0 + σ·ε."""

    alpha: float
    sigma: float

    @property
    def lambda_(self) -> float:
        """ln(α/σ), half the logarithm of the signal-to-noise ratio."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)

    @classmethod
    def of(cls, ratio: float) -> Level:
        """Of σ/α where α² + σ² = 1."""
        return cls(1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2))

    @classmethod
    def of_flow(cls, sigma: float) -> Level:
        """Of σ where α + σ = 1."""
        return cls(1 - sigma, sigma)


def _levels(spec: ScheduleSpec, flow_sigmas: Floats | None = None) -> tuple[list[Level], Floats, Level]:
    """The levels of the solvers' steps, what the model is told there (whole timesteps), and the level at the end.

    `flow_sigmas` are those of flow matching, before the shift.
    """
    config, n = spec.config, spec.steps
    last = float(spec.sigmas[0]) if config["final_sigmas_type"] == "sigma_min" else 0.0
    spread = spec.spread(float(spec.rounded_sigmas[-1]), float(spec.rounded_sigmas[0]))
    flow = bool(config.get("use_flow_sigmas"))
    if flow and spread is None:
        even = (1 - np.linspace(1, 1 / spec.training, n + 1))[::-1][:-1] if flow_sigmas is None else flow_sigmas
        shift = float(config["flow_shift"])
        sigmas = shift * even / (1 + (shift - 1) * even)
        rounded = sigmas.astype(np.float32).tolist()  # as in diffusers: it shows in 1 − σ near σ = 1
        return [Level.of_flow(one) for one in rounded], np.floor(sigmas * spec.training), Level.of_flow(last)
    if flow:
        raise ParameterError("scheduler", "the scheduler config sets use_flow_sigmas beside another curve of σ")
    if spread is not None:
        timesteps = spec.timestep_of(spread)
        timesteps = timesteps.round() if config.get("use_karras_sigmas") else np.floor(timesteps)
        return [Level.of(float(one)) for one in spread], timesteps, Level.of(last)
    timesteps = spec.timesteps(intervals=0 if config["timestep_spacing"] == "trailing" else 1).round()
    return [Level.of(float(one)) for one in spec.sigmas[timesteps.astype(int)]], timesteps, Level.of(last)


def _order(spec: ScheduleSpec, i: int, *, first_at_end: bool) -> int:
    """The order of step i: it grows from 1 at the first step and, in short schedules, falls towards the last."""
    config, left = spec.config, spec.steps - i
    order = min(int(config["solver_order"]), max(i - spec.first, 0) + 1)
    if left == 1 and first_at_end:
        return 1
    return min(order, left) if config["lower_order_final"] and spec.steps < 15 and left <= 2 else order


def dpmpp(spec: ScheduleSpec) -> Schedule:
    """DPM-Solver++ (Lu et al. 2022, algorithm 2) up to order 3 in x̂_0, first order at the start and the end.

    With `algorithm_type` sde-dpmsolver++ the same for the reverse SDE (there eq. 14 ff.), whose steps add noise.
    """
    config = spec.config
    levels, timesteps, last = _levels(spec)
    stochastic = config["algorithm_type"] == "sde-dpmsolver++"
    first_at_end = config["final_sigmas_type"] == "zero" or config["euler_at_final"]
    rows = []
    for i, (t, source, target) in enumerate(zip(timesteps, levels, [*levels[1:], last], strict=True)):
        h = target.lambda_ - source.lambda_
        data = target.alpha  # first order: that of DDIM
        previous: list[float] = []
        order = _order(spec, i, first_at_end=first_at_end)
        if order > 1:
            rate = 2 * h if stochastic else h
            curve = target.alpha * (math.expm1(-rate) / rate + 1)
            if order == 2 and config["solver_type"] == "midpoint":
                curve = target.alpha * -math.expm1(-rate) / 2
            half = 0.5 if stochastic else -0.5  # as in diffusers
            bend = target.alpha * ((math.expm1(-rate) + rate) / rate**2 + half)
            previous = _differences(h, source, levels[i - order + 1 : i][::-1], curve, bend)
            data -= sum(previous)
        decay = math.exp(-h) if stochastic else 1.0
        fresh = target.sigma * math.sqrt(1 - decay**2)
        rows.append(Step(float(t), source.alpha, source.sigma, data, target.sigma * decay, tuple(previous), fresh))
    order_name = "3m" if config["solver_order"] == 3 else "2m"
    return schedule_of(f"dpm++{order_name}{'_sde' if stochastic else ''}", spec, rows)


def _differences(h: float, source: Level, before: Sequence[Level], curve: float, bend: float) -> list[float]:
    """The coefficients of earlier x̂_0 in `curve`·D1 − `bend`·D2, which together with that of x̂_0 itself are 0.

    D1 and D2 are h times the first and h²/2 times the second derivative in λ, by divided differences over two levels or
    three.
    """
    r0 = (source.lambda_ - before[0].lambda_) / h
    if len(before) == 1:
        return [-curve / r0]
    r1 = (before[0].lambda_ - before[1].lambda_) / h
    share = r0 / (r0 + r1)
    newer = curve * (1 + share) - bend / (r0 + r1)  # of (x̂_0(i) − x̂_0(i−1))/r0
    older = -curve * share + bend / (r0 + r1)  # of (x̂_0(i−1) − x̂_0(i−2))/r1
    return [older / r1 - newer / r0, -older / r1]


def deis(spec: ScheduleSpec) -> Schedule:
    """DEIS (Zhang and Chen 2023) up to order 3: ε as a polynomial in log ρ, integrated over ρ = σ/α."""
    curved = any(spec.config.get(name) for name in CURVES) or spec.config["use_flow_sigmas"]
    levels, timesteps, last = _levels(spec)
    if curved:
        last = levels[-1]
    rows = []
    for i, (t, source, target) in enumerate(zip(timesteps, levels, [*levels[1:], last], strict=True)):
        order = _order(spec, i, first_at_end=False)
        nodes = [one.sigma / one.alpha for one in levels[i - order + 1 : i + 1]][::-1]
        weights = [target.alpha * one for one in _log_integrals(nodes, target.sigma / target.alpha)]
        noise = target.alpha * nodes[0] + weights[0]
        previous = tuple(weights[1:])
        rows.append(Step(float(t), source.alpha, source.sigma, target.alpha, noise, previous, kept=EPSILON))
    return schedule_of("deis", spec, rows)


def _log_integrals(nodes: Sequence[float], end: float) -> list[float]:
    """∫ L_j(log ρ) dρ from nodes[0] to `end` for the Lagrange polynomials L_j over the logarithms of the nodes."""
    logs = [math.log(node) for node in nodes]

    def moment(power: int, rho: float) -> float:  # of (log ρ)^power, indefinite
        log = math.log(rho)
        return rho * (1.0, log - 1, log**2 - 2 * log + 2)[power]

    moments = [moment(power, end) - moment(power, nodes[0]) for power in range(len(nodes))]
    weights = []
    for j, log in enumerate(logs):
        others = [one for m, one in enumerate(logs) if m != j]
        polynomial = np.atleast_1d(np.poly(others))[::-1] if others else np.ones(1)
        scale = math.prod(log - one for one in others)
        weights.append(float(sum(a * b for a, b in zip(polynomial, moments, strict=True))) / scale)
    return weights


def unipc(spec: ScheduleSpec) -> Schedule:
    """UniPC (Zhao et al. 2023) with B(h) = h (bh1) or e^h − 1 (bh2), in x̂_0.

    The corrector at a step reads the evaluation there, which the predictor of the next step needs anyway. The corrected
    state is the evaluated one plus a combination of x̂_0 there and before, so that both are one row.
    """
    config, n, first = spec.config, spec.steps, spec.first
    flow = np.linspace(1, 1 / spec.training, n + 1)[:-1]
    levels, timesteps, last = _levels(spec, flow)
    if config["use_flow_sigmas"]:
        sigmas = [float(np.float32(one.sigma - 1e-6 * (abs(one.sigma - 1) < 1e-6))) for one in levels]
        timesteps, levels = np.floor(np.array(sigmas) * spec.training), [Level.of_flow(one) for one in sigmas]
    if config["final_sigmas_type"] == "sigma_min" and (
        config["use_flow_sigmas"] or any(config.get(name) for name in CURVES)
    ):
        last = levels[-1]
    if not config["lower_order_final"] and config["solver_order"] > 1 and not last.sigma:
        raise ParameterError(
            "scheduler", "the scheduler config says lower_order_final=False: its last step to σ = 0 is not finite"
        )
    rows, correction = [], [0.0]
    for i, (t, source, target) in enumerate(zip(timesteps, levels, [*levels[1:], last], strict=True)):
        order = min(int(config["solver_order"]), max(i - first, 0) + 1)
        if config["lower_order_final"]:
            order = min(order, n - i)
        nodes = levels[i - order + 1 : i + 1][::-1]
        predicted, corrected = _unipc_weights(nodes, target, bh1=config["solver_type"] == "bh1")
        keep = target.sigma / source.sigma
        weights = np.zeros(max(len(predicted), len(correction)))
        weights[: len(predicted)] += predicted
        weights[: len(correction)] += keep * np.array(correction)
        data, *previous = weights.tolist()
        data += keep * source.alpha
        rows.append(Step(float(t), source.alpha, source.sigma, data, target.sigma, tuple(previous)))
        correction = [0.0] if i in config["disable_corrector"] or i < first else corrected
    return schedule_of("unipc", spec, rows)


def _unipc_weights(nodes: Sequence[Level], target: Level, *, bh1: bool) -> tuple[list[float], list[float]]:
    """What the predictor adds to (σ'/σ)·x of x̂_0 at the nodes, newest first, and what the corrector adds to its result.

    The second begins with x̂_0 at the target.
    """
    order, h = len(nodes), target.lambda_ - nodes[0].lambda_
    grow = -target.alpha * math.expm1(-h)
    if math.isinf(h) or not h:
        return [grow] + [0.0] * (order - 1), [0.0]
    ratios = np.array([*((node.lambda_ - nodes[0].lambda_) / h for node in nodes[1:]), 1.0])
    scale = target.alpha * (-h if bh1 else math.expm1(-h))
    values, factorial, phi = [], 1, math.expm1(-h) / -h - 1
    for k in range(1, order + 1):
        values.append(phi * factorial * target.alpha / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = ratios ** np.arange(order)[:, None]
    ahead = np.full(order - 1, 0.5) if order <= 2 else np.linalg.solve(powers[:-1, :-1], values[:-1])
    behind = np.array([0.5]) if order == 1 else np.linalg.solve(powers, values)
    ahead, back, now = -scale * ahead / ratios[:-1], -scale * behind[:-1] / ratios[:-1], -scale * float(behind[-1])
    predicted = [grow - float(ahead.sum()), *ahead.tolist()]
    change = back - ahead
    return predicted, [now, -now - float(change.sum()), *change.tolist()]


def lms(spec: ScheduleSpec) -> Schedule:
    """Linear multistep of order 4 (Adams and Bashforth): ε as a polynomial in σ, integrated. States as with Euler."""
    sigmas, timesteps = curved_sigmas(spec)
    rows = []
    for i, (t, source, target) in enumerate(zip(timesteps, sigmas, [*sigmas[1:], 0.0], strict=True)):
        scale = 1 / math.sqrt(1 + target**2)
        nodes = sigmas[max(0, i - 3) : i + 1][::-1]
        weights = []
        for j, node in enumerate(nodes[: i - min(i, spec.first) + 1]):  # diffusers leaves terms out that it has not
            others = np.delete(nodes, j)
            integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(node - others))
            weights.append(scale * float(np.polyval(integral, target) - np.polyval(integral, source)))
        level, noise = Level.of(float(source)), scale * float(source) + weights[0]
        rows.append(Step(float(t), level.alpha, level.sigma, scale, noise, tuple(weights[1:]), kept=EPSILON))
    return schedule_of("lms", spec, rows, euler_start(spec, sigmas))


def pndm(spec: ScheduleSpec) -> Schedule:
    """PNDM without its Runge-Kutta start (Liu et al. 2022, PLMS): Adams and Bashforth on the model's outputs.

    The second timestep is evaluated twice, so that N steps are N + 1 rows: the row at its first evaluation goes back
    to the first state, which is linear in the state there and the first output, and steps anew with the mean of both.
    """
    alphas, stride = spec.alphas_cumprod, spec.training // spec.steps
    final = 1.0 if spec.config["set_alpha_to_one"] else float(alphas[0])
    velocity = spec.config["prediction_type"] == "v_prediction"
    timesteps = [int(t) for t in spec.timesteps().round()]
    timesteps = [*timesteps[:2], *timesteps[1:]]

    def transfer(t: int, following: int) -> tuple[float, float]:
        """What eq. 11 there takes of the state and of the output."""
        source, target = float(alphas[t]), float(alphas[following]) if following >= 0 else final
        root = source * math.sqrt(1 - target) + math.sqrt(source * (1 - source) * target)
        state, noise = math.sqrt(target / source), (source - target) / root
        return (state + noise * math.sqrt(1 - source), noise * math.sqrt(source)) if velocity else (state, noise)

    mixes = [(1.0,), (0.5, 0.5), (3 / 2, 0.0, -1 / 2), (23 / 12, -16 / 12, 0.0, 5 / 12)]  # the second evaluation
    mixes += [(55 / 24, -59 / 24, 37 / 24, 0.0, -9 / 24), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]  # is used once only
    rows = []
    for i, t in enumerate(timesteps):
        turn = max(0, i - spec.first)
        alpha, sigma = math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])
        kept = (-sigma, alpha) if velocity else EPSILON
        state, output = transfer(t + stride, t) if turn == 1 else transfer(t, t - stride)
        weights = [output * one for one in mixes[min(turn, 5)]]
        if turn == 1:
            before_state, before_output = transfer(timesteps[i - 1], timesteps[i - 1] - stride)
            state /= before_state
            weights[1] -= state * before_output
        data, noise = (state * a + weights[0] * b for a, b in zip((alpha, sigma), kept, strict=True))
        rows.append(Step(float(t), alpha, sigma, data, noise, tuple(weights[1:]), kept=kept))
    return schedule_of("pndm", spec, rows)
