"""Samplers: generators of operations on named slots. They know no arrays, no devices and no guidance.

A sampler yields `Predict`, `Combine` and `Distance` operations; the answer to a `Distance` is sent back into it. The
initial noise is in slot `STATE` when it starts and the finished latent when it ends; slot `fresh(i)` holds the noise
that a stochastic step i adds. What it returns are the distances of the drafts that it accepted by measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

from engines.errors import ParameterError
from runtime.schedule import Estimate, Linear, Schedule, unit, weighted_sum

STATE = "x"
_DATA = "data"  # x̂_0 of the step before, for multistep schedulers
_ANCHOR = "anchor"  # x̂_0 at the anchor of the block before, for drafts that extrapolate


@dataclass(frozen=True)
class Job:
    """One evaluation: the model's output for the latent in a slot at a step, written to another slot."""

    latent: str
    step: int
    output: str


@dataclass(frozen=True)
class Predict:
    """A round: jobs that run at the same time."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Combine:
    """targets[m] = Σ_j rows[m][j] · sources[j]. `finished` steps are done after it, with their state in STATE.

    While `srds` runs, STATE is its latest guess at the finished latent, of which `finished` steps are exact.
    """

    sources: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    targets: tuple[str, ...]
    finished: int


@dataclass(frozen=True)
class Distance:
    """Asks for ‖a − b‖ / ‖b‖ of pairs of slots: the only operation that the host waits for."""

    pairs: tuple[tuple[str, str], ...]


Operation = Predict | Combine | Distance
Operations = Generator[Operation, Sequence[float], tuple[float, ...]]


@dataclass(frozen=True)
class Options:
    """What a user can choose beside the sampler; every sampler reads its own.

    k: drafts per round. drafts: a key of `DRAFTS`. tolerance: largest relative change that `adaptive` accepts in a
    draft, or that `srds` stops at; 0 is exact. blocks: B of `srds`, ⌈√N⌉ or fewer by default. pipelined: whether `srds`
    starts a block as soon as its left end is known. iterations: where `srds` stops in any case. first_blocks: drafts in
    each of the first blocks of `conservative` and `aggressive`, where they shall differ from k.
    """

    k: int = 1
    drafts: str = "frozen"
    tolerance: float = 0.0
    blocks: int | None = None
    pipelined: bool = True
    iterations: int | None = None
    first_blocks: tuple[int, ...] = ()

    def ahead(self, block: int) -> int:
        """Drafts in a block, unless the steps end before."""
        return self.first_blocks[block] if block < len(self.first_blocks) else self.k


Sampler = Callable[[Schedule, Options], Operations]


def check(mode: str, schedule: Schedule, options: Options) -> None:
    """ParameterError for a sampler that cannot play a schedule with these options."""
    for name, low in (("k", 1), ("blocks", 1), ("iterations", 1), ("tolerance", 0)):
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
    if mode == "adaptive" and DRAFTS[options.drafts].extrapolates:
        raise ParameterError("drafts", "adaptive has no anchors to extrapolate from: use frozen or corrected drafts")
    if mode != "sequential" and not schedule.draftable:
        raise ParameterError("mode", f"{schedule.name} takes steps that are too long to draft: use mode sequential")
    if mode == "srds":
        if schedule.multistep:
            raise ParameterError(
                "mode", f"srds cannot run {schedule.name}: a multistep solver loses its history at the ends of blocks"
            )
        srds_blocks(schedule.steps, options.blocks)


def measures(mode: str, options: Options) -> bool:
    """Whether a sampler decides by what it measures, so that each image must be made by itself."""
    return mode == "adaptive" or (mode == "srds" and options.tolerance > 0)


def fresh(step: int) -> str:
    """The slot of the noise that a step adds, drawn before the image starts."""
    return f"fresh {step}"


def noise_slots(step: int, steps: int, options: Options) -> list[tuple[str, int]]:
    """The slots of noise that a stochastic step may read, each with the number that the noise is drawn for."""
    own = [(_own(step), steps + step + 1)] if DRAFTS[options.drafts].own_noise else []
    return [(fresh(step), step + 1), *own]


def _own(step: int) -> str:
    """The slot of a draft's own noise."""
    return f"own {step}"


def combination(expressions: Mapping[str, Linear], finished: int) -> Combine:
    """One operation that writes each expression into its slot."""
    sources = tuple(dict.fromkeys(slot for expression in expressions.values() for slot in expression))
    rows = tuple(tuple(e.get(slot, 0.0) for slot in sources) for e in expressions.values())
    return Combine(sources, rows, tuple(expressions), finished)


