"""What may become part of a CUDA graph here: the questions that decide how rounds are played.

An answer is `yes` only when the graph was launched and the bytes that it moved are the right ones. `no` is an answer,
too: the engine then plays such rounds through streams. Wrong bytes without an error fail the part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.gpu.device import DeviceBench
from bench.gpu.parts import Row, Settings, open_driver
from engines.cuda.memory import pinned
from engines.errors import DeviceError

SIZE = (32 << 10) + 3  # about the latents of SD 1.5, and no power of two
LAUNCHES = 3


class Question:
    """One pattern that travels from `source` to `target` by what `enqueue` captures."""

    def __init__(self, bench: DeviceBench, text: str, *, required: bool) -> None:
        self.bench, self.text, self.required = bench, text, required

    def ask(self, enqueue: Callable[[], None], source: int, target: int) -> Row:
        """Captures, launches several times with fresh bytes, and compares."""
        bench, driver, rng = self.bench, self.bench.driver, np.random.default_rng()
        row: Row = {"question": self.text, "required": self.required, "answer": "no"}
        driver("cuCtxSetCurrent", bench.device.context)
        try:
            graph = driver.capture(bench.stream, enqueue)
        except (DeviceError, RuntimeError) as error:  # the bindings raise one for what the driver does not have
            driver("cuCtxSetCurrent", bench.device.context)
            return row | {"reason": str(error)}
        for _ in range(LAUNCHES):
            value = rng.integers(0, 256, SIZE, np.uint8)
            bench.to_device(source, value)
            try:
                driver("cuGraphLaunch", graph, bench.stream)
                bench.settle()
            except DeviceError as error:
                return row | {"reason": f"it is captured and cannot run: {error}"}
            if not np.array_equal(bench.to_host(target, SIZE), value):
                driver("cuGraphExecDestroy", graph)
                return row | {"answer": "wrong bytes"}
        driver("cuGraphExecDestroy", graph)
        return row | {"answer": "yes"}


def questions(settings: Settings) -> Iterator[Row]:
    """Within one device, through pinned memory, between streams and between devices."""
    driver = open_driver()
    bench = DeviceBench(driver, settings.cache, "float32")
    bench.kernels.function("advance")
    source, middle, target = (bench.allocate(SIZE) for _ in range(3))
    answers = []
    for row in (*_on_one_device(bench, source, middle, target), *_between_devices(bench, settings, source, target)):
        answers.append(row)
        yield row
    if driver.count < 2:
        yield {"question": "copies between devices", "required": False, "answer": "not possible here: one GPU"}
    bench.close()
    wrong = [row["question"] for row in answers if row["answer"] == "wrong bytes"]
    assert not wrong, f"a captured copy gave wrong bytes and no error: {', '.join(wrong)}"
    missing = [row["question"] for row in answers if row["required"] and row["answer"] != "yes"]
    assert not missing, f"rounds cannot be graphs here: {', '.join(missing)}"


def _on_one_device(bench: DeviceBench, source: int, middle: int, target: int) -> Iterator[Row]:
    driver, main = bench.driver, bench.stream
    lane, fork, done = driver.stream(), driver.event(), driver.event()
    host, free = pinned(driver, SIZE)
    copy = "cuMemcpyAsync"

    def direct() -> None:
        driver(copy, target, source, SIZE, main)

    def with_kernel() -> None:
        driver(copy, target, source, SIZE, main)
        bench.advance(1)

    def forked() -> None:
        driver(copy, middle, source, SIZE, main)
        driver("cuEventRecord", fork, main)
        driver("cuStreamWaitEvent", lane, fork, 0)
        driver(copy, target, middle, SIZE, lane)
        driver("cuEventRecord", done, lane)
        driver("cuStreamWaitEvent", main, done, 0)

    def through_host() -> None:
        driver("cuMemcpyDtoHAsync", host.ctypes.data, source, SIZE, main)
        driver("cuEventRecord", fork, main)
        driver("cuStreamWaitEvent", lane, fork, 0)
        driver("cuMemcpyHtoDAsync", target, host.ctypes.data, SIZE, lane)
        driver("cuEventRecord", done, lane)
        driver("cuStreamWaitEvent", main, done, 0)

    for text, enqueue in (
        ("cuMemcpyAsync on one device", direct),
        ("a kernel behind a copy", with_kernel),
        ("a second stream by fork and join", forked),
        ("copies through pinned host memory", through_host),
    ):
        yield Question(bench, text, required=True).ask(enqueue, source, target)
    free()
    for event in (fork, done):
        driver("cuEventDestroy", event)
    driver("cuStreamDestroy", lane)


def _between_devices(bench: DeviceBench, settings: Settings, source: int, target: int) -> Iterator[Row]:
    """There and back by every other device, as a lane's round does; with peer access, and as the driver finds it."""
    driver = bench.driver
    for ordinal in range(1, driver.count):
        other = DeviceBench(driver, settings.cache, "float32", ordinal)
        remote, fork = other.allocate(SIZE), None
        done = driver.event()
        driver("cuCtxSetCurrent", bench.device.context)
        fork = driver.event()
        for peer in (False, True):
            reason = enable_peers(bench, other) if peer else None
            how = "with peer access" if peer else "without peer access"
            if reason:
                yield {
                    "question": f"cuda:0 ↔ cuda:{ordinal} {how}",
                    "required": False,
                    "answer": "no",
                    "reason": reason,
                }
                continue
            for name in ("cuMemcpyAsync", "cuMemcpyPeerAsync"):
                enqueue = _round_trip(bench, other, name, (source, remote, target), (fork, done))
                text = f"cuda:0 ↔ cuda:{ordinal} by {name} {how}"
                yield Question(bench, text, required=False).ask(enqueue, source, target)
        driver("cuEventDestroy", fork)
        driver("cuCtxSetCurrent", other.device.context)
        driver("cuEventDestroy", done)
        other.close()
        driver("cuCtxSetCurrent", bench.device.context)


