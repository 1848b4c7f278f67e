"""What one call of `Pipeline.generate` did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from runtime.sampling.timeline import Span


@dataclass(frozen=True)
class Report:
    """What one call of `Pipeline.generate` did. Seconds are wall time; `denoise` is the whole denoising loop.

    `critical_seconds` adds up the longest model call of every round: denoise minus that is this engine's overhead.
    Both are None on GPUs, where the host does not wait for rounds.
    `accepted` has quantiles of the relative distances that a sampler measured and accepted: per draft for `adaptive`,
    the last change for `srds`. It is a measurement per round, not a bound on the distance of the finished image. For
    `speculative` it is ‖Δ‖, how far the means of kept drafts were off in units of the step's noise, beside `drafts`,
    how many were evaluated, and `kept`, how many of these.
    `steps` counts the rows of the schedule, as `len(scheduler.timesteps)` of diffusers does.
    `lanes` and `devices` are the lanes that it had in any of its rounds, `lanes_per_round` is how many on average:
    other requests may have had the rest. `shared_rounds` were played while other requests ran, in calls that may hold
    branches of theirs: an image without any has the same bytes for the same lanes. Of the seconds, `wait` is for lanes.
    `auto` is what mode auto chose and expected. `staged` names pairs of GPUs whose latents go through host memory,
    because direct copies between them failed their test. `timeline`, if asked for, is what each lane did when; on GPUs
    its spans have no times. `request_id` is that of the server, where the call came by one. `certificate`: see
    `runtime.certificate`.
    """

    model: str
    mode: str
    scheduler: str
    steps: int
    k: int
    lanes: int
    devices: str
    guidance_scale: float
    guidance_split: bool
    drafts: str
    seed: int
    images: int
    width: int
    height: int
    rounds: int
    evaluations: int
    calls: int
    seconds: dict[str, float]
    critical_seconds: float | None
    overhead_us_per_round: float | None
    accepted: dict[str, float] | None = None
    auto: dict[str, Any] | None = None
    first_blocks: tuple[int, ...] = ()
    cache_interval: int = 1
    lanes_per_round: float = 0.0
    shared_rounds: int = 0
    staged: tuple[str, ...] = ()
    timeline: tuple[Span, ...] | None = None
    warnings: tuple[str, ...] = field(default=())
    request_id: str | None = None
    certificate: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 90th percentile and largest; None of nothing."""
    if not values:
        return None
    return {"median": float(np.median(values)), "p90": float(np.quantile(values, 0.9)), "max": float(max(values))}
