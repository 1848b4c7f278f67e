"""Scenarios: their arithmetic, their folder as MLPerf's tools read it, and what makes them fail."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command
from bench import scenario
from bench.formats import (
    CSV,
    Outcome,
    Request,
    block,
    early_stopping_estimate,
    overlatency_allowed,
    perf_analyzer,
)
from bench.page.tables import load
from bench.scenario import Load, outside, window
from engines.errors import DeviceError
from engines.store import Bundle

# What LoadGen 6.0's own logs have, of the keys that submission tools look up.
KEYS = {
    "sut_name", "effective_scenario", "effective_test_mode", "effective_samples_per_query", "effective_target_qps",
    "effective_target_latency_ns", "effective_min_duration_ms", "effective_min_query_count",
    "effective_qsl_rng_seed", "effective_sample_index_rng_seed", "effective_schedule_rng_seed",
    "effective_sample_concatenate_permutation", "early_stopping_result", "effective_performance_sample_count",
    "effective_accuracy_sample_count", "result_validity", "result_min_duration_met", "result_min_queries_met",
    "early_stopping_met", "result_query_count", "result_min_latency_ns", "result_max_latency_ns",
    "result_mean_latency_ns", "result_50.00_percentile_latency_ns", "result_90.00_percentile_latency_ns",
    "result_95.00_percentile_latency_ns", "result_97.00_percentile_latency_ns", "result_99.00_percentile_latency_ns",
    "result_99.90_percentile_latency_ns", "num_errors",
}  # fmt: skip
OWN = {
    "SingleStream": {
        "result_qps_with_loadgen_overhead", "result_qps_without_loadgen_overhead", "early_stopping_latency_ss",
    },
    "Server": {"result_scheduled_samples_per_sec", "result_completed_samples_per_sec", "result_perf_constraints_met"},
    "Offline": {"result_samples_per_second"},
}  # fmt: skip


def outcome(latencies: list[float], kind: str = "SingleStream", failed: int = 0, **more: Any) -> Outcome:
    ends = np.cumsum(latencies).tolist()
    requests = [Request(n, 0, end - s, end - s, end) for n, (s, end) in enumerate(zip(latencies, ends, strict=True))]
    requests += [Request(len(requests) + n, 0, 0.0, 0.0, 1.0, "DeviceError: gone") for n in range(failed)]
    given = {"minimum": 1, "min_duration": 0.0, "target_latency": None, "target_qps": None} | more
    return Outcome(kind, requests, **given)


@pytest.mark.parametrize(
    ("percentile", "queries", "allowed"),
    [(0.9, 43, -1), (0.9, 44, 0), (0.9, 63, 0), (0.9, 64, 1), (0.99, 458, -1), (0.99, 459, 0), (0.99, 662, 1)],
)
def test_early_stopping_needs_as_many_queries_as_loadgen(percentile: float, queries: int, allowed: int) -> None:
    """LoadGen's own messages: 64 queries for a 90th percentile, 662 for a 99th, 459 without one over the latency."""
    assert overlatency_allowed(queries, percentile) == allowed


def test_the_early_stopping_estimate_is_conservative(rng: np.random.Generator) -> None:
    assert early_stopping_estimate([1.0] * 63, 0.9) is None
    assert early_stopping_estimate([float(n) for n in range(70)], 0.9) == 69.0, "the largest, as LoadGen says for 70"
    right = [
        (early_stopping_estimate(rng.exponential(1, 300).tolist(), 0.9) or 0) >= -math.log(0.1) for _ in range(200)
    ]
    assert np.mean(right) > 0.96


def test_latencies_and_rates() -> None:
    found = outcome([0.1] * 90 + [0.5] * 10)
    assert found.metric == ("90.0th percentile latency (ns)", 500_000_000.0) and found.valid
    assert found.per_second == pytest.approx(100 / 14)
    assert outcome([0.1] * 10, "Offline").metric[1] == pytest.approx(10.0)
    late = outcome([0.1] * 400 + [9.0] * 10, "Server", target_latency=1.0)
    assert not late.met["performance"] and not late.met["early_stopping"] and not late.valid
    assert outcome([0.1] * 500, "Server", target_latency=1.0).valid
    assert not outcome([0.1] * 100, minimum=101).valid and not outcome([0.1] * 100, min_duration=60.0).valid
    assert not outcome([0.1] * 100, failed=1).valid


