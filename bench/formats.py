"""A scenario's results in the formats of other tools: MLPerf's logs and folders, AIPerf, perf_analyzer.

Modelled on what LoadGen 6.0 writes and on what its submission checker looks up. Unofficial: MLPerf is a trademark of
MLCommons, which has verified nothing of this.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.models import lane_names
from runtime.pipeline import Pipeline
from runtime.provenance import result_file

CONFIDENCE = 0.99  # of early stopping
PERCENTILES = (50, 90, 95, 97, 99, 99.9)


@dataclass(frozen=True)
class Request:
    """One requested image; times in seconds since the start."""

    number: int
    prompt: int
    scheduled: float
    issued: float
    completed: float
    error: str | None = None

    @property
    def latency(self) -> float:
        """From the scheduled time to the answer."""
        return self.completed - self.scheduled


def overlatency_allowed(queries: int, percentile: float) -> int:
    """LoadGen's early stopping: how many queries may exceed the percentile at 99 % confidence; −1 for too few queries.

    The largest t for which P(at most t of n exceed it) is no more than 1 % when each does with probability 1 − p.
    """
    from scipy.stats import binom

    allowed = -1
    while allowed < queries and binom.cdf(allowed + 1, queries, 1 - percentile) <= 1 - CONFIDENCE:
        allowed += 1
    return allowed


def early_stopping_estimate(latencies: Sequence[float], percentile: float) -> float | None:
    """The latency that the percentile is below with 99 % confidence; None with too few queries."""
    allowed = overlatency_allowed(len(latencies), percentile)
    return sorted(latencies)[len(latencies) - allowed] if allowed >= 1 else None


@dataclass
class Outcome:
    """The requests of a scenario, its metric and its validity."""

    scenario: str
    requests: list[Request]
    minimum: int
    min_duration: float
    target_latency: float | None
    target_qps: float | None

    def __post_init__(self) -> None:
        self.good = [r for r in self.requests if r.error is None]
        self.failed = [r for r in self.requests if r.error is not None]
        self.seconds = max(r.completed for r in self.requests)
        self.latencies = [r.latency for r in self.good] or [math.inf]
        self.met = {
            "duration": self.seconds >= self.min_duration,
            "queries": len(self.good) >= self.minimum,
            "performance": self.target_latency is None or self._percentile(99) <= self.target_latency,
            "early_stopping": self._early_stopping() != "",
        }

    def _percentile(self, q: float) -> float:
        return sorted(self.latencies)[min(int(len(self.latencies) * q / 100), len(self.latencies) - 1)]

    def _early_stopping(self) -> str:
        """The early-stopping result; empty with too few queries."""
        if self.scenario == "SingleStream":
            estimate = early_stopping_estimate(self.latencies, 0.9)
            return "" if estimate is None else f"{estimate * 1e9:.0f}"
        if self.scenario == "Server" and self.target_latency is not None:
            over = sum(latency > self.target_latency for latency in self.latencies)
            return "met" if over <= overlatency_allowed(len(self.latencies), 0.99) else ""
        return "met"

    @property
    def per_second(self) -> float:
        return len(self.good) / self.seconds

    @property
    def metric(self) -> tuple[str, float]:
        """Name and value of the scenario's metric."""
        if self.scenario == "SingleStream":
            return "90.0th percentile latency (ns)", round(self._percentile(90) * 1e9)
        if self.scenario == "Server":
            return "Completed samples per second", self.per_second
        return "Samples per second", self.per_second

    @property
    def valid(self) -> bool:
        """Whether all conditions of this (short) run are met and no request failed."""
        return all(self.met.values()) and not self.failed

    def summary(self, name: str, parameters: dict[str, Any]) -> str:
        """mlperf_log_summary.txt."""
        key, value = self.metric
        rule = "=" * 48
        shown = f"{value:.0f}" if key.endswith("(ns)") else f"{value:.3f}"
        lines = [rule, "MLPerf Results Summary", rule, f"SUT name : {name}", f"Scenario : {self.scenario}",
                 "Mode     : PerformanceOnly", f"{key} : {shown}",
                 f"Result is : {'VALID' if self.valid else 'INVALID'}"]  # fmt: skip
        words = {True: "Yes", False: "NO"}
        if self.target_latency is not None:
            lines.append(f"  Performance constraints satisfied : {words[self.met['performance']]}")
        lines += [f"  Min duration satisfied : {words[self.met['duration']]}",
                  f"  Min queries satisfied : {words[self.met['queries']]}",
                  f"  Early stopping satisfied: {words[self.met['early_stopping']]}", "",
                  "UNOFFICIAL: measured by `python -m bench scenario`, not by LoadGen, and not verified by MLCommons.",
                  "", rule, "Additional Stats", rule]  # fmt: skip
        lines += [f"{what:<32}: {value}" for what, value in self._stats().items()]
        lines += ["", rule, "Test Parameters Used", rule, *(f"{k} : {v}" for k, v in parameters.items()), ""]
        errors = f"{len(self.failed)} ERRORS encountered." if self.failed else "No errors encountered during test."
        return "\n".join([*lines, "No warnings encountered during test.", "", errors, ""])

    def _stats(self) -> dict[str, Any]:
        nanoseconds = {"Min": min(self.latencies), "Max": max(self.latencies), "Mean": float(np.mean(self.latencies))}
        stats = {f"{name} latency (ns)": f"{seconds * 1e9:.0f}" for name, seconds in nanoseconds.items()}
        return stats | {f"{q:.2f} percentile latency (ns)": f"{self._percentile(q) * 1e9:.0f}" for q in PERCENTILES}

    def detail(self, name: str, parameters: dict[str, Any]) -> str:
        """mlperf_log_detail.txt: one record per line, with the keys that submission tools look up."""
        stopped = self._early_stopping()
        found: dict[str, Any] = {
            "loadgen_version": "none: python -m bench scenario, unofficial", "sut_name": name,
            "requested_scenario": self.scenario, "effective_scenario": self.scenario,
            "effective_test_mode": "PerformanceOnly",
            **{f"effective_{key.replace(' (ms)', '_ms').replace(' (ns)', '_ns')}": v for key, v in parameters.items()},
            "result_validity": "VALID" if self.valid else "INVALID",
            "result_min_duration_met": self.met["duration"],
            "result_min_queries_met": self.met["queries"], "early_stopping_met": self.met["early_stopping"],
            "early_stopping_result": stopped or f"not met by {len(self.requests)} queries: too few, or too many late",
            "result_query_count": 1 if self.scenario == "Offline" else len(self.requests),
        }  # fmt: skip
        if self.scenario == "SingleStream":
            found["result_qps_with_loadgen_overhead"] = self.per_second
            found["result_qps_without_loadgen_overhead"] = 1 / float(np.mean(self.latencies))
            found["early_stopping_latency_ss"] = int(stopped) if stopped else 0
        elif self.scenario == "Server":
            found["result_perf_constraints_met"] = self.met["performance"]
            spread = max(max(r.scheduled for r in self.requests), 1e-9)
            found["result_scheduled_samples_per_sec"] = (len(self.requests) - 1) / spread
            found["result_completed_samples_per_sec"] = self.per_second
        else:
            found["result_samples_per_second"] = self.per_second
        for key, value in self._stats().items():
            words = key.lower().replace(" (ns)", "_ns").replace(" ", "_")
            found[f"result_{words}"] = int(float(value)) if math.isfinite(float(value)) else None
        found["num_errors"] = len(self.failed)
        return "".join([*map(self._line, found, found.values()), *self._error_lines()])

    def accuracy_detail(self, name: str) -> str:
        """mlperf_log_detail.txt of the accuracy run, in which nothing is timed."""
        found = {"sut_name": name, "effective_scenario": self.scenario, "effective_test_mode": "AccuracyOnly"}
        return "".join(map(self._line, [*found, "num_errors"], [*found.values(), 0]))

    def _error_lines(self) -> list[str]:
        return [self._line("error_runtime", request.error, is_error=True) for request in self.failed]

    def _line(self, key: str, value: Any, *, is_error: bool = False) -> str:
        where = {"file": "bench/scenario.py", "line_no": 0, "pid": os.getpid(), "tid": os.getpid()}
        line = {"key": key, "value": value, "time_ms": round(self.seconds * 1e3, 6), "namespace": "mlperf::logging",
                "event_type": "POINT_IN_TIME",
                "metadata": {"is_error": is_error, "is_warning": False, **where}}  # fmt: skip
        return f":::MLLOG {json.dumps(line)}\n"


