"""Mode `auto`: the fastest candidate, by measured call times, whose measured drift is small enough.

Both measurements are made once (`python -m runtime.calibrate`, which `make engines` runs) and stored with the compiled
model: how many seconds a model call takes for each batch size while all lanes work, and how far from the sequential
image each candidate ends up. Small enough means that `COVERED` of all images are within the tolerance, with confidence
`CONFIDENCE`; without a tolerance, within `SAME_PSNR` of the sequential one, which nobody can see.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from engines.files import written_whole
from engines.null import NullBackend
from runtime.sampling.drafts import resolve
from runtime.sampling.execute import Counts, execute
from runtime.sampling.noise import noise_slots
from runtime.sampling.operations import STATE, Options
from runtime.sampling.program import program
from runtime.sampling.samplers import measures
from runtime.sampling.schedule import Schedule

SAME_PSNR = 50.0  # dB, an error of 0.8 of 255 at the root of the mean square; equal images count as EQUAL_PSNR
EQUAL_PSNR = 99.0
COVERED, CONFIDENCE = 0.99, 0.95
FEWEST = 3  # images that a limit can be drawn from
EQUAL_DISTANCE = 1e-7  # of latents that are equal to rounding
Numbers = NDArray[np.floating]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Setting(_Strict):
    """What a drift was measured for; other settings know nothing of it."""

    scheduler: str
    eta: float
    steps: int
    guidance_scale: float


class Candidate(_Strict):
    """One way to play a schedule."""

    mode: str
    k: int
    drafts: str

    @property
    def options(self) -> Options:
        """For the sampler."""
        return Options(k=self.k, drafts=self.drafts)


class Drift(_Strict):
    """How far finished images are from the sequential ones: the relative L2 distance of their latents, and their PSNR.

    `bound` and `psnr_bound` are what `COVERED` of all images keep to: the one-sided tolerance limit of a normal
    distribution, which the logarithms of distances nearly have, and never better than the worst image that was seen.
    """

    setting: Setting
    candidate: Candidate
    images: int
    median: float
    bound: float
    psnr_bound: float

    @classmethod
    def of(cls, setting: Setting, candidate: Candidate, distances: Numbers, psnr: Numbers) -> Drift:
        """From each image's distance and PSNR in dB."""
        bound = np.exp(_upper_limit(np.log(np.maximum(distances, EQUAL_DISTANCE))))
        return cls(
            setting=setting, candidate=candidate, images=len(distances), median=float(np.median(distances)),
            bound=float(bound), psnr_bound=-_upper_limit(-psnr),
        )  # fmt: skip

    def within(self, tolerance: float | None) -> bool:
        """Whether the candidate may be played."""
        return self.psnr_bound >= SAME_PSNR if tolerance is None else self.bound <= tolerance


def _upper_limit(values: Numbers) -> float:
    """What `COVERED` of a normal population stays below, with confidence `CONFIDENCE`, from a sample of it.

    The factor of the standard deviation is Natrella's approximation (NIST/SEMATECH e-Handbook, section 7.2.6.3).
    """
    count, normal = len(values), NormalDist()
    covered, confident = normal.inv_cdf(COVERED), normal.inv_cdf(CONFIDENCE)
    a = 1 - confident**2 / (2 * (count - 1))
    b = covered**2 - confident**2 / count
    factor = (covered + math.sqrt(covered**2 - a * b)) / a
    return max(float(values.max()), float(values.mean() + factor * values.std(ddof=1)))