@pytest.mark.parametrize("kind", OWN)
def test_the_detail_log_has_the_keys_that_tools_look_up(kind: str) -> None:
    found = outcome([0.1] * 70, kind, failed=1, target_latency=1.0 if kind == "Server" else None)
    parameters = {"samples_per_query": 1, "target_qps": 0, "target_latency (ns)": 0, "min_duration (ms)": 0,
                  "min_query_count": 1, "qsl_rng_seed": 1, "sample_index_rng_seed": 1,
                  "sample_concatenate_permutation": False, "schedule_rng_seed": 1,
                  "performance_sample_count": 1, "accuracy_sample_count": 1}  # fmt: skip
    lines = found.detail("me", parameters).splitlines()
    assert all(line.startswith(":::MLLOG {") for line in lines)
    records = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]
    values = {record["key"]: record["value"] for record in records}
    assert set(values) >= KEYS | OWN[kind] and values["result_validity"] == "INVALID"
    assert {"key", "value", "time_ms", "namespace", "event_type", "metadata"} == set(records[0])
    assert [r["key"] for r in records if r["metadata"]["is_error"]] == ["error_runtime"]
    summary = found.summary("me", parameters)
    assert "Result is : INVALID" in summary and f"Scenario : {kind}" in summary and "UNOFFICIAL" in summary


def test_load_is_sent_as_the_scenario_says() -> None:
    batches: list[list[int]] = []

    def draw(wanted: Any) -> list[int]:
        batches.append(list(wanted))
        if len(batches) == 3:
            raise DeviceError("the lane broke")
        return list(wanted)

    load = Load(draw, [2, 0, 1], 5, 0.0)
    load.single_stream()
    assert (
        batches == [[2], [0], [1], [2], [0]]
        and [r.error is None for r in load.requests] == [True] * 2 + [False] + [True] * 2
    )
    assert "the lane broke" in (load.requests[2].error or "")
    batches.clear()
    load = Load(draw, [0, 1, 2], 8, 0.0)
    load.offline(3)
    assert [len(batch) for batch in batches] == [3, 3, 2] and all(r.scheduled == 0 for r in load.requests)
    assert sum(r.error is not None for r in load.requests) == 2, "a call that fails fails all its images"
    batches.clear()
    load = Load(draw, [0], 30, 0.0)
    load.server(10_000.0)
    gaps = np.diff([r.scheduled for r in load.requests])
    assert len(load.requests) == 30 and (gaps > 0).all() and 3e-5 < gaps.mean() < 3e-4
    assert all(r.issued >= r.scheduled and r.latency > 0 for r in load.requests)


def test_blocks_windows_and_the_csv() -> None:
    found = block([1.0, 2.0, 3.0, 4.0], "ms")
    assert (found["avg"], found["p50"], found["count"], found["sum"], found["unit"]) == (2.5, 2.5, 4, 10.0, "ms")
    assert outside({"psnr": 20.0, "fid": None}, [("psnr", 30.0, math.inf), ("fid", 23.0, 24.0), ("psnr", 0, 50)]) == [
        "psnr is 20, not within 30 and inf", "fid was not measured, and must be within 23 and 24",
    ]  # fmt: skip
    assert window("psnr:30:") == ("psnr", 30.0, math.inf)
    with pytest.raises(Exception, match="NAME:LOW:HIGH"):
        window("psnr")
    row = perf_analyzer(outcome([0.1] * 10), {"text": [0.001], "denoise": [0.09], "decode": [0.002]})
    assert len(row) == len(CSV) and dict(zip(CSV, row, strict=True))["Server Compute Infer"] == 90_000


def test_the_table_is_in_words() -> None:
    rows = load("scenario")["rows"]
    shown, keys = scenario.table(rows), {key for row in rows for key in row["quality"]}
    assert not any("_" in word for word in shown.split()) and keys <= set(scenario.WORDS)
    assert "MLPerf's 90th percentile" in shown and "98 % of the sequential share or more; PSNR 30.0 dB or more" in shown
    unmet = outcome([9.0] * 10, "Server", target_latency=1.0, minimum=11, min_duration=1e3).met
    assert [f"{name} not met" for name, met in unmet.items() if not met] == list(scenario.UNMET)


def test_sdxl_is_asked_as_mlperf_asks() -> None:
    setting = scenario.DEFAULTS["StableDiffusionXLPipeline"]
    assert (setting.scheduler, setting.num_inference_steps, setting.guidance_scale) == ("euler", 20, 8.0)
    assert setting.negative_prompt.startswith("normal quality") and setting.benchmark == "stable-diffusion-xl"
    assert [name for name, *_ in setting.judged] == ["CLIP_SCORE", "FID_SCORE"]