# --- sequential --------------------------------------------------------------------------------------------------


def sequential(schedule: Schedule, options: Options) -> Operations:
    """One evaluation per round: what every other sampler is compared with."""
    x = unit(STATE)
    for i in range(schedule.steps):
        yield Predict((Job(STATE, i, "output"),))
        estimate = schedule.estimate(i, unit("output"), x, x)
        following = {STATE: schedule.step(i, estimate, unit(_DATA), fresh(i))}
        yield combination(following | _history(schedule, i + 1, estimate.data), i + 1)
    return ()


# --- DRiffusion --------------------------------------------------------------------------------------------------


def conservative(schedule: Schedule, options: Options) -> Operations:
    """DRiffusion, conservative (supplement, Algorithm 2): a lone evaluation, then k drafts made with it.

    2⌈N/(k+1)⌉ − [N mod (k+1) = 1] rounds.
    """
    i, block, x, drafts, before = 0, 0, unit(STATE), DRAFTS[options.drafts], None
    while i < schedule.steps:
        ahead, block = min(options.ahead(block), schedule.steps - 1 - i), block + 1
        window = _Window("", ahead)
        yield Predict((Job(STATE, i, window.output(0)),))
        estimate = schedule.estimate(i, unit(window.output(0)), x, x)
        if ahead:
            anchor = _Anchor(i, x, estimate, estimate.data, before)
            yield combination(window.drafts(schedule, options, anchor, unit(_DATA)), i)
            yield window.predict(i)
        seen = [(x, window.output(0)), *window.seen()]
        end, data = _refine(schedule, drafts, i, x, unit(_DATA), seen)
        before, i = i, i + ahead + 1
        kept = _history(schedule, i, data) | ({_ANCHOR: estimate.data} if drafts.extrapolates else {})
        yield combination({STATE: end} | kept, i)
    return ()


def aggressive(schedule: Schedule, options: Options) -> Operations:
    """DRiffusion, aggressive (Algorithm 1): each round's last draft also serves as the next round's evaluation.

    1 + ⌈(N−1)/k⌉ rounds. The refine of a round and the drafts of the next are one combination.
    """
    i, block, last, drafts, before = 0, 0, schedule.steps - 1, DRAFTS[options.drafts], None
    window = _Window("b", 0)
    yield Predict((Job(STATE, 0, window.output(0)),))
    at, output = unit(STATE), window.output(0)  # the state at which the anchor was evaluated, and what came of it
    x, data = unit(STATE), unit(_DATA)
    while i < last:
        ahead, block = min(options.ahead(block), last - i), block + 1
        window = _Window("a" if window.name == "b" else "b", ahead)  # the anchor's slots are still read
        estimate = schedule.estimate(i, unit(output), at, x, drafts.variance)
        anchor = _Anchor(i, x, estimate, schedule.estimate(i, unit(output), at, at).data, before)
        made = window.drafts(schedule, options, anchor, data)
        kept = ({STATE: x} if i else {}) | _history(schedule, i, data if i else {})
        kept |= {_ANCHOR: anchor.seen} if drafts.extrapolates else {}
        yield combination(kept | made, i)
        yield window.predict(i)
        seen = [(at if i else unit(STATE), output), *window.seen()]
        x, data = _refine(schedule, drafts, i, unit(STATE), unit(_DATA), seen[:-1])
        at, output = seen[-1]
        before, i = i, i + ahead
    estimate = schedule.estimate(last, unit(output), at, x, drafts.variance)
    yield combination({STATE: schedule.step(last, estimate, data, fresh(last))}, schedule.steps)
    return ()


@dataclass(frozen=True)
class Drafts:
    """How states ahead are guessed, and how what the model says there is handed to the refined states.

    The guess of x̂_0 stays at the anchor's; with `extrapolates` it moves on along log σ by what it changed since the
    anchor of the block before, less so for blocks that are long beside the schedule. `variance` splits the difference
    between draft and refined state as `Schedule.estimate` says. `own_noise` draws noise for the drafts of stochastic
    schedulers anew.
    """

    extrapolates: bool = False
    variance: float | None = None
    own_noise: bool = False


# How far pictures of one kind lie around their common mean, in units of the latents' variance. Of 0, 0.015, 0.04, 0.1,
# 0.25, 0.5 and 1 this was the best on `shapes`; on mixtures of Gaussians the best is the variance of one of them.
LOCAL_VARIANCE = 0.015
DRAFTS = {
    "frozen": Drafts(),  # the paper's
    "fresh": Drafts(own_noise=True),  # the paper's listing for stochastic schedulers, to the letter
    "extrapolated": Drafts(extrapolates=True),
    "corrected": Drafts(variance=LOCAL_VARIANCE),
    "extrapolated+corrected": Drafts(extrapolates=True, variance=LOCAL_VARIANCE),
}


