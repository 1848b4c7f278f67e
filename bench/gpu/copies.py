"""Copies: which pairs of GPUs may copy directly, and how long one latent and many bytes take on every way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from bench.gpu.capture import enable_peers
from bench.gpu.device import DeviceBench
from bench.gpu.engine import CopyNetwork
from bench.gpu.parts import NotPossibleError, Row, Settings, open_driver
from engines.cuda.backend import CudaBackend
from engines.cuda.memory import pinned

LATENTS = {"SD 1.5": 32 << 10, "SDXL": 128 << 10, "SD 3": 512 << 10, "64 MiB": 64 << 20}


def peers(settings: Settings) -> Iterator[Row]:
    """The engine's own test of every ordered pair of GPUs."""
    driver = open_driver()
    if driver.count < 2:
        raise NotPossibleError("this machine has one GPU")
    backend = CudaBackend(driver, [CopyNetwork(driver, n) for n in range(driver.count)], "float16", settings.cache)
    for of in range(driver.count):
        for to in range(driver.count):
            if of != to:
                yield {"from": of, "to": to, "copies": "staged" if (of, to) in backend.measurements.staged else "peer"}
    backend.close()


def rates(settings: Settings) -> Iterator[Row]:
    """Host to device and back, within a device, and between devices: seconds on the host for one copy and its event."""
    driver = open_driver()
    bench = DeviceBench(driver, settings.cache, "float16")
    others = [DeviceBench(driver, settings.cache, "float16", n) for n in range(1, driver.count)]
    driver("cuCtxSetCurrent", bench.device.context)
    for name, size in LATENTS.items():
        source, target = bench.allocate(size), bench.allocate(size)
        host, free = pinned(driver, size)
        at = host.ctypes.data
        ways: dict[str, Callable[[], None]] = {
            "host to device": partial(driver, "cuMemcpyHtoDAsync", target, at, size, bench.stream),
            "device to host": partial(driver, "cuMemcpyDtoHAsync", at, source, size, bench.stream),
            "on one device": partial(bench.copy, target, source, size),
        }
        for other in others:
            if enable_peers(bench, other):
                continue
            driver("cuCtxSetCurrent", other.device.context)
            remote = other.allocate(size)
            driver("cuCtxSetCurrent", bench.device.context)
            ways[f"cuda:0 to cuda:{other.device.ordinal}"] = partial(
                driver, "cuMemcpyAsync", remote, source, size, bench.stream
            )
        for way, copy in ways.items():
            seconds = _seconds(bench, copy, 3 if settings.rehearsal else 50)
            yield {"latent": name, "bytes": size, "way": way, "us": seconds * 1e6, "gb_per_s": size / seconds / 1e9}
        free()
        bench.free([source, target])
    for other in others:
        driver("cuCtxSetCurrent", other.device.context)
        other.close()
    driver("cuCtxSetCurrent", bench.device.context)
    bench.close()


def _seconds(bench: DeviceBench, copy: Callable[[], None], repeats: int) -> float:
    """Median from the call to the host's knowledge of its end."""
    found = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        copy()
        bench.settle()
        found.append(time.perf_counter() - start)
    return sorted(found[2:])[len(found[2:]) // 2]
