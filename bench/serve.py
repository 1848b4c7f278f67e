"""`python -m bench serve`: the server under load: shared model calls against divided lanes.

Closed-loop HTTP clients: each sends its next request, of another mode and number of steps, when it has the last image.
The policies (batched: calls shared by requests; elastic, all lanes per image, one lane per image) take turns within one
server, so that other load affects them alike. Also measured: the latency that HTTP adds to a call in the same process.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.models import model_arguments
from bench.statistics import bootstrap, ratio
from bench.statistics import interval as ratio_of
from engines.errors import EngineError, ParameterError
from runtime.lane_policy import ALL_LANES, BATCHED, ELASTIC, ONE_LANE
from runtime.pipeline import Pipeline
from runtime.provenance import load_average
from runtime.serve.__main__ import listen
from runtime.serve.limits import Limits
from runtime.serve.service import Service

OURS = "batched"
POLICIES = {OURS: BATCHED, "elastic": ELASTIC, "all lanes": ALL_LANES, "one lane": ONE_LANE}
MODES = ("sequential", "conservative", "aggressive")
STEPS = (0.5, 1.0, 1.5, 1.0)  # of the usual number, in turns


@dataclass
class Load:
    """One policy under one number of clients; one entry per turn in the first three."""

    throughput: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)  # p95
    latencies: list[float] = field(default_factory=list)
    lanes: list[float] = field(default_factory=list)

    def add(self, ends: Sequence[float], latencies: Sequence[float], lanes: Sequence[float]) -> None:
        """One turn: images per second between its first and its last answer; of a single one, by its own time."""
        ordered = sorted(ends)
        single = len(ordered) == 1
        self.throughput.append(1 / latencies[0] if single else (len(ordered) - 1) / (ordered[-1] - ordered[0]))
        self.medians.append(float(np.median(latencies)))
        self.tails.append(float(np.quantile(latencies, 0.95)))
        self.latencies += latencies
        self.lanes += lanes

    def row(self, clients: int, policy: str) -> dict[str, Any]:
        """Of the result file."""
        rate, (low, high) = float(np.median(self.throughput)), _spread(self.throughput)
        p50, p95 = np.quantile(self.latencies, (0.5, 0.95))
        return {
            "name": "load", "clients": clients, "policy": policy, "images": len(self.latencies),
            "images_per_second": {"median": round(rate, 3), "low": round(low, 3), "high": round(high, 3)},
            "latency_seconds": {"p50": round(float(p50), 4), "p95": round(float(p95), 4)},
            "lanes_per_round": round(float(np.mean(self.lanes)), 3),
        }  # fmt: skip


@contextmanager
def serving(pipeline: Pipeline) -> Iterator[int]:
    """The server in a thread of this process; yields its port."""
    with listen("127.0.0.1", 0) as listener:
        from runtime.serve.openai.server import Server

        server = Server(Service(pipeline, Limits()))
        thread = threading.Thread(target=server.run, args=([listener],), name="server")
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


def ask(connection: http.client.HTTPConnection, **body: Any) -> dict[str, Any]:
    """One image's report; EngineError when there is none."""
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = json.loads(response.read())
    if response.status != 200:
        raise EngineError(f"a request failed with {response.status}: {content}")
    report: dict[str, Any] = content["report"]
    return report


def turn(port: int, clients: int, seconds: float, prompts: Sequence[str], steps: int, load: Load) -> None:
    """Closed-loop clients for some seconds."""
    begun, ends, latencies, lanes = time.perf_counter(), list[float](), list[float](), list[float]()

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        asked, end = number, begun
        while end - begun < seconds:
            start = time.perf_counter()
            report = ask(
                connection, prompt=prompts[asked % len(prompts)], seed=asked, mode=MODES[asked % len(MODES)],
                num_inference_steps=max(1, round(steps * STEPS[asked % len(STEPS)])),
            )  # fmt: skip
            end = time.perf_counter()
            ends.append(end)
            latencies.append(end - start)
            lanes.append(report["lanes_per_round"])
            asked += clients
        connection.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    load.add(ends, latencies, lanes)


def overhead(pipeline: Pipeline, port: int, pairs: int, steps: int = 4) -> dict[str, Any]:
    """The same image by a call and over HTTP, in turns: milliseconds that HTTP, PNG, base64 and JSON add.

    They do not depend on the number of steps, and of few steps the time varies less.
    """
    connection, added = http.client.HTTPConnection("127.0.0.1", port), []
    prompt = pipeline.manifest.examples[0]
    for number in range(pairs):
        seconds = {}
        for way in ("call", "http") if number % 2 else ("http", "call"):
            start = time.perf_counter()
            if way == "call":
                pipeline.generate(prompt, mode="sequential", num_inference_steps=steps, seed=number)
            else:
                ask(connection, prompt=prompt, mode="sequential", num_inference_steps=steps, seed=number)
            seconds[way] = time.perf_counter() - start
        added.append((seconds["http"] - seconds["call"]) * 1e3)
    connection.close()
    p50, p95 = np.quantile(added, (0.5, 0.95))
    low, high = _spread(added)
    return {
        "name": "overhead", "pairs": pairs, "steps": steps,
        "milliseconds": {"p50": round(float(p50), 2), "low": round(low, 2), "high": round(high, 2),
                         "p95": round(float(p95), 2)},
    }  # fmt: skip