def block(values: Sequence[float], unit: str) -> dict[str, Any]:
    """A metric as AIPerf writes it."""
    array = np.asarray(values, np.float64)
    found = {"unit": unit, "avg": float(array.mean()), "min": float(array.min()), "max": float(array.max())}
    found |= {f"p{q}": float(np.percentile(array, q)) for q in (1, 5, 10, 25, 50, 75, 90, 95, 99)}
    return found | {"std": float(array.std()), "count": len(array), "sum": float(array.sum())}


def aiperf(outcome: Outcome, config: dict[str, Any], stages: dict[str, list[float]]) -> dict[str, Any]:
    """profile_export_aiperf.json: its schema 1.5's blocks, with this engine's stages as further metrics."""

    def one(value: float, unit: str) -> dict[str, Any]:
        return {"unit": unit, "avg": value}

    errors: dict[str, int] = {}
    for request in outcome.failed:
        errors[request.error or ""] = errors.get(request.error or "", 0) + 1
    found: dict[str, Any] = {"schema_version": "1.5", "input_config": config, "was_cancelled": False}
    if outcome.good:
        found["request_latency"] = block([1e3 * r.latency for r in outcome.good], "ms")
        found["queue_time"] = block([1e3 * (r.issued - r.scheduled) for r in outcome.good], "ms")
    found |= {
        "request_throughput": one(outcome.per_second, "requests/sec"),
        "request_count": one(float(len(outcome.good)), "requests"),
        "error_request_count": one(float(len(outcome.failed)), "requests"),
        "benchmark_duration": one(outcome.seconds, "sec"),
    }
    found |= {f"stage_{name}": block([1e3 * s for s in several], "ms") for name, several in stages.items() if several}
    found["error_summary"] = [{"error_details": {"message": text}, "count": n} for text, n in errors.items()]
    return found


