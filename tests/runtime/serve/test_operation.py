"""Running the server: readiness, draining, limits, what is counted, and clients and lanes that hang."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from engines.errors import DeviceError
from engines.host import HostBackend
from engines.load import load
from engines.store import Bundle
from runtime.pipeline import Pipeline
from runtime.serve.__main__ import Server
from runtime.serve.health import Health
from runtime.serve.limits import Limits
from runtime.serve.queue import DeadlineError, Job, Jobs, ShutdownError
from runtime.serve.service import Service
from tests.client import GENERATE, PROMPT, ask, connect, running, serving
from tests.runtime.serve.openai.test_app import process, wait_for
from tests.runtime.serve.test_service import blocked, events, until
from tests.runtime.test_machine import Broken


def values(client: httpx.Client) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def opened(client: httpx.Client) -> socket.socket:
    """A connection of its own to the same server."""
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)


# --- ready -----------------------------------------------------------------------------------------------------------


def test_ready_plays_a_round_when_lanes_are_free_and_never_waits_for_images(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        before = values(client)
        time.sleep(1.1)  # what was found out before is forgotten
        assert client.get("/health/ready").json() == {"status": "ready"}
        after = values(client)
        assert all(after[n] > before[n] for n in before if n.startswith("driffusion_lane_busy_seconds_total"))
        with ThreadPoolExecutor(8) as pool:
            made = [pool.submit(ask, client, num_inference_steps=60, seed=n) for n in range(8)]
            while not pipeline.lanes.seated:
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
    monkeypatch.setattr("runtime.health.RETRIES", (0.2, 0.2, 0.2))
    pipeline, tried = Pipeline(shapes, "cpu*2"), []

    def reopened(bundle: Bundle, lanes: Any) -> Any:
        if len(lanes) == 2:
            tried.append(len(lanes))
            if len(tried) <= tries - (tries < 3):
                raise DeviceError("it is still broken")
        return load(bundle, lanes)

    monkeypatch.setattr("runtime.machine.load", reopened)
    with serving(pipeline) as client:
        before = ask(client, seed=3)
        session = pipeline.machine.engines._sessions[1]  # type: ignore[attr-defined]
        monkeypatch.setattr(session, "session", Broken(session.session))
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
    monkeypatch.setattr("runtime.health.RETRIES", (0.0,))
    tried: list[tuple[str, ...]] = []
    lanes = SimpleNamespace(seated=1, overdue=lambda seconds: ())
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


# --- the end ---------------------------------------------------------------------------------------------------------


def test_draining_finishes_refuses_and_then_gives_up() -> None:
    jobs = Jobs(9)
    first, held = blocked(jobs)
    second = jobs.submit(lambda job: "made", 60)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(jobs.drain, 20)
        while not jobs.draining:
            time.sleep(0.001)
        with pytest.raises(ShutdownError, match="is shutting down"):
            jobs.submit(lambda job: "late", 60)
        held.set()
        assert drained.result(20) == 0
    assert first.future.result(1) == "done" and second.future.result(1) == "made"

    jobs = Jobs(9)
    first, held = blocked(jobs)
    second = jobs.submit(lambda job: "made", 60)
    assert jobs.drain(0.1, grace=0.1) == 2 and jobs.depth == 1, "who waits leaves at once, who is at work cannot"
    held.set()
    for job in (first, second):
        with pytest.raises(ShutdownError, match=r"within 0\.1 s"):
            job.future.result(20)


def test_a_job_that_is_late_is_late_whoever_says_so() -> None:
    job = Job(lambda job: None, 0.0, lambda job, reason: None)
    time.sleep(0.01)
    assert job.left < 0
    with pytest.raises(DeadlineError, match=str(job.late())):
        job.check()


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(shapes: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(4) as pool:
        made = [pool.submit(ask, client, num_inference_steps=100, seed=n) for n in range(4)]
        while values(client)["driffusion_queue_depth"] < 4:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        wait_for("Shutting down: 4 requests", log, server)
        refused = client.post(GENERATE, json={"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        unready = client.get("/health/ready")
        assert (unready.status_code, unready.json()) == (503, {"status": "draining"})
        assert client.get("/health/live").status_code == 200
        assert all(one.result()["data"] for one in made)
        assert server.wait(30) == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_finished_in_time_is_given_up_and_told(stream: bool, shapes: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = {"prompt": PROMPT, "num_inference_steps": 999, "n": 1, "mode": "sequential", "stream": stream}
    if stream:
        body["partial_images"] = 3
    with process(shapes, log, "--drain", "1") as (server, port), connect(port) as client, ThreadPoolExecutor(1) as pool:
        made = pool.submit(client.post, GENERATE, json=body)
        while values(client)["driffusion_images_seated"] < 1:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        response = made.result()
        if stream and response.status_code == 200:
            assert events(response)[-1]["error"]["code"] == "shutting_down"
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert server.wait(30) == 0
    assert "1 requests were given up" in log.read_text() and "Traceback" not in log.read_text()


# --- limits ----------------------------------------------------------------------------------------------------------


def test_limits_are_kept_told_and_documented(pipeline: Pipeline) -> None:
    limits = Limits(body=4000, prompt=50, side=64, steps=7, n=2)
    with serving(pipeline, limits) as client:
        for body, param, said in (
            ({"prompt": "a" * 51}, "prompt", "50"), ({"negative_prompt": "a" * 51}, "negative_prompt", "50"),
            ({"n": 3}, "n", "2"), ({"num_inference_steps": 8}, "num_inference_steps", "7"),
            ({"size": "64x72"}, "size", "64"),
        ):  # fmt: skip
            response = client.post(GENERATE, json={"prompt": PROMPT, **body})
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
            assert said in response.json()["error"]["message"]
        large = client.post(GENERATE, json={"prompt": PROMPT, "user": "x" * 4000})
        assert large.status_code == 413 and "4000" in large.json()["error"]["message"]
        assert client.post(GENERATE, json={"prompt": "a star"}).json()["report"]["steps"] == 7, "the default fits"
        told = client.get("/v1/models").json()["data"][0]["limits"]
        assert told == {
            "queue": 32, "connections": 512, "seconds": 120.0, "body_bytes": 4000, "upload_bytes": Limits.upload,
            "prompt_characters": 50, "side_pixels": 64,
            "num_inference_steps": 7, "n": 2,
        }  # fmt: skip
        document = client.get("/openapi.json").json()["paths"][GENERATE]["post"]["requestBody"]
        properties = document["content"]["application/json"]["schema"]["properties"]
        assert properties["n"]["maximum"] == 2 and properties["num_inference_steps"]["maximum"] == 7


def test_a_client_that_sends_slowly_is_told_and_holds_up_nobody(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(seconds=0.5)) as client:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as slow:
            slow.settimeout(20)
            slow.sendall(head.encode() + b'{"prompt')
            assert ask(client, num_inference_steps=1)["data"]
            assert b" 408 " in slow.recv(4096)


@pytest.mark.parametrize("before", [b"", b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["first", "next"])
def test_a_client_that_never_ends_its_head_is_cut_off(pipeline: Pipeline, before: bytes) -> None:
    """Also when it sends a byte now and then, on a connection that has answered before or has not."""
    with serving(pipeline, Limits(seconds=0.6)) as client, opened(client) as slow:
        slow.sendall(before)
        answer = b""
        while before and not answer.endswith(b'"live"}'):
            answer += slow.recv(4096)
        start = time.monotonic()
        slow.settimeout(0.2)
        slow.sendall(b"GET / HTTP/1.1\r\n")
        with suppress(ConnectionError):
            while time.monotonic() - start < 5:
                slow.sendall(b"x")
                with suppress(TimeoutError):
                    assert slow.recv(4096) == b""
                    break
        assert 0.5 < time.monotonic() - start < 4
        assert client.get("/health/live").status_code == 200


def test_connections_have_a_limit(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(connections=3)) as client, connect(client.base_url.port or 0) as late:
        assert client.get("/v1/models").status_code == 200  # one, which stays open
        with opened(client), opened(client):
            assert late.get("/health/live").status_code == 200
            response = late.post(GENERATE, json={"prompt": PROMPT}, headers={"x-request-id": "mine"})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_connections")
            assert response.headers["connection"] == "close" and int(response.headers["retry-after"]) > 0
            assert response.headers["x-request-id"] == "mine"
            assert client.get("/v1/models").status_code == 200
        until(lambda: late.get("/v1/models").status_code == 200)
        assert 'driffusion_requests_total{outcome="503"} 1.0' in client.get("/metrics").text


@contextmanager
def slow_reader(server: Server, port: int) -> Iterator[Callable[[], bytes]]:
    """A client whose answer, far larger than all buffers on its way, waits in the server; reads it to its end."""
    body = json.dumps({"prompt": PROMPT, "n": 10, "num_inference_steps": 2})
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.socket() as slow:
        slow.settimeout(10)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", port))
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: unsent(server) > 20_000)
        yield lambda: b"".join(iter(lambda: slow.recv(1 << 16), b""))


def unsent(server: Server) -> int:
    """Bytes of answers that clients do not take."""
    connections = list(server.server_state.connections)
    return sum(cast(Any, one).transport.get_write_buffer_size() for one in connections)


def whole(answer: bytes) -> bool:
    """Whether all ten images have arrived."""
    return len(json.loads(answer.split(b"\r\n\r\n", 1)[1])["data"]) == 10


def test_a_client_that_reads_slowly_holds_up_nobody(pipeline: Pipeline) -> None:
    server = Server(Service(pipeline, Limits()))
    with running(server, send_buffer=4096) as port, slow_reader(server, port) as rest, connect(port) as client:
        for seed in range(3):
            assert ask(client, seed=seed)["data"]
        assert unsent(server) > 20_000, "it has not read"
        assert whole(rest())


def test_draining_gives_slow_clients_what_is_left_of_its_time(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.serve.LATE_SECONDS", 0.3)
    server = Server(Service(pipeline, Limits(drain=20)))
    with running(server, send_buffer=4096) as port, slow_reader(server, port) as rest:
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(2)
        assert unsent(server) > 20_000, "it has not read"
        assert whole(rest())
        until(lambda: not server.server_state.connections)


# --- what is counted -------------------------------------------------------------------------------------------------


def test_every_outcome_is_counted_once(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(keys=("secret",))) as client:
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
