"""Compiles and opens models through the runtime that their lanes name; see `engines.runtimes`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from engines.base import Array, Backend, Progress
from engines.cuda.driver import LANE_TIMEOUT
from engines.devices import LaneSpec
from engines.errors import DeviceError
from engines.runtimes import RUNTIMES, default_runtime
from engines.store import Bundle, Plan, plan_key


class Runner(Protocol):
    """A network that runs once per image."""

    def run(self, **inputs: np.ndarray) -> dict[str, Array]:
        """Its outputs in float32 of inputs, by name, with the batch first."""


class Engines(Protocol):
    """A loaded model. `plan_folder` belongs to the compiled denoiser on these lanes."""

    @property
    def runners(self) -> Mapping[str, Runner]:
        """The networks that run once per image, by name."""

    @property
    def backend(self) -> Backend:
        """The lanes of the denoiser."""

    def sibling(self, home: int) -> Backend:
        """Another backend on the same lanes, for another image at the same time, with its latents at lane `home`.

        It is closed with the model. The two must never use a lane at the same time, nor without `settle` in between.
        """

    @property
    def plan_folder(self) -> Path:
        """Where what was measured on these lanes is kept."""

    def close(self) -> None:
        """Stops the lanes."""


class RuntimeModule(Protocol):
    """What the module of a runtime has."""

    def trouble(self) -> str | None:
        """Why nothing can run on this machine, or None; asked before any file is read."""

    def wanted(self, bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
        """Per network, the fields of the plans that this machine would use; nothing where there are no plans."""

    def build_missing(
        self, bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
    ) -> dict[str, Plan | None]:
        """Compiles what is missing or damaged: the new plans by name, None for those that were there."""

    def Engines(  # noqa: N802 - a class
        self, bundle: Bundle, lanes: Sequence[LaneSpec], *, lane_timeout: float
    ) -> Engines:
        """Opens a model; BundleError when it is not compiled for these lanes, DeviceError when they are not there."""


def module(runtime: str) -> RuntimeModule:
    """The module of a runtime by its key in `RUNTIMES`."""
    return cast(RuntimeModule, importlib.import_module(RUNTIMES[runtime].module))


def check(lanes: Sequence[LaneSpec]) -> None:
    """DeviceError where nothing here can drive the lanes: the first thing to say, before any file."""
    reason = module(lanes[0].runtime).trouble()
    if reason:
        runtime = RUNTIMES[lanes[0].runtime]
        name = lanes[0].device if runtime.by_default else f"{lanes[0].device}@{runtime.option}"
        raise DeviceError(f"there is no {name}: {reason}; use --devices auto or cpu")


def load(bundle: Bundle, lanes: Sequence[LaneSpec], lane_timeout: float = LANE_TIMEOUT) -> Engines:
    """Opens a model on lanes; BundleError when it is not compiled for them, DeviceError when they are not there.

    A GPU's lane that makes no progress for `lane_timeout` seconds hangs, and is given up with a DeviceError.
    """
    return module(lanes[0].runtime).Engines(bundle, lanes, lane_timeout=lane_timeout)


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """Compiles what is missing or damaged for these lanes: the new plans by name, None for those that were there."""
    check(lanes)
    return module(lanes[0].runtime).build_missing(bundle, lanes, progress)


def wanted(bundle: Bundle) -> dict[str, list[dict[str, str]]]:
    """Per network, the fields of the plans that this machine would use of a bundle.

    A bundle is first of all for runtimes whose default precision it has. For others, and for runtimes that have to be
    asked for by name, only what was built counts.
    """
    kind, plans = bundle.manifest.precision, bundle.plans()
    able = [name for name, one in RUNTIMES.items() if kind in ((one.exported,) if one.exported else one.precisions)]
    able = [name for name in able if RUNTIMES[name].installed]
    usual = [name for name in able if name == default_runtime(RUNTIMES[name].device)]
    first = [name for name in usual if RUNTIMES[name].precisions[0] == kind] or usual
    found: dict[str, list[dict[str, str]]] = {network: [] for network in bundle.manifest.networks}
    for name in (*first, *(name for name in able if name not in first)):
        for network, several in module(name).wanted(bundle, name).items():
            found[network] += [fields for fields in several if name in first or plan_key(fields) in plans]
    return found
