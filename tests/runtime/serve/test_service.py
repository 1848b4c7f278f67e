"""The service under load and in bad company: deadlines, a full queue, clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engines.errors import ParameterError
from runtime.call import Call, Callbacks
from runtime.lane_policy import ELASTIC
from runtime.pipeline import Pipeline, Result
from runtime.serve.limits import Limits
from runtime.serve.request import CancelledError, DeadlineError, DrainingError
from runtime.serve.service import Previews, Service
from tests.client import (
    GENERATE,
    POST,
    PROMPT,
    ask,
    decoded,
    depth,
    events,
    expected,
    files,
    received,
    same,
    serving,
    until,
)


def test_previews_are_spread_over_the_steps() -> None:
    shown = list[int]()

    def finish(count: int, steps: list[int]) -> list[int]:
        previews = Previews(count, lambda index, image: shown.append(index))
        due = []
        for finished in steps:
            if previews.due(finished, 20):
                due.append(finished)
                previews.show(Image.new("RGB", (1, 1)))
        return due

    assert finish(3, [*range(1, 21)]) == [5, 10, 15]
    assert finish(3, [17, 18, 19, 20]) == [17, 18, 19]
    assert shown == [0, 1, 2] * 2
    assert finish(0, [*range(1, 21)]) == []


def test_a_service_needs_no_protocol(pipeline: Pipeline) -> None:
    """What a further one builds on: a call in, an encoding out, previews, a deadline, cancelling, neutral errors."""
    service, previews = Service(pipeline, Limits(queue=1)), list[tuple[int, tuple[int, int]]]()
    call = Call(PROMPT, num_inference_steps=6, mode="sequential", seed=3)

    def preview(index: int, image: Image.Image) -> None:
        previews.append((index, image.size))

    request = service.submit(call, lambda result: result, Previews(2, preview), request_id="rpc-1", warnings=("mine",))
    result: Result = request.future.result(20)
    assert (request.id, result.report.request_id, result.report.warnings) == ("rpc-1", "rpc-1", ("mine",))
    assert previews == [(0, (64, 64)), (1, (64, 64))]
    wanted = pipeline.generate(PROMPT, num_inference_steps=6, mode="sequential", seed=3)
    assert result.images[0].tobytes() == wanted.images[0].tobytes()
    assert wanted.report.request_id is None
    long = replace(call, num_inference_steps=900)
    with pytest.raises(DeadlineError, match=r"0\.2 s old and was not finished"):
        service.submit(long, lambda result: result, seconds=0.2).future.result(20)
    assert service.submit(call, lambda result: "x", seconds=1e9).seconds == Limits.seconds, "the server's holds, too"
    cancelled = service.submit(long, lambda result: result)
    until(lambda: cancelled.started is not None)
    cancelled.cancel()
    with pytest.raises(CancelledError):
        cancelled.future.result(20)
    with pytest.raises(ParameterError, match="lanes"):
        service.submit(replace(call, lanes=3), lambda result: result).future.result(20)
    assert service.queue.drain(20) == 0
    with pytest.raises(DrainingError):
        service.submit(call, lambda result: result)


def test_who_leaves_the_queue_makes_room_at_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """While every thread of the engine is in something long; there are two more than lanes where lanes are divided."""
    monkeypatch.setattr(pipeline.lanes, "policy", ELASTIC)
    made, held = pipeline.run, threading.Event()
    monkeypatch.setattr(pipeline, "run", lambda call, callbacks: (held.wait(20), made(call, callbacks))[1])
    with serving(pipeline, Limits(queue=5)) as client, ThreadPoolExecutor(8) as pool:
        try:
            at_work = [pool.submit(ask, client, seed=seed) for seed in range(4)]
            until(lambda: depth(client) == 4)
            leaving = [pool.submit(client.post, GENERATE, json={"prompt": PROMPT}, timeout=0.5) for _ in range(3)]
            until(lambda: depth(client) == 7)
            assert client.post(GENERATE, json={"prompt": PROMPT}).status_code == 429
            assert all(isinstance(one.exception(), httpx.ReadTimeout) for one in leaving)
            until(lambda: depth(client) == 4)
            waiting = pool.submit(ask, client)
            until(lambda: depth(client) == 5)
        finally:
            held.set()
        assert all(one.result()["data"] for one in (*at_work, waiting))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_deadline_does_not_wait_for_a_long_round(
    stream: bool, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    with serving(pipeline, Limits(seconds=0.5)) as client:
        monkeypatch.setattr(pipeline, "run", lambda call, callbacks: (held.wait(20), callbacks.before_round()))
        try:
            start = time.monotonic()
            response = client.post(GENERATE, json={"prompt": PROMPT, "stream": stream})
            assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert 0.5 <= time.monotonic() - start < 2
            assert depth(client) == 1, "until its next round"
        finally:
            held.set()
        until(lambda: depth(client) == 0)


def test_the_deadline_ends_a_stream_in_the_middle_of_a_long_round(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, held = pipeline.run, threading.Event()

    def stuck(call: Call, callbacks: Callbacks) -> Result:
        def then_wait(finished: int, steps: int) -> None:
            assert callbacks.progress is not None
            callbacks.progress(finished, steps)
            if finished == 2:
                held.wait(20)

        return made(call, replace(callbacks, progress=then_wait))

    with serving(pipeline, Limits(seconds=1.0)) as client:
        monkeypatch.setattr(pipeline, "run", stuck)
        try:
            body = {"prompt": PROMPT, "num_inference_steps": 4, "mode": "sequential", "stream": True}
            start = time.monotonic()
            response = client.post(GENERATE, json={**body, "partial_images": 1})
            partial, last = events(response)
            assert partial["type"] == "image_generation.partial_image"
            assert (last["type"], last["error"]["code"]) == ("error", "deadline_exceeded")
            assert 1 <= time.monotonic() - start < 3
        finally:
            held.set()
        until(lambda: depth(client) == 0)
        assert 'driffusion_requests_total{outcome="504"} 1.0' in client.get("/metrics").text


def test_a_full_queue_is_429_and_a_deadline_504(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(queue=1, seconds=1.0)) as client:
        long = {"prompt": PROMPT, "num_inference_steps": 500, "mode": "sequential"}
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(lambda n: client.post(GENERATE, json=long), range(8)))
        statuses = sorted(response.status_code for response in responses)
        assert set(statuses) == {429, 504}
        refused = next(response for response in responses if response.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        late = next(response for response in responses if response.status_code == 504)
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert ask(client, num_inference_steps=2)["data"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_is_not_worked_for(client: httpx.Client, stream: bool) -> None:
    """The engine is free again within a round, and the next image is what it would have been."""
    wanted = ask(client, seed=11)["data"]
    body = {"prompt": PROMPT, "num_inference_steps": 500, "mode": "sequential", "stream": stream}
    for _ in range(3):
        with pytest.raises(httpx.ReadTimeout):
            client.post(GENERATE, json=body, timeout=0.4)
    start = time.monotonic()
    assert ask(client, seed=11)["data"] == wanted
    assert time.monotonic() - start < 5, "three times 500 steps take longer"


def test_clients_that_leave_in_the_queue_or_before_the_end_of_their_request(client: httpx.Client) -> None:
    wanted = files(ask(client, seed=12))

    async def crowd() -> None:
        async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as many:

            async def one(seconds: float) -> None:
                with pytest.raises(httpx.TimeoutException):
                    await many.post(GENERATE, json={"prompt": PROMPT, "num_inference_steps": 500}, timeout=seconds)

            await asyncio.gather(*(one(0.05 + 0.05 * n) for n in range(8)))

    asyncio.run(crowd())
    assert files(ask(client, seed=12)) == wanted


def posted(client: httpx.Client, body: dict[str, Any]) -> socket.socket:
    """A request on a connection of its own, which ends when it is closed."""
    content = json.dumps(body)
    opened = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)
    opened.sendall(f"{POST}Content-Length: {len(content)}\r\n\r\n{content}".encode())
    return opened


LONG = {"prompt": PROMPT, "num_inference_steps": 900, "mode": "sequential"}


def test_a_client_that_leaves_after_a_preview(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        wanted = [files(ask(client, seed=13, lanes=lanes)) for lanes in (1, 2)]
        with posted(client, {**LONG, "stream": True, "partial_images": 3, "num_inference_steps": 200}) as leaving:
            received = b""
            while b"\n\n" not in received.partition(b"event: image_generation.partial_image")[2]:
                received += leaving.recv(4096)
            assert depth(client) == 1 and b"completed" not in received, "it is being made"
        # one lane has the same placement whether or not what was left is still in its last round
        assert files(ask(client, seed=13, lanes=1)) == wanted[0]
        until(lambda: depth(client) == 0)
        assert files(ask(client, seed=13)) == wanted[1]
        text = client.get("/metrics").text
        assert 'driffusion_requests_total{outcome="499"} 1.0' in text
        assert 'driffusion_stage_seconds_count{stage="decode"} 4.0' in text, "it was not finished for nobody"


def test_a_client_that_leaves_while_it_waits_for_lanes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.lanes, "policy", ELASTIC)  # the lanes are divided, so that it waits
    with serving(pipeline) as client:
        wanted = [files(ask(client, seed=14, lanes=lanes)) for lanes in (1, 2)]
        with posted(client, LONG), posted(client, LONG):
            until(lambda: pipeline.lanes.running + pipeline.lanes.waiting == 2)
            with posted(client, LONG), posted(client, LONG):
                until(lambda: pipeline.lanes.running + pipeline.lanes.waiting == 4)
                assert pipeline.lanes.waiting >= 2
            until(lambda: depth(client) == pipeline.lanes.running + pipeline.lanes.waiting == 2)
        assert files(ask(client, seed=14, lanes=1)) == wanted[0]
        until(lambda: depth(client) == 0)
        assert files(ask(client, seed=14)) == wanted[1]
        assert 'driffusion_requests_total{outcome="499"} 4.0' in client.get("/metrics").text


@pytest.mark.usefixtures("usual_costs")
def test_every_request_gets_its_own_image_under_load(client: httpx.Client) -> None:
    alone = {
        (seed, lanes): ask(client, seed=seed, mode="aggressive", k=2, lanes=lanes)
        for seed in range(6)
        for lanes in (1, 2)
    }
    with ThreadPoolExecutor(12) as pool:
        seeds = [n % 6 for n in range(24)]
        made = list(pool.map(lambda seed: ask(client, seed=seed, mode="aggressive", k=2), seeds))
    for seed, answer in zip(seeds, made, strict=True):
        a, b = (decoded(one["data"][0]["b64_json"]) for one in (answer, alone[seed, 2]))
        assert np.abs(a - b).max() <= 2
        if (lanes := answer["report"]["lanes_per_round"]) in (1, 2) and not answer["report"]["shared_rounds"]:
            assert files(answer) == files(alone[seed, lanes]), "equal bytes for equal placement"
    assert any(answer["report"]["shared_rounds"] for answer in made), "under load images share the lanes"


def test_requests_in_flight_do_not_mix(client: httpx.Client, pipeline: Pipeline) -> None:
    options: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "mode": "aggressive", "k": 2},
        {"seed": 3, "guidance_scale": 1, "num_inference_steps": 5},
        {"seed": 4, "negative_prompt": "a ring"},
    ]
    with ThreadPoolExecutor(len(options)) as threads:
        answers = list(threads.map(lambda choice: ask(client, **choice), options))
    for answer, choice in zip(answers, options, strict=True):
        assert same(received(answer), expected(pipeline, **choice), within=2)


def test_the_server_answers_while_an_image_is_made(client: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as thread:
        image = thread.submit(ask, client, num_inference_steps=200, guidance_scale=1)
        seconds = []
        while not image.done():
            started = time.perf_counter()
            assert client.get("/health/live").status_code == 200
            seconds.append(time.perf_counter() - started)
            time.sleep(0.05)
    assert image.result()["report"]["steps"] == 200
    assert len(seconds) > 5
    assert sorted(seconds)[len(seconds) // 2] < 0.5