CSV = ("Concurrency", "Inferences/Second", "Client Send", "Network+Server Send/Recv", "Server Queue",
       "Server Compute Input", "Server Compute Infer", "Server Compute Output", "Client Recv", "p50 latency",
       "p90 latency", "p95 latency", "p99 latency")  # fmt: skip


def perf_analyzer(outcome: Outcome, stages: dict[str, list[float]]) -> list[Any]:
    """The one line of perf_analyzer's CSV, microseconds: without a network; text is input, decoding output."""
    queue = float(np.mean([r.issued - r.scheduled for r in outcome.good] or [0.0]))
    compute = [float(np.mean(stages.get(name) or [0.0])) for name in ("text", "denoise", "decode")]
    tail = [outcome._percentile(q) for q in (50, 90, 95, 99)]
    microseconds = [0.0, 0.0, queue, *compute, 0.0, *tail]
    return [1, f"{outcome.per_second:.6g}", *(round(s * 1e6) if math.isfinite(s) else "" for s in microseconds)]


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """The output folder of a scenario: MLPerf's layout, and a folder with the files of other tools."""

    root: Path
    benchmark: str
    scenario: str

    def write(
        self, pipeline: Pipeline, outcome: Outcome, row: dict[str, Any], images: Sequence[Image.Image],
        stages: dict[str, list[float]], seed: int,
    ) -> None:  # fmt: skip
        """Everything; `images` are those of the accuracy run in the order of their prompts."""
        frame = result_file([row])
        system = lane_names(pipeline).replace("/", "-").replace(",", "_").replace(":", "")
        here = self.root / "open" / "unofficial" / "results" / system / self.benchmark / self.scenario
        name = f"driffusion-engine {frame['commit']}, {lane_names(pipeline)}, mode {row['config']['mode']}"
        parameters = {
            "samples_per_query": len(outcome.requests) if self.scenario == "Offline" else 1,
            "target_qps": outcome.target_qps or 0, "target_latency (ns)": int((outcome.target_latency or 0) * 1e9),
            "min_duration (ms)": int(outcome.min_duration * 1e3), "min_query_count": outcome.minimum,
            "qsl_rng_seed": seed, "sample_index_rng_seed": seed, "schedule_rng_seed": seed,
            "sample_concatenate_permutation": False,
            "target_latency_percentile": 0.99 if outcome.target_latency else 0.9,
            "performance_sample_count": len(images),
            "accuracy_sample_count": len(images),
        }  # fmt: skip
        self._performance(here / "performance" / "run_1", outcome, name, parameters)
        self._accuracy(here / "accuracy", outcome, name, images, row["quality"])
        precision = pipeline.manifest.precision
        _json(here / "measurements.json", {
            "input_data_types": precision, "weight_data_types": precision, "retraining": "N",
            "starting_weights_filename": pipeline.manifest.origin,
            "weight_transformations": "exported to ONNX, compiled for this machine",
        })  # fmt: skip
        seconds = outcome.target_latency or 0
        (here / "user.conf").write_text(
            f"{self.benchmark}.{self.scenario}.min_query_count = {outcome.minimum}\n"
            f"{self.benchmark}.{self.scenario}.min_duration = {int(outcome.min_duration * 1e3)}\n"
            f"{self.benchmark}.{self.scenario}.target_qps = {outcome.target_qps or 0}\n"
            f"{self.benchmark}.{self.scenario}.target_latency = {int(seconds * 1e3)}\n"
        )
        self._system(system, pipeline, frame)
        self._other_tools(outcome, row["metrics"], stages)

    def _performance(self, folder: Path, outcome: Outcome, name: str, parameters: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mlperf_log_summary.txt").write_text(outcome.summary(name, parameters))
        (folder / "mlperf_log_detail.txt").write_text(outcome.detail(name, parameters))
        (folder / "mlperf_log_accuracy.json").write_text("[]\n")

    def _accuracy(
        self, folder: Path, outcome: Outcome, name: str, images: Sequence[Image.Image], quality: dict[str, Any]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"seq_id": n, "qsl_idx": n, "data": np.asarray(image).tobytes().hex()})
            for n, image in enumerate(images)
        ]
        (folder / "mlperf_log_accuracy.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
        (folder / "mlperf_log_summary.txt").write_text(
            "\nNo warnings encountered during test.\n\nNo errors encountered during test.\n"
        )
        (folder / "mlperf_log_detail.txt").write_text(outcome.accuracy_detail(name))
        scores = {key: f"{value:.6g}" for key, value in quality.items() if value is not None}
        (folder / "accuracy.txt").write_text(f"Accuracy Results: {scores}\n")

    def _system(self, system: str, pipeline: Pipeline, frame: dict[str, Any]) -> None:
        host = frame["host"]
        gpus = [lane for lane in pipeline.devices if lane.gpu is not None]
        _json(self.root / "open" / "unofficial" / "systems" / f"{system}.json", {
            "division": "open", "submitter": "unofficial", "status": "available", "system_name": system,
            "system_type": "edge", "number_of_nodes": 1, "host_processors_per_node": 1,
            "host_processor_model_name": host["processor"], "host_processor_core_count": host["cores"],
            "accelerators_per_node": len({lane.device for lane in gpus}),
            "accelerator_model_name": ", ".join(host["gpus"]) or "none", "operating_system": host["system"],
            "framework": ", ".join(f"{key} {value}" for key, value in frame["versions"].items()),
            "sw_notes": "unofficial, not verified by MLCommons",
        })  # fmt: skip

    def _other_tools(self, outcome: Outcome, metrics: dict[str, Any], stages: dict[str, list[float]]) -> None:
        beside = self.root / self.scenario
        beside.mkdir(parents=True, exist_ok=True)
        _json(beside / "profile_export_aiperf.json", metrics)
        records = [json.dumps(asdict(request) | {"latency": request.latency}) for request in outcome.requests]
        (beside / "requests.jsonl").write_text("\n".join(records) + "\n")
        with (beside / "perf_analyzer.csv").open("w", newline="") as file:
            csv.writer(file).writerows([CSV, perf_analyzer(outcome, stages)])


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
