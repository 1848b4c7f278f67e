"""Readiness: lanes that die, hang, and come back."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engines.errors import DeviceError
from engines.host import HostBackend
from engines.load import load
from engines.store import Bundle
from runtime.pipeline import Pipeline
from runtime.serve.health import Health
from runtime.serve.limits import Limits
from tests.client import GENERATE, PROMPT, ask, serving, until, values
from tests.runtime.test_machine import break_lane


def test_ready_plays_a_round_when_lanes_are_free_and_never_waits_for_images(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        before = values(client)
        time.sleep(1.1)  # what was found out before is forgotten
        assert client.get("/health/ready").json() == {"status": "ready"}
        after = values(client)
        assert all(after[n] > before[n] for n in before if n.startswith("driffusion_lane_busy_seconds_total"))
        with ThreadPoolExecutor(8) as pool:
            made = [pool.submit(ask, client, num_inference_steps=60, seed=n) for n in range(8)]
            while not pipeline.lanes.running:
                time.sleep(0.001)
            asked = 0
            while not all(one.done() for one in made):
                start = time.monotonic()
                assert client.get("/health/ready").status_code == 200
                asked += time.monotonic() - start < 1.5
            assert asked > 3


def test_a_lane_that_dies_makes_it_unready_before_any_image(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline(shapes, "cpu*2")
    with serving(pipeline) as client:
        assert client.get("/health/ready").status_code == 200

        def broken() -> None:
            raise DeviceError("burnt out")

        assert isinstance(pipeline.machine.prober, HostBackend)
        monkeypatch.setattr(pipeline.machine.prober._lanes[1], "bind", lambda inputs, output: broken, raising=False)
        pipeline.machine.prober._bound.clear()
        time.sleep(1.1)
        for _ in range(2):
            response = client.get("/health/ready")
            assert (response.status_code, response.json()) == (503, {"status": "degraded", "lost": ["cpu/1"]})
        assert ask(client)["data"], "the other lane goes on"
        assert values(client)["driffusion_lost_lanes"] == 1
    pipeline.close()


@pytest.mark.parametrize("tries", [1, 3])
def test_lost_lanes_are_tried_again_and_given_up_at_last(
    tries: int, shapes: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.serve.health.RETRIES", (0.2, 0.2, 0.2))
    pipeline, tried = Pipeline(shapes, "cpu*2"), []

    def reopened(bundle: Bundle, lanes: Any, lane_timeout: float) -> Any:
        if len(lanes) == 2:
            tried.append(len(lanes))
            if len(tried) <= tries - (tries < 3):
                raise DeviceError("it is still broken")
        return load(bundle, lanes)

    monkeypatch.setattr("runtime.machine.load", reopened)
    with serving(pipeline) as client:
        before = ask(client, seed=3)
        break_lane(pipeline, 1, monkeypatch)
        assert "burnt out" in ask(client)["report"]["warnings"][0]
        found = [client.get("/health/ready") for _ in range(3)]
        assert all((one.status_code, one.json()["lost"]) == (503, ["cpu/1"]) for one in found)
        until(lambda: client.get("/health/ready").status_code == 200)
        assert len(tried) == tries
        after = ask(client, seed=3)
        if tries < 3:
            assert client.get("/health/ready").json() == {"status": "ready"}
            assert after["data"] == before["data"] and after["report"]["lanes"] == 2
        else:
            assert client.get("/health/ready").json() == {"status": "ready", "lost": ["cpu/1"]}
            assert after["report"]["lanes"] == 1 and values(client)["driffusion_lost_lanes"] == 1
    pipeline.close()


def test_a_lane_that_is_lost_after_another_was_given_up_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.serve.health.RETRIES", (0.0,))
    tried: list[tuple[str, ...]] = []
    lanes = SimpleNamespace(running=1, overdue=lambda seconds: ())
    pipeline = SimpleNamespace(lost=("a",), lanes=lanes, devices=())

    def revive() -> bool:
        lost, pipeline.lost = pipeline.lost, ()
        found = asyncio.run(health.trouble())
        assert found == {"status": "degraded", "lost": list(lost)}, "a lane is not back before it has worked"
        tried.append(lost)
        pipeline.lost = lost
        return False

    pipeline.revive = revive
    health = Health(cast(Any, pipeline), 1.0, lambda: False)

    def given_up() -> bool:
        return asyncio.run(health.trouble()) is None

    assert not given_up()
    until(given_up)
    pipeline.lost = ("a", "b")
    assert not given_up()
    until(given_up)
    assert tried == [("a",), ("a", "b")]


@pytest.mark.parametrize("error", [ValueError("odd"), TimeoutError("odd"), DeviceError("odd")], ids=repr)
def test_a_probe_that_fails_is_told_and_tried_again(
    pipeline: Pipeline, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise error

    with serving(pipeline, Limits(lane_seconds=2.0)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "probe", broken)
            for _ in range(2):
                response = client.get("/health/ready")
                assert (response.status_code, response.json()["status"]) == (503, "failing")
                assert "odd" in response.json()["message"]
        assert client.get("/health/ready").status_code == 200


@pytest.mark.parametrize("by", ["probe", "image"])
def test_a_lane_that_hangs_makes_it_unready_and_its_client_hears(
    by: str, shapes: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, held = Pipeline(shapes, "cpu*2"), threading.Event()
    with serving(pipeline, Limits(lane_seconds=0.3, seconds=1.0)) as client:
        ask(client)
        assert client.get("/health/ready").status_code == 200
        backend = pipeline.machine.prober if by == "probe" else pipeline.backend
        assert isinstance(backend, HostBackend)
        bind = backend._lanes[1].bind

        def hangs(inputs: Any, output: Any) -> Any:
            run = bind(inputs, output)
            return lambda: (held.wait(20), run())

        with monkeypatch.context() as patch:
            patch.setattr(backend._lanes[1], "bind", hangs, raising=False)
            backend._bound.clear()
            if by == "probe":
                time.sleep(1.1)
            else:
                with ThreadPoolExecutor(1) as pool:
                    asked = time.monotonic()
                    stuck = pool.submit(client.post, GENERATE, json={"prompt": PROMPT, "stream": False})
                    time.sleep(0.6)
                    response = client.get("/health/ready")
                    assert (response.json()["status"], response.json()["lanes"]) == ("hanging", ["cpu/0", "cpu/1"])
                    assert stuck.result().status_code == 504
                    assert time.monotonic() - asked < 3, "the deadline does not wait for the round"
            for _ in range(3):
                start = time.monotonic()
                response = client.get("/health/ready")
                assert (response.status_code, response.json()["status"]) == (503, "hanging")
                assert time.monotonic() - start < 5
            assert client.get("/health/live").status_code == 200
            held.set()
            time.sleep(0.3)
        backend._bound.clear()
        assert client.get("/health/ready").status_code == 200
        assert ask(client)["data"]
    pipeline.close()


def test_a_server_that_lost_a_lane_is_not_ready() -> None:
    class Degraded:
        lost, devices = ("cuda:1/0",), ("cuda:0/0",)
        manifest = SimpleNamespace(
            model="none", defaults=SimpleNamespace(num_inference_steps=1, guidance_scale=1.0), image_to_image=False
        )
        lanes = SimpleNamespace(most_running=1)

    with serving(Degraded()) as client:
        response = client.get("/health/ready")
        assert (response.status_code, response.json()) == (503, {"status": "degraded", "lost": ["cuda:1/0"]})
        assert client.get("/health/live").status_code == 200