def time_to_ready(model: str, build: Path, devices: str, times: int) -> dict[str, Any]:
    """`python -m runtime.serve` from nothing to its first `/health/ready`: seconds, and those of the processor."""
    seconds, computing = list[float](), list[float]()
    for _ in range(times):
        with listen("127.0.0.1", 0) as listener:
            port = int(listener.getsockname()[1])
        command = [sys.executable, "-m", "runtime.serve", "--model", model, "--build", build, "--devices", devices]
        before, start = os.times(), time.perf_counter()
        with subprocess.Popen([*map(str, command), "--port", str(port)], stderr=subprocess.DEVNULL) as process:
            try:
                while not answers(port):
                    if process.poll() is not None:
                        raise EngineError(
                            f"the server ended as it started: try python -m runtime.serve --model {model}"
                        )
                    time.sleep(0.005)
                seconds.append(time.perf_counter() - start)
            finally:
                process.terminate()
        after = os.times()
        computing.append(after.children_user + after.children_system - before.children_user - before.children_system)
    low, high = _spread(seconds)
    return {
        "name": "start", "times": times, "cpu_seconds": round(float(np.median(computing)), 2),
        "seconds": {"p50": round(float(np.median(seconds)), 2), "low": round(low, 2), "high": round(high, 2)},
    }  # fmt: skip


def answers(port: int) -> bool:
    """Whether a server is ready there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def compared(clients: int, loads: dict[str, Load]) -> dict[str, Any]:
    """Shared calls beside the best of the other policies at this load, turn by turn."""
    ours, others = loads[OURS], [name for name in loads if name != OURS]
    faster = max(others, key=lambda name: float(np.median(loads[name].throughput)))
    sooner = min(others, key=lambda name: float(np.median(loads[name].medians)))
    steadier = min(others, key=lambda name: float(np.median(loads[name].tails)))
    return {
        "name": f"{OURS} against the better", "clients": clients, "better_throughput": faster,
        "throughput": ratio(ours.throughput, loads[faster].throughput), "better_latency": sooner,
        "latency_p50": ratio(ours.medians, loads[sooner].medians), "better_latency_p95": steadier,
        "latency_p95": ratio(ours.tails, loads[steadier].tails),
    }  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="that wait for images at once")
    parser.add_argument("--turns", type=int, default=8, help="of every policy under every load")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn; images then begun are finished")
    parser.add_argument("--steps", type=int, default=20, help="on average")
    parser.add_argument("--pairs", type=int, default=60, help="of calls with and without HTTP")
    parser.add_argument("--starts", type=int, default=5, help="of the server, until it is ready")


def measure(
    model: str,
    build: Path,
    devices: str,
    clients: Sequence[int],
    turns: int,
    seconds: float,
    steps: int,
    pairs: int,
    starts: int,
) -> list[dict[str, Any]]:
    """Measures and returns the rows of the result file."""
    if min(turns, pairs, steps, starts, *clients) < 1 or seconds <= 0:
        raise ParameterError("clients", "clients, turns, seconds, steps, pairs and starts must be positive")
    started = time_to_ready(model, build, devices, starts)
    pipeline = Pipeline.load(model, devices, build)
    prompts = pipeline.manifest.examples or ("",)
    loads = {number: {policy: Load() for policy in POLICIES} for number in clients}
    order, averages = np.random.default_rng(0), []
    try:
        with serving(pipeline) as port:
            turn(port, max(clients), 1.0, prompts, steps, Load())  # warms up
            added = overhead(pipeline, port, pairs)
            with tqdm(total=turns * len(clients) * len(POLICIES), desc="bench serve", unit="turn") as bar:
                for _ in range(turns):
                    for number in clients:
                        for policy in order.permutation(list(POLICIES)):
                            pipeline.lanes.policy = POLICIES[policy]
                            turn(port, number, seconds, prompts, steps, loads[number][policy])
                            bar.update()
                    averages.append(load_average())
    finally:
        pipeline.close()
    rows = [load.row(number, policy) for number, several in loads.items() for policy, load in several.items()]
    rows += [compared(number, several) for number, several in loads.items()]
    shared = {"model": model, "devices": devices, "steps": steps, "load_average": round(float(np.median(averages)), 2)}
    return [row | shared for row in [*rows, added, started]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: the loads, and what HTTP adds."""
    # of results of earlier commits, elastic was ours
    ours = next(row["name"].partition(" against")[0] for row in rows if "against the better" in row["name"])
    head = f"| clients | | images per second | seconds p50 | seconds p95 | lanes per round | {ours} × the better |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    against = {row["clients"]: row for row in rows if row["name"] == f"{ours} against the better"}
    for row in (row for row in rows if row["name"] == "load"):
        rate, latency, told = row["images_per_second"], row["latency_seconds"], ""
        if row["policy"] == ours:
            beside = against[row["clients"]]
            names = {"throughput": "throughput", "p50": "latency_p50", "p95": "latency_p95"}
            # results of earlier commits have no p95
            told = ", ".join(f"{name} {ratio_of(beside[key])}" for name, key in names.items() if key in beside)
        lines.append(
            f"| {row['clients']} | {row['policy']} | {rate['median']:.2f} ({rate['low']:.2f}–{rate['high']:.2f}) "
            f"| {latency['p50']:.3f} | {latency['p95']:.3f} | {row['lanes_per_round']:.2f} | {told} |"
        )
    (added,) = (row["milliseconds"] for row in rows if row["name"] == "overhead")
    more = f"{added['p50']:.1f} ms at the median ({added['low']:.1f}–{added['high']:.1f}), {added['p95']:.1f} ms at p95"
    lines += ["", f"HTTP adds to a call in the same process: {more}."]
    for row in (row for row in rows if row["name"] == "start"):  # results of earlier commits have none
        ready = (
            f"{row['seconds']['p50']:.2f} s after its start ({row['seconds']['low']:.2f}–{row['seconds']['high']:.2f})"
        )
        lines += ["", f"The server is ready {ready}, of which the processor computes {row['cpu_seconds']:.2f} s."]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    found = bootstrap(values)
    return found["low"], found["high"]
