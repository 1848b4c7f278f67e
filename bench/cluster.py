"""`python -m bench cluster`: how many GPUs a load needs, by simulation, with one, two, four or eight per replica.

Replicas with the server's own rules for lanes are played on a virtual clock (bench/simulation/fleet.py): for a limit of
the 99th percentile the fewest are sought that keep it. The table of call times is SDXL's on an H100, from two published
rows; copies and launches, microseconds beside these calls, are left out.

The simulator is validated here: two servers of one lane each answer an open-loop load, and the same arrivals are
simulated with the call times of these lanes.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.gpu.engine import schedule as stable_diffusion
from bench.models import EMBEDDED, prompts
from bench.serve import ask
from bench.simulation.costs import measured_costs
from bench.simulation.fleet import Calls, Kind, Loss, Replica, Request, arrivals, play
from engines.errors import EngineError, ParameterError
from engines.store import BUILD
from runtime.auto import call_seconds
from runtime.call import Call
from runtime.lane_policy import BATCHED, ELASTIC, Policy
from runtime.pipeline import Pipeline
from runtime.sampling.operations import Options
from runtime.sampling.schedulers import make_schedule

# seconds on an H100 with TensorRT, 1024²: 30 steps with guidance take 1.471 in all; of the LCM version, which has no
# guidance, 4 steps of the U-Net 0.1028, the VAE 0.12695 and CLIP 0.00078
SOURCE = "model card of stabilityai/stable-diffusion-xl-1.0-tensorrt"
BESIDE = 0.12695 + 0.00078
ONE_BRANCH, TWO_BRANCHES = 0.1028 / 4, (1.471 - BESIDE) / 30
STEPS, GUIDANCE = 30, 5.0
GPUS = (1, 2, 4, 8)  # of a replica
PLAYED = {"sequential": Options(k=1), "aggressive, k = 4": Options(k=4, drafts="corrected")}
POLICIES: dict[str, Policy] = {"elastic": ELASTIC, "batched": BATCHED}
RATES = (1.0, 10.0, 100.0, 1000.0)  # per second
PROCESSES = ("poisson", "bursts", "day")
LIMITS = (0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0)  # seconds at the 99th percentile
USUAL_RATE, USUAL_LIMIT = 100.0, 2.0
SECONDS = 30.0  # of a load, or as long as 3,000 requests take
WARM_UP = 0.1  # of the requests, which are not counted
ZONES = 3
AFTER = 15.0  # seconds after a loss whose requests are looked at
STEPS_HERE = (12, 20, 28)
LOADS_HERE = (0.3, 0.6, 0.85)  # of what two replicas can do
CLIENTS = 48


def h100(branches: int) -> float:
    """Seconds of a call: a line through the two published points, which is an assumption beyond them."""
    return ONE_BRANCH + (branches - 1) * (TWO_BRANCHES - ONE_BRANCH)


@dataclass(frozen=True)
class Fleet:
    """Replicas of so many GPUs each, and the load that they have."""

    gpus: int
    mode: str
    policy: str
    rate: float
    process: str = "poisson"

    @property
    def _kind(self) -> Kind:
        mode = self.mode.partition(",")[0]
        return Kind.of(mode, PLAYED[self.mode], stable_diffusion(STEPS), GUIDANCE, self.gpus, h100, BESIDE)

    def latencies(self, replicas: int, loss: Loss | None = None) -> list[Request]:
        """Every request, in the order of arrival; the first ones find an empty fleet."""
        count = max(3000, int(self.rate * SECONDS))
        load = arrivals(self.process, self.rate, [self._kind], count, seed=0)
        several = [Replica(self.gpus, POLICIES[self.policy], h100) for _ in range(replicas)]
        return play(load, several, loss)

    def quantiles(self, replicas: int) -> tuple[float, float]:
        """Median and 99th percentile."""
        requests = self.latencies(replicas)
        counted = [one.latency for one in requests[int(WARM_UP * len(requests)) :]]
        p50, p99 = np.quantile(counted, (0.5, 0.99))
        return float(p50), float(p99)

    def fewest(self, limit: float) -> tuple[int, float, float] | None:
        """The fewest replicas that keep the limit, and their p50 and p99; None where no number does."""
        if Fleet(self.gpus, self.mode, self.policy, rate=1e-3).quantiles(1)[1] > limit:  # nobody waits, and still
            return None
        full = math.ceil(self.rate * self._kind.alone[0] / self.gpus)  # about all that work at all times can do
        low, high = full // 2, full
        while self.quantiles(high)[1] > limit:
            low, high = high, math.ceil(1.3 * high)
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            low, high = (low, middle) if self.quantiles(middle)[1] <= limit else (middle, high)
        return high, *self.quantiles(high)

    def row(self, limit: float, gpu_hour: float) -> dict[str, Any]:
        """Of the result file; `replicas` is null where the limit cannot be kept."""
        row = {"kind": "fleet", **vars(self), "limit": limit}
        found = self.fewest(limit)
        if found is None:
            return row | dict.fromkeys(("replicas", "gpus_in_all", "p50", "p99", "dollars_per_1000"))
        replicas, p50, p99 = found
        dollars = gpu_hour * replicas * self.gpus / (3600 * self.rate) * 1000
        return row | {"replicas": replicas, "gpus_in_all": replicas * self.gpus, "p50": round(p50, 3),
                      "p99": round(p99, 3), "dollars_per_1000": round(dollars, 3)}  # fmt: skip


def wanted() -> list[tuple[Fleet, float]]:
    """Rates at one limit, limits at one rate, and processes at both."""
    cells = {(rate, "poisson", USUAL_LIMIT) for rate in RATES} | {(USUAL_RATE, "poisson", one) for one in LIMITS}
    cells |= {(USUAL_RATE, process, USUAL_LIMIT) for process in PROCESSES}
    order = sorted(cells, key=lambda cell: (PROCESSES.index(cell[1]), cell[0], cell[2]))
    return [
        (Fleet(gpus, mode, policy, rate, process), limit)
        for rate, process, limit in order
        for mode in PLAYED
        for policy in POLICIES
        if policy == "elastic" or (process, limit) == ("poisson", USUAL_LIMIT)
        for gpus in GPUS
    ]


def without_a_zone(gpus: int, mode: str, *, spare: bool) -> dict[str, Any]:
    """A third of the replicas is lost: of as many as the limit needs, or of half as many again."""
    fleet = Fleet(gpus, mode, "elastic", USUAL_RATE)
    found = fleet.fewest(USUAL_LIMIT)
    assert found is not None
    replicas = math.ceil(found[0] * (ZONES / (ZONES - 1) if spare else 1) / ZONES) * ZONES
    at = 10.0
    requests = fleet.latencies(replicas, Loss(at, 1 / ZONES))
    after = [one.latency for one in requests if at <= one.arrived < at + AFTER]
    caught = [one for one in requests if one.lost]
    failed = sum(math.isnan(one.latency) for one in requests)
    return {
        "kind": "zone", **vars(fleet), "limit": USUAL_LIMIT, "spare": spare, "replicas": replicas,
        "begun_anew": len(caught), "failed": failed, "p99_after": round(float(np.quantile(after, 0.99)), 3),
    }  # fmt: skip


# --- here ------------------------------------------------------------------------------------------------------------


@contextmanager
def server(model: str, build: Path) -> Iterator[int]:
    """A server of one lane in a process of its own; yields its port."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "runtime.serve", "--model", model, "--build", str(build), "--devices", "cpu@1"]
        process = subprocess.Popen([*command, "--port", "0", "--queue", "500"], stderr=log)
        try:
            yield _port(process, log)
        finally:
            process.terminate()
            process.wait()


