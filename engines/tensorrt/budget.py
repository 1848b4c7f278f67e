"""What a start needs of every GPU's memory, part by part: said in the log, and checked against what is there."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from engines.cuda.driver import Device, Driver
from engines.cuda.kernels import BYTES
from engines.cuda.memory import SLOTS_PER_BLOCK
from engines.cuda.rounds import TABLE_FLOATS, TABLE_ROUNDS
from engines.errors import DeviceError
from engines.manifest import DENOISER, Manifest, TensorSpec

log = logging.getLogger(__name__)


class Budget:
    """Parts of memory by device, in bytes: those that are there already, and those that are still asked for."""

    def __init__(self, driver: Driver, devices: Mapping[int, Device]) -> None:
        self._driver, self._devices = driver, devices
        self._parts: dict[int, list[tuple[str, int]]] = {ordinal: [] for ordinal in devices}
        self._taken = dict.fromkeys(devices, 0)

    def add(self, ordinal: int, what: str, size: int) -> None:
        """One part."""
        self._parts[ordinal].append((what, size))

    def add_latents(self, manifest: Manifest, ordinals: Sequence[int]) -> None:
        """The latents of an image of the usual size, and what networks read and write; `ordinals` are the lanes'."""
        (latent,) = (one for one in manifest.networks[DENOISER].inputs if one.name == "sample")
        once = [manifest.networks[name] for name in manifest.once]
        sizes = [SLOTS_PER_BLOCK * _bytes(manifest, [latent]), 4 * TABLE_ROUNDS * TABLE_FLOATS]
        sizes += [_bytes(manifest, (*network.inputs, *network.outputs)) for network in once]
        self.add(ordinals[0], "latents, texts and pixels", sum(sizes))
        network = manifest.networks[DENOISER]
        for lane, ordinal in enumerate(ordinals):
            size = branches(manifest, len(ordinals)) * _bytes(manifest, (*network.inputs, *network.outputs))
            self.add(ordinal, f"inputs and outputs of lane {lane}", size)

    def taken(self) -> None:
        """All parts so far are there."""
        self._taken = {ordinal: sum(size for _, size in parts) for ordinal, parts in self._parts.items()}

    def check(self, repair: str) -> None:
        """DeviceError when a device has less than it takes, with what takes how much."""
        for ordinal, text, needed, free, total in self._found():
            missing = needed - self._taken[ordinal]
            if missing > free:
                has = f"{(free + self._taken[ordinal]) / 1e9:.2f} of its {total / 1e9:.2f} GB are free"
                raise DeviceError(f"{text.format('needs')} and {has}: end other programs there, or {repair}")
            log.info("%s; %.2f of its %.2f GB are left", text.format("needs"), (free - missing) / 1e9, total / 1e9)

    def estimate(self, repair: str) -> None:
        """The same before anything is compiled; DeviceError when a device would never have as much."""
        for _, text, needed, _, total in self._found():
            text = text.format("will need at least")
            if needed > total:
                raise DeviceError(f"{text}, beside scratch memory, and it has {total / 1e9:.2f} GB: {repair}")
            log.info("%s, beside scratch memory, of its %.2f GB", text, total / 1e9)

    def _found(self) -> list[tuple[int, str, int, int, int]]:
        """(number, what is to be said, bytes needed, free, in all) of every device."""
        found = []
        for ordinal, parts in self._parts.items():
            device, needed = self._devices[ordinal], sum(size for _, size in parts)
            self._driver("cuCtxSetCurrent", device.context)
            free, total = self._driver("cuMemGetInfo")
            listed = ", ".join(f"{size / 1e9:.2f} GB {what}" for what, size in parts)
            text = f"cuda:{ordinal}, {device.name}: this start {{}} {needed / 1e9:.2f} GB ({listed})"
            found.append((ordinal, text, needed, free, total))
        return found


def branches(manifest: Manifest, lanes: int) -> int:
    """Rows of a lane's call for one image: both branches of guidance where one lane has to do them."""
    return 2 if manifest.guidance == "classifier_free" and lanes == 1 else 1


def _bytes(manifest: Manifest, tensors: Sequence[TensorSpec]) -> int:
    """Of tensors for one image of the model's own size."""
    axes = manifest.latent_axes(manifest.sizes.width, manifest.sizes.height, 1)
    width = {"int64": 8, "int32": 4, **BYTES}
    return sum(width[one.dtype] * int(np.prod(one.resolve(axes), dtype=np.int64)) for one in tensors)
