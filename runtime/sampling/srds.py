"""SRDS, parareal sampling (Selvam et al., NeurIPS 2024): plain and pipelined."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

from engines.errors import ParameterError
from runtime.sampling.operations import (
    STATE,
    Combine,
    Distance,
    Evaluation,
    Operations,
    Options,
    Predict,
    combination,
    fresh,
)
from runtime.sampling.schedule import Linear, Schedule, unit, weighted_sum
from runtime.sampling.sequential import sequential

_Sweep = Iterator[Predict | Combine | Distance]


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
    for operation in _sweep(schedule, options.pipelined, tuple(ends), iterations, bool(options.tolerance)):
        if isinstance(operation, Distance):
            (change,) = yield operation
            if change <= options.tolerance:
                yield _result(schedule.steps)
                return (change,)
        else:
            yield operation
    yield _result(schedule.steps)
    return ()


@lru_cache(maxsize=16)
def _sweep(
    schedule: Schedule, pipelined: bool, ends: tuple[int, ...], iterations: int, asking: bool
) -> tuple[Predict | Combine | Distance, ...]:
    """All operations of a setting, made before the first round: only where it stops depends on answers."""
    return tuple((_srds_pipelined if pipelined else _srds_plain)(schedule, (0, *ends), iterations, asking))


@lru_cache(maxsize=64)
def _result(steps: int) -> Combine:
    """The last operation: the guess is the result."""
    return combination({STATE: unit(STATE)}, steps)


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


def _srds_plain(schedule: Schedule, ends: Sequence[int], iterations: int, asking: bool) -> _Sweep:
    """One coarse sweep, then per iteration M rounds of all blocks at once and a coarse sweep: B + p(M + B) rounds."""
    blocks = len(ends) - 1
    end = _block_ends(blocks)
    yield combination({end[0]: unit(STATE)}, 0)
    for p in range(iterations + 1):
        for m in range(ends[p] - ends[p - 1] if p else 0):  # no block is longer than the first of them
            active = [b for b in range(p, blocks + 1) if ends[b - 1] + m < ends[b]]
            states = {b: f"fine {b}" if m else end[b - 1] for b in active}
            yield Predict(tuple(Evaluation(states[b], ends[b - 1] + m, f"output {b}") for b in active))
            fine = {f"fine {b}": _fine(schedule, ends[b - 1] + m, states[b], f"output {b}") for b in active}
            yield combination(fine, ends[p - 1])
        for b in range(1, blocks + 1):
            yield Predict((Evaluation(end[b - 1], ends[b - 1], "output"),))
            skip = _skip(schedule, ends[b - 1], ends[b], end[b - 1], "output")
            made = {f"coarse {b}": skip}
            if b == blocks:
                made["before"] = unit(end[b])
            if b >= p:
                made[end[b]] = _corrected(b, unit(f"fine {b}"), skip, p)
            yield combination(made, ends[p] if b == blocks else 0)
        if asking and 0 < p < iterations:
            yield Distance(((end[blocks], "before"),))


def _srds_pipelined(schedule: Schedule, ends: Sequence[int], iterations: int, asking: bool) -> _Sweep:
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
        evaluations: dict[Evaluation, int] = {}  # with the iteration that it belongs to
        made: dict[str, Linear] = {}
        finished = 0
        for b in range(1, min(number, blocks) + 1):
            done, m = divmod(number - b, size - 1)  # iterations behind this block, fine steps taken in the next one
            start, length, fine = ends[b - 1], ends[b] - ends[b - 1], f"fine {b}"
            solved = unit(fine)
            if m == 0 and 0 < done <= min(iterations, b) and length == size:
                evaluations[Evaluation(fine, ends[b] - 1, f"last {b}")] = done
                solved = _fine(schedule, ends[b] - 1, fine, f"last {b}")
            if m == 0 and done <= iterations and b == blocks:
                made["before"], finished = unit(end[b]), ends[done]
            if m == 0 and done <= iterations and done < b:
                evaluations[Evaluation(end[b - 1], start, f"first {b}")] = done + 1
                skip = _skip(schedule, start, ends[b], end[b - 1], f"first {b}")
                made[f"coarse {b}"], made[end[b]] = skip, _corrected(b, solved, skip, done)
                if done < iterations:
                    made[fine] = _fine(schedule, start, end[b - 1], f"first {b}")
            elif m == 0 and done == b <= iterations:
                made[end[b]] = solved
            elif m < length and done < min(iterations, b):
                evaluations[Evaluation(fine, start + m, f"next {b}")] = done + 1
                made[fine] = _fine(schedule, start + m, fine, f"next {b}")
            if fine in made and done + 1 == b and m + 1 == length < size:
                made[end[b]] = made[fine]  # a short last block is done before its turn
        yield Predict(
            tuple(sorted(evaluations, key=lambda evaluation: evaluations[evaluation]))
        )  # earlier iterations are nearer to the end
        if asked:
            yield Distance(((end[blocks], "before"),))
        yield combination(made, finished)
        asked = asking and finished > 0


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
        x = schedule.step(n, estimate, (), fresh(n))
    return x


def _fine(schedule: Schedule, n: int, slot: str, output: str) -> Linear:
    """One step of F."""
    return schedule.step(n, schedule.estimate(n, unit(output), unit(slot), unit(slot)), (), fresh(n))


def _corrected(b: int, solved: Linear, skip: Linear, iteration: int) -> Linear:
    """x_b of an iteration: G in the first sweep, F where its left end is exact (y + G − G would round), else both."""
    if not iteration:
        return skip
    if b <= iteration:
        return solved
    return weighted_sum((1.0, solved), (1.0, skip), (-1.0, unit(f"coarse {b}")))
