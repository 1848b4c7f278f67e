"""What a start needs of every GPU's memory, part by part: said in the log, and checked against what is free."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from engines.cuda.driver import Device, Driver
from engines.errors import DeviceError

log = logging.getLogger(__name__)


class Budget:
    """Parts of memory by device, in bytes: those that are there already, and those that are still asked for."""

    def __init__(self, driver: Driver, devices: Mapping[int, Device]) -> None:
        self._driver, self._devices = driver, devices
        self._parts: dict[int, list[tuple[str, int, bool]]] = {ordinal: [] for ordinal in devices}

    def add(self, ordinal: int, what: str, size: int, *, taken: bool = False) -> None:
        """One part."""
        self._parts[ordinal].append((what, size, taken))

    def taken(self) -> None:
        """All parts so far are there."""
        self._parts = {ordinal: [(what, size, True) for what, size, _ in one] for ordinal, one in self._parts.items()}

    def check(self, repair: str) -> None:
        """DeviceError when a device has less than it takes, with what takes how much."""
        for ordinal, parts in self._parts.items():
            device = self._devices[ordinal]
            self._driver("cuCtxSetCurrent", device.context)
            free, total = self._driver("cuMemGetInfo")
            needed, missing = sum(size for _, size, _ in parts), sum(size for _, size, taken in parts if not taken)
            listed = ", ".join(f"{size / 1e9:.2f} GB {what}" for what, size, _ in parts)
            text = f"cuda:{ordinal}, {device.name}: this start needs {needed / 1e9:.2f} GB ({listed})"
            if missing > free:
                has = f"{free / 1e9:.2f} of its {total / 1e9:.2f} GB are free"
                raise DeviceError(f"{text} and {has}: end other programs there, or {repair}")
            log.info("%s; %.2f of its %.2f GB are free", text, free / 1e9, total / 1e9)