def resolve(drafts: str) -> str:
    """The kind of drafts that `auto` stands for; any other name itself."""
    return drafts if drafts != "auto" else "corrected"


@dataclass(frozen=True)
class _Anchor:
    """What drafts start from: step i, its state and estimate, x̂_0 at the state the model saw, and the anchor before."""

    i: int
    x: Linear
    estimate: Estimate
    seen: Linear
    before: int | None = None

    def guess(self, schedule: Schedule, drafts: Drafts, n: int, k: int) -> Linear:
        """x̂_0 at step n > i."""
        if not drafts.extrapolates or self.before is None:
            return self.estimate.data
        weight = min(1.0, max(0.0, 1.25 * (1 - k / (0.1 * schedule.steps))))
        before, here, there = (_log_sigma(schedule, i) for i in (self.before, self.i, n))
        ahead = weight * (there - here) / (here - before)
        return weighted_sum((1.0, self.estimate.data), (ahead, self.seen), (-ahead, unit(_ANCHOR)))


def _log_sigma(schedule: Schedule, i: int) -> float:
    """ln(σ/α), infinite where the state is pure noise."""
    row = schedule.rows[i]
    return math.log(row.sigma / row.alpha) if row.alpha else math.inf


@dataclass(frozen=True)
class _Window:
    """The slots of one round's drafts and their outputs; two names take turns where a round reads the last one's."""

    name: str
    ahead: int

    def draft(self, n: int) -> str:
        return f"draft {self.name}{n}"

    def output(self, n: int) -> str:
        return f"output {self.name}{n}"

    def drafts(self, schedule: Schedule, options: Options, anchor: _Anchor, data: Linear) -> dict[str, Linear]:
        """The states at steps i+1 … i+ahead: the sampler run on with a guess in place of the model.

        With x̂_0 frozen and no noise this composes to the paper's skip transition (eq. 14) for every scheduler.
        """
        drafts = DRAFTS[options.drafts]
        made: dict[str, Linear] = {}
        estimate, x = anchor.estimate, anchor.x
        for n in range(anchor.i, anchor.i + self.ahead):
            if n > anchor.i:
                estimate = schedule.assumed(n, anchor.guess(schedule, drafts, n, options.k), x)
            x = schedule.step(n, estimate, data, _own(n) if drafts.own_noise else fresh(n))
            data = estimate.data
            made[self.draft(n - anchor.i + 1)] = x
        return made

    def predict(self, i: int) -> Predict:
        """The round that evaluates the drafts of a block that starts at i."""
        return Predict(tuple(Job(self.draft(n), i + n, self.output(n)) for n in range(1, self.ahead + 1)))

    def seen(self) -> list[tuple[Linear, str]]:
        """The state and the output of every draft."""
        return [(unit(self.draft(n)), self.output(n)) for n in range(1, self.ahead + 1)]


def _refine(
    schedule: Schedule, drafts: Drafts, start: int, x: Linear, data: Linear, seen: Sequence[tuple[Linear, str]]
) -> tuple[Linear, Linear]:
    """The state after the steps from `start` on, by the scheduler's own rule, and x̂_0 of the last of them.

    `seen` holds, per step, the state that the model was evaluated at and the slot of its output.
    """
    for n, (at, output) in enumerate(seen, start):
        estimate = schedule.estimate(n, unit(output), at, x, drafts.variance)
        x = schedule.step(n, estimate, data, fresh(n))
        data = estimate.data
    return x, data


def _history(schedule: Schedule, i: int, data: Linear) -> dict[str, Linear]:
    """x̂_0 of step i − 1 into its slot, if step i reads it."""
    return {_DATA: data} if data and i < schedule.steps and schedule.rows[i].previous else {}


# --- adaptive ----------------------------------------------------------------------------------------------------


