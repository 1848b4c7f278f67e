"""Which file serves which lanes: ONNX Runtime on processor cores, TensorRT or ONNX Runtime on GPUs, imported late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from engines.base import Array, Backend, Progress
from engines.cuda.driver import available
from engines.devices import LaneSpec, tensorrt_installed
from engines.errors import DeviceError
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


def _runtime(lanes: Sequence[LaneSpec]) -> str:
    return "cpu" if lanes[0].gpu is None else lanes[0].runtime


def check(lanes: Sequence[LaneSpec]) -> None:
    """DeviceError where lanes need a GPU and nothing here can drive one: the first thing to say, before any file."""
    reason = available() if lanes[0].gpu is not None else None
    if reason:
        raise DeviceError(f"there is no {lanes[0].device}: {reason}; use --devices auto or cpu")


def load(bundle: Bundle, lanes: Sequence[LaneSpec]) -> Engines:
    """Opens a model on lanes; BundleError when it is not compiled for them, DeviceError when they are not there."""
    runtime = _runtime(lanes)
    if runtime == "cpu":
        from engines import ort

        return ort.Engines(bundle, lanes)
    if runtime == "tensorrt":
        from engines.tensorrt.run import Engines as TensorrtEngines

        return TensorrtEngines(bundle, lanes)
    from engines.cuda.onnxruntime import Engines as ProviderEngines

    return ProviderEngines(bundle, lanes)


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec], progress: Progress | None = None
) -> dict[str, Plan | None]:
    """Compiles what is missing or damaged for these lanes: the new plans by name, None for those that were there."""
    check(lanes)
    runtime = _runtime(lanes)
    if runtime == "cpu":
        from engines import ort

        return ort.build_missing(bundle, progress)
    if runtime == "tensorrt":
        from engines.tensorrt import build

        return build.build_missing(bundle, lanes, progress)
    return {}  # ONNX Runtime compiles for a GPU when it opens a model


def wanted(bundle: Bundle) -> dict[str, list[dict[str, str]]]:
    """Per network, the fields of the plans that this machine would use of a bundle.

    Of a bundle in float32, which is for processor cores first, those for GPUs count only where they were built.
    """
    from engines import nvidia, ort
    from engines.tensorrt.plan import plan_fields

    networks, cores = bundle.manifest.networks, bundle.manifest.precision == "fp32"
    kinds = list(dict.fromkeys(nvidia.visible_gpus())) if tensorrt_installed() else []
    found = {network: [plan_fields(bundle, network, gpu) for gpu in kinds] for network in networks}
    if cores:
        plans = bundle.plans()
        for network, several in found.items():
            built = [fields for fields in several if plan_key(fields) in plans]
            found[network] = [ort.plan_fields(bundle, network), *built]
    return found
