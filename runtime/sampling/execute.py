"""Plays a program on a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engines.base import Array, Backend
from runtime.sampling.noise import step_noise, uniforms
from runtime.sampling.operations import STATE, Options
from runtime.sampling.place import Play, on_all_lanes
from runtime.sampling.program import GuidedCombine, GuidedProducts, Program, Round, program
from runtime.sampling.samplers import measures
from runtime.sampling.schedule import Schedule
from runtime.sampling.timeline import SHORTEST, Timeline


@dataclass
class Counts:
    """What an image cost, and how far from the refined states the drafts were that a sampler accepted by measuring.

    `accepted` are relative distances; those of `speculative` are ‖Δ‖, in units of a step's noise.
    """

    rounds: int = 0
    evaluations: int = 0
    calls: int = 0
    accepted: tuple[float, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        """Two images, one after the other."""
        return Counts(
            self.rounds + other.rounds,
            self.evaluations + other.evaluations,
            self.calls + other.calls,
            self.accepted + other.accepted,
        )


def execute(
    playing: Program, backend: Backend, finished: Callable[[int], None], play: Play | None = None,
    timeline: Timeline | None = None,
) -> Counts:  # fmt: skip
    """Plays a program; `finished(steps)` is called when more steps are done. A timeline notes what took how long.

    `play` runs rounds, on all lanes of the backend by default.
    """
    play, combine, distances = play or on_all_lanes(backend), backend.combine, backend.distances
    products = backend.inner_products
    if timeline is not None:
        play, combine = timeline.rounds(play), timeline.timed("combine", combine)
        distances, finished = timeline.timed("distances", distances), timeline.timed("callback", finished, SHORTEST)
        products = timeline.timed("inner products", products)
    counts, done = Counts(), 0
    answer: Sequence[float] = ()
    try:
        operation = next(playing)
        while True:
            answer = ()
            if isinstance(operation, Round):
                calls = play(operation.branches)
                counts.rounds += 1
                counts.evaluations += operation.evaluations
                counts.calls += sum(map(bool, calls))
            elif isinstance(operation, GuidedCombine):
                combine(operation.sources, operation.rows, operation.targets)
                if operation.finished > done:
                    done = operation.finished
                    finished(done)
            elif isinstance(operation, GuidedProducts):
                answer = products(operation.products)
            else:
                answer = distances(operation.pairs)
            operation = playing.send(answer)
    except StopIteration as end:
        counts.accepted = end.value
    return counts


def denoise(
    backend: Backend,
    state: Array,
    conditioning: Sequence[Mapping[str, Array]],
    schedule: Schedule,
    mode: str,
    options: Options,
    guidance_scale: float,
    seed: int,
    finished: Callable[[int], None],
    *,
    play: Play | None = None,
    timeline: Timeline | None = None,
) -> tuple[Array, Counts]:
    """The finished latents of all images, (images, …) like the states before their first step, and what they cost.

    `play`, `finished`, `timeline`: see `execute`.
    Samplers that decide by what they measure make one image at a time, so that none depends on its neighbours.
    """
    batch = 1 if measures(mode, options) else len(state)
    counts, parts = Counts(), []
    for start in range(0, len(state), batch):
        rows = slice(start, start + batch)
        own = [{name: value[rows] for name, value in branch.items()} for branch in conditioning]
        backend.bind(state[rows].shape, schedule.timesteps, own)
        backend.write(STATE, state[rows])
        for slot, value in step_noise(schedule, options, seed, range(start, start + batch), state.shape[1:]):
            backend.write(slot, value)
        drawn = uniforms(seed, start, schedule.steps) if mode == "speculative" else ()
        playing = program(mode, schedule, options, guidance_scale, drawn)
        counts += execute(playing, backend, finished, play, timeline)
        parts.append(backend.read(STATE))
    return np.concatenate(parts), counts