def adaptive(schedule: Schedule, options: Options) -> Operations:
    """Accepts the drafts of a round up to the first that is further than `tolerance` from the refined state.

    A round evaluates the state itself and k − 1 drafts, so that it always makes at least one exact step: never more
    rounds than `sequential`, and with tolerance 0 the same steps. This is ParaDiGMS's sliding window (Shih et al. 2023)
    with DRiffusion's drafts; the rejected evaluation that follows the last accepted one makes the next drafts.
    """
    i, known, accepted = 0, 0, []  # `known` drafts are ready at i + 1 … i + known
    drafts = DRAFTS[options.drafts]
    while i < schedule.steps:
        width = min(known + 1, schedule.steps - i)
        window = _Window("", width - 1)
        yield Predict((Job(STATE, i, window.output(0)), *window.predict(i).jobs))
        seen = [(unit(STATE), window.output(0)), *window.seen()]
        refined: dict[str, Linear] = {}
        datas = [unit(_DATA)]
        x = unit(STATE)
        for n in range(width):
            x, data = _refine(schedule, drafts, i + n, x, datas[-1], seen[n : n + 1])
            datas.append(data)
            refined[f"refined {n + 1}"] = x
        taken = 1
        if width > 1:
            yield combination(refined, i)
            distances = yield Distance(tuple((f"refined {n}", window.draft(n)) for n in range(1, width)))
            while taken < width and distances[taken - 1] <= options.tolerance:
                taken += 1
            accepted += list(distances[: taken - 1])
            x = unit(f"refined {taken}")
        i += taken
        data = datas[taken]
        made: dict[str, Linear] = {STATE: x} | _history(schedule, i, data)
        known = min(options.k, schedule.steps - i) - 1
        if known > 0:
            ahead = _Window("", known)
            if taken < width:
                at, output = seen[taken]
                estimate = schedule.estimate(i, unit(output), at, x, drafts.variance)
            else:
                estimate = schedule.assumed(i, data, x)
            made |= ahead.drafts(schedule, options, _Anchor(i, x, estimate, estimate.data), data)
        yield combination(made, i)
    return tuple(accepted)


# --- SRDS --------------------------------------------------------------------------------------------------------


def srds(schedule: Schedule, options: Options) -> Operations:
    """SRDS (Selvam et al. 2024): blocks solved in parallel, their ends corrected by one coarse step each, again.

    F solves a block step by step, G skips it with one evaluation: x^p_b = F(x^{p−1}_{b−1}) + G(x^p_{b−1}) −
    G(x^{p−1}_{b−1}). After p iterations the first p blocks are the sequential solution, to the bit. With a tolerance it
    stops when an iteration changes the final state by no more than that, relatively.
    """
    ends = srds_blocks(schedule.steps, options.blocks)
    iterations = min(options.iterations or len(ends), len(ends))
    if max(b - a for a, b in zip([0, *ends], ends, strict=False)) == 1:
        return (yield from sequential(schedule, options))
    sweep = _srds_pipelined if options.pipelined else _srds_plain
    accepted = yield from sweep(schedule, [0, *ends], iterations, options.tolerance)
    yield combination({STATE: unit(STATE)}, schedule.steps)  # the guess is the result
    return accepted


def srds_blocks(steps: int, blocks: int | None) -> list[int]:
    """Where the blocks of SRDS end: B blocks of ⌈N/B⌉ steps, the last one shorter; by default B is near √N."""
    size = math.ceil(steps / (blocks or round(math.sqrt(steps))))
    count = math.ceil(steps / size)
    if blocks is not None and count != blocks:
        fitting = sorted({math.ceil(steps / size) for size in range(1, steps + 1)})
        raise ParameterError(
            "blocks",
            f"{steps} steps cannot be cut into {blocks} blocks of equal length with a shorter last one: use one of "
            f"{', '.join(map(str, fitting))}",
        )
    return [min(size * (b + 1), steps) for b in range(count)]


def _srds_plain(schedule: Schedule, ends: Sequence[int], iterations: int, tolerance: float) -> Operations:
    """One coarse sweep, then per iteration M rounds of all blocks at once and a coarse sweep: B + p(M + B) rounds."""
    blocks = len(ends) - 1
    end = _block_ends(blocks)
    yield combination({end[0]: unit(STATE)}, 0)
    for p in range(iterations + 1):
        for m in range(ends[p] - ends[p - 1] if p else 0):  # no block is longer than the first of them
            active = [b for b in range(p, blocks + 1) if ends[b - 1] + m < ends[b]]
            states = {b: f"fine {b}" if m else end[b - 1] for b in active}
            yield Predict(tuple(Job(states[b], ends[b - 1] + m, f"output {b}") for b in active))
            fine = {f"fine {b}": _fine(schedule, ends[b - 1] + m, states[b], f"output {b}") for b in active}
            yield combination(fine, ends[p - 1])
        for b in range(1, blocks + 1):
            yield Predict((Job(end[b - 1], ends[b - 1], "output"),))
            skip = _skip(schedule, ends[b - 1], ends[b], end[b - 1], "output")
            made = {f"coarse {b}": skip}
            if b == blocks:
                made["before"] = unit(end[b])
            if b >= p:
                made[end[b]] = _corrected(b, unit(f"fine {b}"), skip, p)
            yield combination(made, ends[p] if b == blocks else 0)
        if tolerance and 0 < p < iterations:
            (change,) = yield Distance(((end[blocks], "before"),))
            if change <= tolerance:
                return (change,)
    return ()


