"""What the server counts."""

from __future__ import annotations

import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from runtime.pipeline import Pipeline
from runtime.serve.access import Access
from tests.client import GENERATE, PROMPT, ask, serving, values


def test_metrics(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        ask(client, mode="aggressive", k=2, num_inference_steps=9)
        client.post(GENERATE, json={"prompt": PROMPT, "mode": "magic"})
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['driffusion_requests_total{outcome="200"}'] == "1.0"
    assert values['driffusion_requests_total{outcome="400"}'] == "1.0"
    assert values["driffusion_rounds_total"] == "5.0"
    assert values["driffusion_evaluations_total"] == "9.0"
    assert values['driffusion_images_total{mode="aggressive"}'] == "1.0"
    assert values['driffusion_stage_seconds_count{stage="denoise"}'] == "1.0"
    assert values["driffusion_queue_depth"] == values["driffusion_lost_lanes"] == "0.0"


def test_every_outcome_is_counted_once(pipeline: Pipeline) -> None:
    with serving(pipeline, access=Access(keys=("secret",))) as client:
        client.headers["Authorization"] = "Bearer secret"
        body = {"prompt": PROMPT, "num_inference_steps": 6, "mode": "adaptive", "tolerance": 1.0, "k": 3}
        client.post(GENERATE, json=body)
        client.post(GENERATE, json={**body, "stream": True})
        client.post(GENERATE, json=body, headers={"Authorization": "none"})
        client.post(GENERATE, content=b"a star")
        client.post(GENERATE, content=b"a star", headers={"Content-Type": "application/json"})
        client.post(GENERATE, json={**body, "model": "other"})
        with pytest.raises(httpx.ReadTimeout):
            client.post(GENERATE, json={**body, "num_inference_steps": 500, "mode": "sequential"}, timeout=0.3)
        deadline = time.monotonic() + 20
        while 'outcome="499"' not in (text := client.get("/metrics").text) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = values(client)
    outcomes = {n.split('"')[1]: v for n, v in found.items() if n.startswith("driffusion_requests_total")}
    assert outcomes == {"200": 2, "401": 1, "415": 1, "400": 1, "404": 1, "499": 1}, text
    assert found["driffusion_queue_seconds_count"] == found['driffusion_stage_seconds_count{stage="wait"}'] == 2
    assert {f'driffusion_accepted_drift_count{{quantile="{q}"}}' for q in ("median", "p90", "max")} <= set(found)
    assert found['driffusion_lane_busy_seconds_total{lane="cpu/0"}'] > 0
    assert not [name for name in found if "gpu" in name]


def test_what_lanes_keep_is_counted(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kind, as it is when it is asked for."""
    kept = {"rounds": 3, "graphs": 2, "contexts": 4}
    monkeypatch.setattr(pipeline.backend.measurements, "counts", kept)
    with serving(pipeline) as client:
        assert values(client)['driffusion_kept{kind="graphs"}'] == 2
        kept["graphs"] = 5
        found = values(client)
    assert {kind: found[f'driffusion_kept{{kind="{kind}"}}'] for kind in kept} == kept


def test_gpus_tell_memory_utilisation_and_power(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    def power(gpu: int) -> int:
        if gpu == 1:
            raise NVMLError("not supported")
        return 123_400

    told: dict[str, Any] = {
        "NVMLError": NVMLError, "nvmlInit": lambda: None, "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=10 + gpu, total=100),
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=40), "nvmlDeviceGetPowerUsage": power,
    }  # fmt: skip
    for name, value in told.items():
        setattr(nvml, name, value)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with serving(pipeline) as client:
        found = values(client)
        assert found['driffusion_gpu_memory_used_bytes{gpu="1"}'] == 11
        assert found['driffusion_gpu_memory_total_bytes{gpu="0"}'] == 100
        assert found['driffusion_gpu_utilization_ratio{gpu="0"}'] == 0.4
        assert found['driffusion_gpu_power_watts{gpu="0"}'] == 123.4
        assert 'driffusion_gpu_power_watts{gpu="1"}' not in found

        def fails() -> None:
            raise NVMLError("driver not loaded")

        monkeypatch.setattr(nvml, "nvmlInit", fails)
        assert not [name for name in values(client) if "gpu" in name]
