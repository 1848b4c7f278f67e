"""`python -m bench gpu`: clean where there is no GPU, and its own code run on an imaginary one."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, kernel, moves
from engines.cuda.driver import Driver, available
from tests.fake_cuda import OK, FakeCuda, Stream


def test_without_a_gpu_every_part_says_why(tmp_path: Path) -> None:
    if available() is None:
        pytest.skip("this machine has a GPU: make gpu-check")
    target = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench", "gpu", "--json", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(target.read_text())["rows"]
    assert rows[0]["part"] == "installed"
    assert rows[0]["status"] == "passed"
    assert {row["status"] for row in rows[1:]} == {"not possible here"}
    assert {row["reason"] for row in rows[1:]} == {available()}
    assert "engine overhead" in done.stdout


@pytest.mark.parametrize("link", moves.LINKS, ids=lambda link: link.name)
def test_two_ways_to_move_latents(link: moves.Link) -> None:
    """One device moves nothing; two hops cost two latencies, one hop costs one; more devices never cost less."""
    assert moves.gather(1, 1 << 15, link) == moves.all_gather(1, 1 << 15, link) == moves.COMBINE
    both = moves.gather(2, 0, link) - moves.COMBINE
    assert both == pytest.approx(2 * (link.latency + link.event))
    assert moves.all_gather(2, 0, link) - moves.COMBINE == pytest.approx(link.latency + link.event)
    for way in (moves.gather, moves.all_gather):
        seconds = [way(devices, 1 << 19, link) for devices in (1, 2, 4, 8)]
        assert seconds == sorted(seconds)
    assert len(moves.measure()) == len(moves.LINKS) * len(moves.LATENTS) * len(moves.DEVICES)


class Timed(FakeCuda):
    """The imaginary machine with what only benchmarks call; their copies may use memory that is not pinned."""

    def _copy(self, target: int, source: int, size: int, stream: Stream, devices: Any) -> Any:
        known = [any(a <= p < a + m.size for a, (_, m) in self.memory.items()) for p in (target, source)]
        if all(known):
            return super()._copy(target, source, size, stream, devices)

        def copy() -> None:
            ctypes.memmove(target, source, size)

        self.submit(stream, copy)
        return (OK,)

    def _cuEventElapsedTime(self, start: Any, end: Any) -> Any:
        return OK, 0.01

    def _cuStreamDestroy(self, stream: Stream) -> Any:
        return super()._cuStreamDestroy(stream)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(
        "engines.cuda.kernels.machine_code", lambda variant, arch, cache: json.dumps(variant.__dict__).encode()
    )
    monkeypatch.setattr("engines.cuda.peers.PAIR_BYTES", (64,))
    monkeypatch.setattr(gpu, "SIZES", (1 << 10, 1 << 12))
    monkeypatch.setattr(gpu, "REPEATS", 1)
    monkeypatch.setattr(gpu, "STEPS", 6)
    return Driver(Timed(2, seed=1))


def test_the_parts_that_need_no_model(machine: Driver, tmp_path: Path) -> None:
    check = gpu.Check(lambda line: None)
    check.part("correct", lambda: gpu._correct(machine, tmp_path))
    check.part("bandwidth", lambda: gpu._bandwidth(machine, tmp_path))
    check.part("pairs", lambda: gpu._pairs(machine, tmp_path))
    check.part("overhead", lambda: gpu._overhead(machine, tmp_path, (1, 2)))
    assert [row["status"] for row in check.rows] == ["passed"] * 4, check.rows
    correct, bandwidth, pairs, overhead = (row["figures"] for row in check.rows)
    assert [row["dtype"] for row in correct] == ["float16", "bfloat16", "float32"]
    assert len(bandwidth) == 2 * 2 * len(gpu.SHAPES)
    assert {(row["from"], row["to"], row["copies"]) for row in pairs} == {(0, 1, "peer"), (1, 0, "peer")}
    assert len(overhead) == 2 * 2 * 2 * len(gpu.MODES)


def test_one_combination_beside_a_copy(machine: Driver, tmp_path: Path) -> None:
    """`bench kernel` on a GPU: this PyTorch has none, so that only the kernel and the copy are timed."""
    bench = gpu.Bench(machine, tmp_path, "float16")
    row = kernel._gpu_row(bench, "SD 1.5", 1 << 10, 3, 2)
    bench.close()
    assert (row["inputs"], row["outputs"], row["device"]) == (7, 4, "cuda:0") and row["error"] < 2e-3
    assert {"combine", "copy"} <= set(row["us"]) and row["of_copy"]["median"] > 0


def test_a_wrong_kernel_fails(machine: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = "tests.host_kernel.HostKernel.combine"
    monkeypatch.setattr(kernel, lambda self, *arguments: None)
    check = gpu.Check(lambda line: None)
    check.part("correct", lambda: gpu._correct(machine, tmp_path))
    assert check.rows[0]["status"] == "failed"
    assert "AssertionError" in check.rows[0]["reason"]
