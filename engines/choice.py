"""Which runtime `auto` means on processor cores: the fastest one installed, measured once when they are compiled."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from engines.base import Branch
from engines.devices import LaneSpec, parse_devices
from engines.files import written_whole
from engines.load import load, module
from engines.manifest import DENOISER
from engines.runtimes import RUNTIMES, default_runtime
from engines.store import Bundle, plan_key

FILE = "cpu.json"
ROWS = 2  # of a call: both branches of guidance
REPEATS = 9
BUDGET = 30.0  # seconds per runtime, beyond the first two calls


class Measured(BaseModel):
    """What was measured of a bundle: per runtime, seconds of a call on every lane at once, and the denoiser's plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    lanes: int
    seconds: dict[str, float]
    plans: dict[str, str]

    @classmethod
    def read(cls, bundle: Bundle) -> Measured | None:
        """None where nothing was measured, or what is there cannot be read."""
        try:
            return cls.model_validate_json((bundle.folder / FILE).read_bytes())
        except (OSError, ValidationError):
            return None

    def of(self, bundle: Bundle, lanes: Sequence[LaneSpec]) -> bool:
        """Whether every runtime that could be taken now was measured as it is now, on as many lanes."""
        plans = _plans(bundle)
        return self.lanes == len(lanes) and all(self.plans.get(name) == key for name, key in plans.items())

    def fastest(self, bundle: Bundle) -> str:
        """Of the runtimes that are installed."""
        return min(_plans(bundle), key=lambda name: self.seconds[name])

    def __str__(self) -> str:
        ordered = sorted(self.seconds, key=lambda name: self.seconds[name])
        times = [f"{RUNTIMES[name].title} {self.seconds[name] * 1e3:.1f} ms" for name in ordered]
        return f"{', '.join(times)} for a call of {ROWS} on each of {self.lanes} lanes"


def runtimes(bundle: Bundle) -> tuple[str, ...]:
    """The runtimes on processor cores that are installed and take such a bundle; the default one without a denoiser."""
    if DENOISER not in bundle.manifest.networks:
        return (default_runtime("cpu"),)
    return tuple(
        name
        for name, runtime in RUNTIMES.items()
        if runtime.device == "cpu"
        and runtime.installed
        and bundle.manifest.precision == (runtime.exported or runtime.precisions[0])
    )


def lanes_of(devices: str, bundle: Bundle) -> tuple[LaneSpec, ...]:
    """The lanes of a device string for a bundle: as `parse_devices` has them, `auto` with the runtime that was fastest.

    Where something was never measured as it is now, `auto` takes the default runtime.
    """
    lanes = parse_devices(devices)
    if devices != "auto" or lanes[0].device != "cpu" or len(runtimes(bundle)) < 2:
        return lanes
    known = Measured.read(bundle)
    fits = known is not None and known.of(bundle, lanes)
    return on(known.fastest(bundle) if known is not None and fits else default_runtime("cpu"), lanes)


def on(runtime: str, lanes: Sequence[LaneSpec]) -> tuple[LaneSpec, ...]:
    """The same lanes on another runtime, in its default type."""
    return tuple(replace(lane, runtime=runtime, precision=RUNTIMES[runtime].precisions[0]) for lane in lanes)


def measure(bundle: Bundle, lanes: Sequence[LaneSpec]) -> Measured:
    """Times all runtimes, one after the other so that one's weights are in memory, and stores it with the bundle."""
    found = Measured(
        lanes=len(lanes),
        seconds={name: _seconds(bundle, on(name, lanes)) for name in runtimes(bundle)},
        plans=_plans(bundle),
    )
    with written_whole(bundle.folder / FILE) as partial:
        partial.write_text(json.dumps(found.model_dump(mode="json"), indent=1) + "\n")
    return found


def _plans(bundle: Bundle) -> dict[str, str]:
    """Per runtime, the key of the denoiser's first plan."""
    return {name: plan_key(module(name).wanted(bundle, name)[DENOISER][0]) for name in runtimes(bundle)}


def _seconds(bundle: Bundle, lanes: Sequence[LaneSpec]) -> float:
    """Of the fastest of several calls on every lane at once: other load on the machine can only make them slower."""
    engines = load(bundle, lanes)
    try:
        rng, sizes = np.random.default_rng(0), bundle.manifest.sizes
        axes = bundle.manifest.latent_axes(sizes.width, sizes.height, 1)
        given = {
            one.name: rng.standard_normal(one.resolve(axes), np.float32)
            for one in bundle.manifest.networks[DENOISER].inputs
            if one.name != "timestep"
        }
        sample = given.pop("sample")
        backend = engines.backend
        backend.bind(sample.shape, [500.0], [given])
        backend.write("sample", sample)
        calls = [
            [Branch("sample", 0, f"{lane}/{row}", 0) for row in range(ROWS)] for lane in range(backend.lanes)
        ]  # fmt: skip
        backend.predict(calls)  # the first call takes memory
        taken, started = [backend.measurements.timed(calls)], time.monotonic()
        while len(taken) < REPEATS and time.monotonic() - started < BUDGET:
            taken.append(backend.measurements.timed(calls))
        return min(taken)
    finally:
        engines.close()
