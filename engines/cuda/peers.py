"""Which pairs of devices copy to each other directly: every pair is tested before it is trusted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product

import numpy as np

from engines.cuda.driver import Device, Driver
from engines.cuda.memory import Memory
from engines.errors import DeviceError

log = logging.getLogger(__name__)
PAIR_ROUNDS, PAIR_BYTES = 64, (1, 4 << 10, 32 << 10, (512 << 10) + 3)  # latents of SD 1.5, SDXL and SD 3 among them


def staged_pairs(driver: Driver, devices: Sequence[Device]) -> tuple[tuple[int, int], ...]:
    """Copies patterns between every ordered pair of devices and reads them back; the pairs that cannot or lie.

    Peer copies have been seen to return success and to change nothing, or to change data.
    """
    failed = []
    for of, to in product(devices, devices):
        if of is to:
            continue
        reason = _pair_fault(driver, of, to)
        if reason:
            failed.append((of.ordinal, to.ordinal))
            log.warning(
                "peer copies from cuda:%d to cuda:%d %s: latents go through host memory", of.ordinal, to.ordinal, reason
            )
    return tuple(failed)


def _pair_fault(driver: Driver, of: Device, to: Device) -> str | None:
    """Why copies from one device to another must not be direct, or None."""
    memory = Memory(driver, to)
    with memory.on(to):
        if not driver("cuDeviceCanAccessPeer", driver("cuDeviceGet", to.ordinal), driver("cuDeviceGet", of.ordinal)):
            return "are not possible"
        status = driver.function("cuCtxEnablePeerAccess")(of.context, 0)[0]
        if status and status != driver.api.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
            return f"cannot be enabled ({status.name})"
    try:
        return _copies_fault(driver, memory, of, to)
    except DeviceError as error:
        return f"failed ({error})"
    finally:
        memory.close()


def _copies_fault(driver: Driver, memory: Memory, of: Device, to: Device) -> str | None:
    largest, random = max(PAIR_BYTES), np.random.default_rng(0)
    source, target, host = memory.allocate(of, largest), memory.allocate(to, largest), memory.pinned(largest)
    sending, sent = memory.stream(of), memory.event(of)
    receiving, received = memory.stream(to), memory.event(to)
    for number in range(PAIR_ROUNDS):
        size = PAIR_BYTES[number % len(PAIR_BYTES)]
        pattern = random.integers(0, 256, size, np.uint8)
        host[:size] = pattern
        with memory.on(of):
            driver("cuMemcpyHtoDAsync", source, host.ctypes.data, size, sending)
            driver("cuEventRecord", sent, sending)
        with memory.on(to):
            driver("cuMemsetD8Async", target, int(~pattern[0]) & 255, size, receiving)
            driver("cuStreamWaitEvent", receiving, sent, 0)
            driver("cuMemcpyAsync", target, source, size, receiving)
            driver("cuMemcpyDtoHAsync", host.ctypes.data, target, size, receiving)
            driver("cuEventRecord", received, receiving)
            driver.wait(received, f"a peer copy from cuda:{of.ordinal} to cuda:{to.ordinal}")
        if not np.array_equal(host[:size], pattern):
            return f"changed data (round {number}, {size} bytes)"
    return None
