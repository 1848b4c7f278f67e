"""The plans of all samplers on a virtual clock: any number of devices, several links, and the paper's own points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench import moves
from bench.gpu.engine import schedule as stable_diffusion
from bench.moves import Link
from bench.simulation.costs import LinkCosts
from engines.null import NullBackend
from runtime.auto import rehearse
from runtime.sampling.execute import Counts
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule

LINKS = (moves.NVLINK, moves.PCIE, moves.ETHERNET)
DEVICES = (1, 2, 3, 4, 6, 8, 12, 16)
MODES = ("sequential", "conservative", "aggressive", "srds", "adaptive")
CONSERVATIVE, AGGRESSIVE = "conservative", "aggressive"


@dataclass(frozen=True)
class Published:
    """One row of the paper: seconds on one device, and the speed-up per mode and number of devices."""

    model: str
    latent_bytes: int
    steps: int
    sequential_seconds: float | None
    speedups: dict[tuple[str, int], float]


def _of_seconds(one: float, seconds: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {point: one / several for point, several in seconds.items()}


PAPER = (
    Published("SD 1.5", 32 << 10, 50, 2.68, _of_seconds(2.68, {
        (CONSERVATIVE, 2): 2.07, (CONSERVATIVE, 3): 1.43, (CONSERVATIVE, 4): 1.10,
        (AGGRESSIVE, 2): 1.41, (AGGRESSIVE, 3): 1.00, (AGGRESSIVE, 4): 0.80,
    })),
    Published("SD 2.1-base", 32 << 10, 50, 2.48, _of_seconds(2.48, {
        (CONSERVATIVE, 2): 1.74, (CONSERVATIVE, 3): 1.32, (CONSERVATIVE, 4): 1.04,
        (AGGRESSIVE, 2): 1.35, (AGGRESSIVE, 3): 0.92, (AGGRESSIVE, 4): 0.72,
    })),
    Published("SD 2.1", 72 << 10, 50, 5.96, _of_seconds(5.96, {(CONSERVATIVE, 4): 2.42, (AGGRESSIVE, 4): 1.66})),
    Published("SDXL", 128 << 10, 50, None, {(CONSERVATIVE, 2): 1.5, (AGGRESSIVE, 4): 3.6}),
    Published("SD 3", 512 << 10, 28, 11.25, _of_seconds(11.25, {(AGGRESSIVE, 3): 3.81, (AGGRESSIVE, 4): 3.00})),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Where the seconds of an evaluation come from; `evaluation` is that of one with guidance, alone on a device."""

    name: str
    source: str
    evaluation: float
    latent_bytes: int
    steps: int = 50
    branch_share: float = 0.56

    def call(self, *, split: bool) -> Callable[[int], float]:
        """Seconds of a call: of so many whole evaluations, or of so many branches where they are dealt over devices."""
        if not split:
            return lambda evaluations: evaluations * self.evaluation
        return lambda branches: (branches // 2 + branches % 2 * self.branch_share) * self.evaluation


def options(mode: str, devices: int, *, split: bool, iterations: int = 1, tolerance: float = 0.01) -> Options:
    """What a sampler is played with: one draft per device, or one per two where guidance is split."""
    k = max(1, devices // 2) if split else devices
    kind = {"drafts": "corrected", "iterations": iterations if mode == "srds" else None}
    return Options(k, tolerance=tolerance if mode == "adaptive" else 0.0, **kind)  # type: ignore[arg-type]


def predict(
    mode: str, schedule: Schedule, devices: int, table: Table, link: Link, *, split: bool,
    distances: Sequence[float] | None = None, free: bool = False,
) -> tuple[float, Counts]:  # fmt: skip
    """Seconds of the denoising loop and what it takes; `free` leaves sums and launches out."""
    costs = LinkCosts(table.call(split=split), table.latent_bytes, link)
    if free:
        costs = LinkCosts(costs.call, 0, Link("none", 0.0, np.inf, 0.0), 0.0, 0.0)
    backend = NullBackend(devices, costs, None if distances is None else iter(distances))
    chosen = options(mode, devices, split=split)
    # an evaluation that is not split is one unit, so that it is dealt like an unguided one
    counts = rehearse(mode, chosen, schedule, 2.0 if split else 1.0, backend)
    return backend.seconds, counts


def predictions(
    tables: Sequence[Table], recorded: dict[tuple[int, int], list[float]], devices: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Every table, link, number of devices, sampler, and guidance split or not.

    `recorded` has the distances that `adaptive` measured on a real model for (steps, k); without them it is left out.
    """
    rows = []
    for table in tables:
        schedule = stable_diffusion(table.steps)
        one, _ = predict("sequential", schedule, 1, table, moves.NVLINK, split=False)
        for link in LINKS:
            for count in devices or DEVICES:
                for split in (False, True):
                    for mode in MODES:
                        k = options(mode, count, split=split).k
                        distances = recorded.get((table.steps, k)) if mode == "adaptive" else None
                        if mode == "adaptive" and distances is None:
                            continue
                        seconds, counts = predict(mode, schedule, count, table, link, split=split, distances=distances)
                        rows.append({
                            "kind": "prediction", "table": table.name, "link": link.name, "devices": count,
                            "guidance_split": split, "mode": mode, "k": k, "steps": table.steps,
                            "rounds": counts.rounds, "evaluations": counts.evaluations,
                            "seconds": float(f"{seconds:.5g}"), "speedup": round(one / seconds, 4),
                        })  # fmt: skip
    return rows


def of_the_paper() -> list[dict[str, Any]]:
    """The paper's points, each beside its prediction from the model's sequential row."""
    rows = []
    for published in PAPER:
        schedule = stable_diffusion(published.steps)
        # SDXL's seconds are not known: speed-ups hardly depend on them
        table = Table("", "", (published.sequential_seconds or 8.0) / published.steps, published.latent_bytes)
        one, _ = predict("sequential", schedule, 1, table, moves.NVLINK, split=False)
        for (mode, count), measured in published.speedups.items():
            seconds, counts = predict(mode, schedule, count, table, moves.NVLINK, split=False)
            rows.append({
                "kind": "paper", "model": published.model, "mode": mode, "devices": count, "steps": published.steps,
                "published_speedup": round(measured, 3), "speedup_in_rounds": round(published.steps / counts.rounds, 3),
                "speedup": round(one / seconds, 3), "error": round(one / seconds / measured - 1, 4),
            })  # fmt: skip
    return rows