def _port(process: subprocess.Popen[bytes], log: Any) -> int:
    while process.poll() is None:
        log.seek(0)
        said = log.read()
        if "http://127.0.0.1:" in said:
            return int(said.partition("http://127.0.0.1:")[2].split()[0].strip("/ ,"))
        time.sleep(0.02)
    raise EngineError(f"the server did not start:\n{said}")


@dataclass
class OpenLoop:
    """Clients that send at given times, whatever came back until then, each request to the less loaded replica."""

    ports: Sequence[int]
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        self.ongoing = dict.fromkeys(self.ports, 0)
        self.lock = Lock()

    def send(self, number: int, at: float, steps: int) -> float:
        """One request; the seconds from when it was to be sent to its answer."""
        time.sleep(max(0.0, at - time.perf_counter()))
        with self.lock:
            port = min(self.ports, key=lambda port: self.ongoing[port])
            self.ongoing[port] += 1
        connection = HTTPConnection("127.0.0.1", port)
        try:
            ask(connection, prompt=self.prompts[number % len(self.prompts)], seed=number, mode="sequential",
                num_inference_steps=steps)  # fmt: skip
            return time.perf_counter() - at
        finally:
            connection.close()
            with self.lock:
                self.ongoing[port] -= 1

    def play(self, times: Sequence[float], steps: Sequence[int]) -> list[float]:
        """The latency of each request."""
        start = time.perf_counter() + 0.1
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(self.send, range(len(times)), [start + at for at in times], steps))


