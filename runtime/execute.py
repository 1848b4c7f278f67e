"""The loop: take an operation from the sampler, run it on the backend, until the latent is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engines.base import Backend, Half
from runtime.place import place
from runtime.samplers import Combine, Job, Operation, Predict


@dataclass
class Counts:
    """What an image cost."""

    rounds: int = 0
    evaluations: int = 0
    calls: int = 0


def execute(
    operations: Iterable[Operation], backend: Backend, guidance_scale: float, finished: Callable[[int], None]
) -> Counts:
    """Plays the operations. A guidance scale of at most 1 means one half per evaluation, as in diffusers.

    Guidance, ε = (1 − g)·ε_unconditional + g·ε_conditional, is never computed by itself: it is multiplied into the
    coefficients of the combinations that read ε. `finished(steps)` is called when more steps are done.
    """
    counts, done = Counts(), 0
    weights = {0: 1 - guidance_scale, 1: guidance_scale} if guidance_scale > 1 else {1: 1.0}
    predicted: set[str] = set()
    for operation in operations:
        if isinstance(operation, Predict):
            halves = [_half(job, conditioning) for job in operation.jobs for conditioning in weights]
            calls = place(halves, backend.lanes)
            backend.predict(calls)
            predicted.update(job.output for job in operation.jobs)
            counts.rounds += 1
            counts.evaluations += len(operation.jobs)
            counts.calls += sum(1 for call in calls if call)
        else:
            backend.combine(*_guided(operation, predicted, weights))
            if operation.finished > done:
                done = operation.finished
                finished(done)
    return counts


def _half(job: Job, conditioning: int) -> Half:
    return Half(job.latent, job.step, f"{job.output}/{conditioning}", conditioning)


def _guided(
    operation: Combine, predicted: set[str], weights: dict[int, float]
) -> tuple[list[str], list[list[float]], tuple[str, ...]]:
    """A combination over halves in place of evaluations."""
    columns: list[tuple[str, int, float]] = []  # slot, column of the operation, factor
    for column, slot in enumerate(operation.sources):
        if slot in predicted:
            columns += [(f"{slot}/{conditioning}", column, weight) for conditioning, weight in weights.items()]
        else:
            columns.append((slot, column, 1.0))
    rows = [[row[column] * factor for _, column, factor in columns] for row in operation.rows]
    return [slot for slot, _, _ in columns], rows, operation.targets