def test_a_short_run_lays_out_its_folder(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, output = tmp_path / "scenario.json", tmp_path / "out"
    latents = tmp_path / "latents.npy"
    np.save(latents, np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32))
    arguments = ["scenario", *scenario.SCENARIOS, "--steps", "3", "--samples", "3", "--min-queries", "4"]
    arguments += ["--mode", "sequential", "--batch", "2", "--latents", str(latents), "--output", str(output)]
    arguments += ["--json", str(target), "--window", "psnr:90:"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert command.main() == 0 and "SingleStream" in capsys.readouterr().out
    result = json.loads(target.read_text())
    assert result["schema_version"] == 2 and [row["scenario"] for row in result["rows"]] == list(OWN)
    for row in result["rows"]:
        assert row["unofficial"] and row["queries"] >= 4 and row["failed"] == 0 and row["status"] == "passed"
        assert row["quality"]["psnr"] == 99.0 and row["metrics"]["request_latency"]["count"] == row["queries"]
        (here,) = (output / "open" / "unofficial" / "results").glob(f"*/shapes/{row['scenario']}")
        names = {str(path.relative_to(here)) for path in here.rglob("*") if path.is_file()}
        run = "performance/run_1"
        assert names == {
            "measurements.json", "user.conf", "accuracy/accuracy.txt", "accuracy/mlperf_log_accuracy.json",
            "accuracy/mlperf_log_summary.txt", "accuracy/mlperf_log_detail.txt", f"{run}/mlperf_log_accuracy.json",
            f"{run}/mlperf_log_summary.txt", f"{run}/mlperf_log_detail.txt",
        }  # fmt: skip
        images = json.loads((here / "accuracy" / "mlperf_log_accuracy.json").read_text())
        assert len(images) == 3 and len(bytes.fromhex(images[0]["data"])) == 64 * 64 * 3
        assert (here / "accuracy" / "accuracy.txt").read_text().startswith("Accuracy Results: {")
        beside = output / row["scenario"]
        with (beside / "perf_analyzer.csv").open() as file:
            assert next(iter(csv.DictReader(file)))["Concurrency"] == "1"
        assert json.loads((beside / "profile_export_aiperf.json").read_text())["schema_version"] == "1.5"
        assert len((beside / "requests.jsonl").read_text().splitlines()) == row["queries"]
    (system,) = (output / "open" / "unofficial" / "systems").iterdir()
    assert json.loads(system.read_text())["division"] == "open"


def test_quality_out_of_the_window_and_bad_input_end_with_an_error(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["bench", "scenario", "single-stream", "--steps", "3", "--samples", "1", "--min-queries", "1", "--output",
            str(tmp_path)]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*base, "--mode", "sequential", "--window", "psnr:100:"])
    assert command.main() == 1 and "psnr is 99, not within 100 and inf" in capsys.readouterr().out
    bad = tmp_path / "bad.npy"
    np.save(bad, np.zeros((1, 2, 3)))
    for more, message in (
        (["--latents", str(bad)], "must hold an array of shape (1, 4, 16, 16)"), (["--qps", "-1"], "positive number"),
        (["--samples", "0"], "samples must be at least 1"), (["--model", "missing"], "no exported model"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", [*base, *more])
        assert command.main() == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("kind", scenario.SCENARIOS)
def test_a_request_that_failed_makes_the_exit_code_1(
    kind: str, shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, calls = scenario.Bench.draw, itertools.count(1)

    def breaking(bench: scenario.Bench, wanted: Any, **other: Any) -> Any:
        if next(calls) == 4:  # the first behind the warm-up
            raise DeviceError("the lane broke")
        return draw(bench, wanted, **other)

    monkeypatch.setattr(scenario.Bench, "draw", breaking)
    target = tmp_path / "scenario.json"
    arguments = ["scenario", kind, "--steps", "3", "--samples", "2", "--min-queries", "4", "--mode", "sequential"]
    arguments += ["--batch", "2", "--output", str(tmp_path), "--json", str(target)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert command.main() == 1
    lost = 2 if kind == "offline" else 1
    shown = capsys.readouterr().out
    assert "| failed, not valid: " in shown and "failed: DeviceError: the lane broke |" in shown
    (row,) = json.loads(target.read_text())["rows"]
    assert (row["status"], row["failed"], row["valid"], row["queries"]) == ("failed", lost, False, 4)