def calls_here(model: str, build: Path) -> Calls:
    """Seconds of a call while another lane is at work as well."""
    pipeline = Pipeline.load(model, "cpu*2", build)
    try:
        pipeline.run(Call(prompts(pipeline.manifest, 1)[0], mode="sequential", num_inference_steps=1))
        return call_seconds(measured_costs(pipeline.backend, ()).calls[2])
    finally:
        pipeline.close()


def validate(model: str, build: Path, count: int) -> list[dict[str, Any]]:
    """Two servers under an open-loop load, beside the simulation of the same arrivals."""
    from engines.store import Bundle

    manifest = Bundle.open(model, build).manifest
    call = calls_here(model, build)
    with ExitStack() as stack:
        ports = [stack.enter_context(server(model, build)) for _ in range(2)]
        clients = OpenLoop(ports, prompts(manifest, 64))
        beside = _beside(clients, call, manifest)
        kinds = {steps: _kind(steps, manifest, call, beside) for steps in STEPS_HERE}
        alone = float(np.mean([kind.alone[0] for kind in kinds.values()]))
        return [_compared(clients, kinds, call, load, 2 * load / alone, count) for load in LOADS_HERE]


def _kind(steps: int, manifest: Any, call: Calls, beside: float) -> Kind:
    scale = manifest.defaults.guidance_scale
    return Kind.of("sequential", Options(k=1), make_schedule(manifest, None, steps), scale, 1, call, beside)


def _beside(clients: OpenLoop, call: Calls, manifest: Any) -> float:
    """What a lone request takes beside its model calls: HTTP, text encoder, decoder, PNG."""
    pace = 2.0 * _kind(STEPS_HERE[0], manifest, call, 0.0).alone[0]
    found = clients.play([pace * n for n in range(24)], [STEPS_HERE[0]] * 24)[8:]
    return max(0.0, float(np.median(found)) - pace / 2)


def _compared(
    clients: OpenLoop, kinds: dict[int, Kind], call: Calls, load: float, rate: float, count: int
) -> dict[str, Any]:
    steps = list(kinds)
    drawn = arrivals("poisson", rate, [kinds[one] for one in steps], count, seed=int(100 * load))
    asked = [next(one for one in steps if kinds[one] is kind) for _, kind in drawn]
    measured = clients.play([at for at, _ in drawn], asked)
    simulated = [one.latency for one in play(drawn, [Replica(1, BATCHED, call) for _ in clients.ports])]
    row: dict[str, Any] = {"kind": "validation", "load": load, "rate": round(rate, 3), "images": count}
    for name, q in (("p50", 0.5), ("p99", 0.99)):
        here, there = float(np.quantile(measured, q)), float(np.quantile(simulated, q))
        row |= {f"{name}_measured": round(here, 4), f"{name}_simulated": round(there, 4),
                f"{name}_error": round(there / here - 1, 4)}  # fmt: skip
    return row


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument("--model", default=EMBEDDED, help="of the validation: an exported model, by name or by folder")
    parser.add_argument("--build", type=Path, default=BUILD, help="folder of the bundles")
    parser.add_argument("--gpu-hour", type=float, default=2.5, help="dollars for a GPU, assumed")
    parser.add_argument("--requests", type=int, default=400, help="of the validation, under each load")
    parser.add_argument("--no-validation", action="store_false", dest="validation", help="simulation only: no model")