def _round_trip(
    bench: DeviceBench, other: DeviceBench, name: str, pointers: tuple[int, int, int], events: tuple[Any, Any]
) -> Callable[[], None]:
    driver, here, there = bench.driver, bench.device.context, other.device.context
    (source, remote, target), (fork, done) = pointers, events

    def copy(to: int, to_context: Any, of: int, of_context: Any) -> None:
        if name == "cuMemcpyAsync":
            driver(name, to, of, SIZE, other.stream)
        else:
            driver(name, to, to_context, of, of_context, SIZE, other.stream)

    def enqueue() -> None:
        driver("cuEventRecord", fork, bench.stream)
        driver("cuCtxSetCurrent", there)
        driver("cuStreamWaitEvent", other.stream, fork, 0)
        copy(remote, there, source, here)
        copy(target, here, remote, there)
        driver("cuEventRecord", done, other.stream)
        driver("cuCtxSetCurrent", here)
        driver("cuStreamWaitEvent", bench.stream, done, 0)

    return enqueue


def enable_peers(bench: DeviceBench, other: DeviceBench) -> str | None:
    """Peer access in both directions; why not, or None."""
    driver = bench.driver
    for of, to in ((bench, other), (other, bench)):
        handles = [driver("cuDeviceGet", one.device.ordinal) for one in (to, of)]
        if not driver("cuDeviceCanAccessPeer", *handles):
            return f"cuda:{to.device.ordinal} cannot access cuda:{of.device.ordinal}"
        driver("cuCtxSetCurrent", to.device.context)
        status = driver.api.cuCtxEnablePeerAccess(of.device.context, 0)[0]
        driver("cuCtxSetCurrent", bench.device.context)
        if status and status != driver.api.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
            return f"peer access cannot be enabled: {status.name}"
    return None