class Calibration(_Strict):
    """`calls[devices][batch]` is the seconds of a call with that many branches on each lane at the same time."""

    schema_version: Literal[3] = 3
    calls: dict[str, dict[int, float]] = {}
    drifts: tuple[Drift, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Calibration:
        """An empty one if there is none, or none that can be trusted."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            return cls()

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        with written_whole(path) as partial:
            partial.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    def for_setting(self, setting: Setting) -> list[Drift]:
        """What was measured for a setting."""
        return [drift for drift in self.drifts if drift.setting == setting]


class Choice(_Strict):
    """What `auto` chose, what it expects of it by calibration, and the reason in words."""

    candidate: Candidate
    seconds: float | None
    drift_bound: float
    psnr_bound: float
    reason: str


EXACT = Candidate(mode="sequential", k=1, drafts="frozen")


def candidates() -> list[Candidate]:
    """What is measured: both modes of DRiffusion with the default drafts and the numbers of drafts that can pay."""
    kind = resolve("auto")  # by name: if it comes to mean another, that one has never been measured
    return [Candidate(mode=mode, k=k, drafts=kind) for k in (2, 3, 4, 8) for mode in ("conservative", "aggressive")]


def call_seconds(measured: dict[int, float]) -> Callable[[int], float]:
    """Seconds for any number of branches: linear between what was measured, and beyond it."""
    batches = sorted(measured)
    seconds = [measured[batch] for batch in batches]

    def interpolate(branches: int) -> float:
        if branches > batches[-1]:
            return seconds[-1] * branches / batches[-1]
        return float(np.interp(branches, batches, seconds))

    return interpolate


def predicted_seconds(
    candidate: Candidate, schedule: Schedule, lanes: int, guidance_scale: float, measured: dict[int, float], images: int
) -> float:
    """The model calls on the critical path of a candidate."""
    seconds = call_seconds(measured)
    return seconds_by_lanes(candidate.mode, candidate.options, schedule, guidance_scale, lanes, seconds, images)[-1]


@lru_cache(maxsize=64)
def seconds_by_lanes(
    mode: str, options: Options, schedule: Schedule, guidance_scale: float, lanes: int,
    seconds: Callable[[int], float], images: int,
) -> tuple[float, ...]:  # fmt: skip
    """The model calls on the critical path on 1, 2, … so many lanes; `seconds(branches)` is how long a call takes.

    Samplers that decide by what they measure make one image at a time; the others make all of them in every call.
    """
    turns, batch = (images, 1) if measures(mode, options) else (1, images)
    sizes = round_sizes(mode, options, schedule, guidance_scale)
    return tuple(
        turns * sum(rounds * seconds(math.ceil(branches / number) * batch) for branches, rounds in sizes)
        for number in range(1, lanes + 1)
    )


def rows_per_round(
    mode: str, options: Options, schedule: Schedule, guidance_scale: float, images: int
) -> float:  # fmt: skip
    """How many rows, one per branch and image, the rounds of a sampler have on average."""
    sizes = round_sizes(mode, options, schedule, guidance_scale)
    mean = sum(branches * rounds for branches, rounds in sizes) / sum(rounds for _, rounds in sizes)
    return mean if measures(mode, options) else mean * images


@lru_cache(maxsize=64)
def round_sizes(
    mode: str, options: Options, schedule: Schedule, guidance_scale: float
) -> tuple[tuple[int, int], ...]:  # fmt: skip
    """How many rounds a sampler plays by their number of branches; one that measures finds every draft perfect."""
    backend = NullBackend(1)
    rehearse(mode, options, schedule, guidance_scale, backend)
    return tuple(sorted(backend.sizes.items()))


def rehearse(mode: str, options: Options, schedule: Schedule, guidance_scale: float, backend: NullBackend) -> Counts:
    """Plays a sampler on a backend without models."""
    backend.bind((), schedule.timesteps, ())
    backend.written.add(STATE)
    for step in schedule.stochastic_steps:
        backend.written.update(slot for slot, _ in noise_slots(step, schedule.steps, options))
    perfect = (0.0,) * schedule.steps  # keeps every draft
    return execute(program(mode, schedule, options, guidance_scale, perfect), backend, lambda finished: None)


def choose(
    calibration: Calibration,
    devices: str,
    lanes: int,
    schedule: Schedule,
    setting: Setting,
    tolerance: float | None,
    images: int = 1,
    *,
    guided: bool = True,
) -> tuple[Choice, list[str]]:
    """The fastest candidate within the tolerance, and warnings; sequential where nothing was measured.

    A tolerance of 0 is exact; None is `SAME_PSNR`. `guided` says whether the model makes a second pass for guidance.
    """

    def exact(reason: str) -> Choice:
        return Choice(candidate=EXACT, seconds=None, drift_bound=0.0, psnr_bound=EQUAL_PSNR, reason=reason)

    if tolerance == 0 or not schedule.draftable:
        return exact("tolerance 0" if tolerance == 0 else f"{schedule.name} takes steps that are too long to draft"), []
    measured, drifts = calibration.calls.get(devices), calibration.for_setting(setting)
    if not measured or not drifts:
        missing = "call times on these devices" if not measured else f"drift of {setting.model_dump()}"
        reason = f"the {missing} was never measured; `python -m runtime.calibrate` does it"
        return exact(reason), [] if tolerance is None else [f"mode auto plays sequential: {reason}"]
    scale = setting.guidance_scale if guided else 1.0
    wanted = candidates()  # an older file may know others
    bound = f"a PSNR of {SAME_PSNR:g} dB" if tolerance is None else f"a drift of {tolerance:g}"
    allowed = [(EXACT, 0.0, EQUAL_PSNR)]
    allowed += [(d.candidate, d.bound, d.psnr_bound) for d in drifts if d.within(tolerance) and d.candidate in wanted]
    timed = [
        Choice(
            candidate=candidate,
            seconds=predicted_seconds(candidate, schedule, lanes, scale, measured, images),
            drift_bound=drift,
            psnr_bound=psnr,
            reason=f"the fastest that keeps {COVERED:.0%} of images within {bound}, by calibration",
        )
        for candidate, drift, psnr in allowed
    ]
    return min(timed, key=lambda choice: (choice.seconds, choice.drift_bound)), []