def measure(model: str, build: Path, gpu_hour: float, requests: int, *, validation: bool) -> list[dict[str, Any]]:
    """The fleets, the loss of a zone, and the validation."""
    if gpu_hour <= 0 or requests < 100:
        raise ParameterError("requests", "gpu-hour must be positive, and requests at least 100: p99 needs them")
    rows = validate(model, build, requests) if validation else []
    points = {"1": round(ONE_BRANCH, 5), "2": round(TWO_BRANCHES, 5)}
    rows.append({"kind": "table", "name": "SDXL, 1024², H100", "source": SOURCE, "call_seconds": points,
                 "beside_seconds": round(BESIDE, 5), "steps": STEPS, "guidance_scale": GUIDANCE,
                 "dollars_per_gpu_hour": gpu_hour})  # fmt: skip
    rows += [fleet.row(limit, gpu_hour) for fleet, limit in tqdm(wanted(), desc="bench cluster", unit="fleet")]
    zones = [(gpus, mode, spare) for mode in PLAYED for gpus in GPUS[:3] for spare in (False, True)]
    return rows + [without_a_zone(gpus, mode, spare=spare) for gpus, mode, spare in zones]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Fleets, the loss of a zone, and the validation."""
    fleets = [row for row in rows if row["kind"] == "fleet"]
    parts = [_fleets(fleets), _zones([row for row in rows if row["kind"] == "zone"])]
    checked = [row for row in rows if row["kind"] == "validation"]
    return "\n\n".join(parts + ([_validation(checked)] if checked else []))


def _fleets(rows: Sequence[dict[str, Any]]) -> str:
    heads = [f"{gpus} GPU{'s' * (gpus > 1)} each" for gpus in GPUS]
    lines = [f"| arrivals | per second | p99 at most | mode | lanes | {' | '.join(heads)} |", "|---" * 9 + "|"]
    cells: dict[tuple[Any, ...], dict[int, str]] = {}
    for row in rows:
        key = (row["process"], f"{row['rate']:g}", f"{row['limit']:g} s", row["mode"], row["policy"])
        said = "–"
        if row["replicas"] is not None:
            said = f"{row['gpus_in_all']} (${row['dollars_per_1000']:.2f}; {row['p50']:.2f} s, {row['p99']:.2f} s)"
        cells.setdefault(key, {})[row["gpus"]] = said
    lines += [f"| {' | '.join((*key, *(found[gpus] for gpus in GPUS)))} |" for key, found in cells.items()]
    return "\n".join(lines)


def _zones(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| mode | GPUs each | replicas | spare zone | begun anew | failed | p99 in the {AFTER:g} s after |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {row['mode']} | {row['gpus']} | {row['replicas']} | {'yes' if row['spare'] else 'no'} "
        f"| {row['begun_anew']} | {row['failed']} | {row['p99_after']:.2f} s |"
        for row in rows
    ]
    return "\n".join(lines)


def _validation(rows: Sequence[dict[str, Any]]) -> str:
    heads = " | ".join(f"{p} measured | simulated | error" for p in ("p50", "p99"))
    lines = [f"| load | requests per second | images | {heads} |", "|---" * 9 + "|"]
    lines += [
        f"| {100 * row['load']:.0f} % | {row['rate']:.2f} | {row['images']} "
        + " ".join(
            f"| {row[f'{p}_measured']:.3f} s | {row[f'{p}_simulated']:.3f} s | {100 * row[f'{p}_error']:+.1f} %"
            for p in ("p50", "p99")
        )
        + " |"
        for row in rows
    ]
    return "\n".join(lines)