def _srds_pipelined(schedule: Schedule, ends: Sequence[int], iterations: int, tolerance: float) -> Operations:
    """Every evaluation in the first round that it can run in: p·M + B − p rounds, N when run to the end.

    The first fine step of a block is also the evaluation that G needs there, so an iteration starts on a block one
    round before the last fine step of the iteration before, and each iteration corrects the one before as a by-product.
    The change of the final state is asked for when the next round has been started, so that lanes never wait for it.
    """
    blocks, size = len(ends) - 1, ends[1]
    end = _block_ends(blocks)
    yield combination({end[0]: unit(STATE)}, 0)
    asked = False
    for number in range(1, (ends[-1] if iterations == blocks else iterations * (size - 1) + blocks) + 1):
        jobs: dict[Job, int] = {}  # with the iteration that it belongs to
        made: dict[str, Linear] = {}
        finished = 0
        for b in range(1, min(number, blocks) + 1):
            done, m = divmod(number - b, size - 1)  # iterations behind this block, fine steps taken in the next one
            start, length, fine = ends[b - 1], ends[b] - ends[b - 1], f"fine {b}"
            solved = unit(fine)
            if m == 0 and 0 < done <= min(iterations, b) and length == size:
                jobs[Job(fine, ends[b] - 1, f"last {b}")] = done
                solved = _fine(schedule, ends[b] - 1, fine, f"last {b}")
            if m == 0 and done <= iterations and b == blocks:
                made["before"], finished = unit(end[b]), ends[done]
            if m == 0 and done <= iterations and done < b:
                jobs[Job(end[b - 1], start, f"first {b}")] = done + 1
                skip = _skip(schedule, start, ends[b], end[b - 1], f"first {b}")
                made[f"coarse {b}"], made[end[b]] = skip, _corrected(b, solved, skip, done)
                if done < iterations:
                    made[fine] = _fine(schedule, start, end[b - 1], f"first {b}")
            elif m == 0 and done == b <= iterations:
                made[end[b]] = solved
            elif m < length and done < min(iterations, b):
                jobs[Job(fine, start + m, f"next {b}")] = done + 1
                made[fine] = _fine(schedule, start + m, fine, f"next {b}")
            if fine in made and done + 1 == b and m + 1 == length < size:
                made[end[b]] = made[fine]  # a short last block is done before its turn
        yield Predict(tuple(sorted(jobs, key=lambda job: jobs[job])))  # earlier iterations are nearer to the end
        if asked:
            (change,) = yield Distance(((end[blocks], "before"),))
            if change <= tolerance:
                return (change,)
        yield combination(made, finished)
        asked = bool(tolerance) and finished > 0
    return ()


def _block_ends(blocks: int) -> list[str]:
    """The slots of the states at the ends of blocks; the last one is the latest guess at the finished latent."""
    return [*(f"end {b}" for b in range(blocks)), STATE]


def _skip(schedule: Schedule, start: int, end: int, slot: str, output: str) -> Linear:
    """G: from one evaluation at the start of a block to its end, x̂_0 frozen."""
    x = unit(slot)
    estimate = schedule.estimate(start, unit(output), x, x)
    data = estimate.data
    for n in range(start, end):
        estimate = schedule.assumed(n, data, x) if n > start else estimate
        x = schedule.step(n, estimate, {}, fresh(n))
    return x


def _fine(schedule: Schedule, n: int, slot: str, output: str) -> Linear:
    """One step of F."""
    return schedule.step(n, schedule.estimate(n, unit(output), unit(slot), unit(slot)), {}, fresh(n))


def _corrected(b: int, solved: Linear, skip: Linear, iteration: int) -> Linear:
    """x_b of an iteration: G in the first sweep, F where its left end is exact (y + G − G would round), else both."""
    if not iteration:
        return skip
    if b <= iteration:
        return solved
    return weighted_sum((1.0, solved), (1.0, skip), (-1.0, unit(f"coarse {b}")))


SAMPLERS: dict[str, Sampler] = {
    "sequential": sequential,
    "conservative": conservative,
    "aggressive": aggressive,
    "srds": srds,
    "adaptive": adaptive,
}
