"""The server under load and in bad company: streams, queue, deadlines, clients that leave, keys, metrics."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from runtime.pipeline import Pipeline
from runtime.serve.__main__ import KEYS_VARIABLE, read_keys
from runtime.serve.limits import Limits
from runtime.serve.openai.answers import Previews
from runtime.serve.openai.schema import ImageRequest
from runtime.serve.queue import CancelledError, DeadlineError, Job, Jobs, QueueFullError
from tests.client import GENERATE, PROMPT, ask, files, serving


def decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image.convert("RGB"), float)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream; names and types agree."""
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never was"
        time.sleep(0.01)


def depth(client: httpx.Client) -> float:
    """Requests that wait or are being made."""
    (found,) = (one for one in client.get("/metrics").text.splitlines() if one.startswith("driffusion_queue_depth "))
    return float(found.split()[1])


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partial", [0, 1, 3])
@pytest.mark.parametrize("mode", ["sequential", "aggressive", "srds"])
def test_a_stream_shows_the_image_as_it_becomes(client: httpx.Client, mode: str, partial: int) -> None:
    body = {"prompt": PROMPT, "mode": mode, "k": 2, "num_inference_steps": 12, "seed": 4}
    response = client.post(GENERATE, json={**body, "stream": True, "partial_images": partial})
    assert response.headers["content-type"].startswith("text/event-stream")
    *partials, last = events(response)
    assert [event["type"] for event in partials] == ["image_generation.partial_image"] * len(partials)
    assert [event["partial_image_index"] for event in partials] == list(range(len(partials)))
    assert len(partials) == partial if mode != "srds" else len(partials) <= partial
    whole = ask(client, **body)
    assert last["type"] == "image_generation.completed"
    assert last["b64_json"] == whole["data"][0]["b64_json"]
    finished = decoded(last["b64_json"])
    distances = [np.abs(decoded(event["b64_json"]) - finished).mean() for event in partials]
    assert distances == sorted(distances, reverse=True) or mode == "srds"


def test_the_openai_client(client: httpx.Client) -> None:
    """The package that most callers have, streaming and not."""
    made = openai.OpenAI(base_url=f"{str(client.base_url).rstrip('/')}/v1", api_key="any")
    more = {"num_inference_steps": 6, "seed": 2}
    plain = made.images.generate(prompt=PROMPT, model="shapes", n=2, extra_body=more)
    assert plain.data and len(plain.data) == 2
    stream = made.images.generate(prompt=PROMPT, model="shapes", stream=True, partial_images=2, extra_body=more)
    *partials, last = stream
    assert [event.type for event in partials] == ["image_generation.partial_image"] * 2
    assert last.type == "image_generation.completed"
    assert plain.usage and plain.usage.model_dump(exclude_unset=True) == last.usage.model_dump(exclude_unset=True)
    assert plain.usage.input_tokens_details.text_tokens == plain.usage.total_tokens == 0
    with pytest.raises(openai.BadRequestError, match="unknown mode"):
        made.images.generate(prompt=PROMPT, extra_body={"mode": "magic"})
    with pytest.raises(openai.BadRequestError, match="unknown mode"):
        made.images.generate(prompt=PROMPT, stream=True, extra_body={"mode": "magic"})


@pytest.mark.parametrize(
    ("body", "param"),
    [({"stream": True, "n": 2}, "n"), ({"partial_images": 1}, "partial_images"),
     ({"stream": True, "partial_images": 4}, "partial_images")],
)  # fmt: skip
def test_streams_that_cannot_be(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = client.post(GENERATE, json={"prompt": PROMPT, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_previews_are_spread_over_the_steps() -> None:
    asked = ImageRequest.model_validate({"prompt": "a", "stream": True, "partial_images": 3})
    previews = Previews(asked)
    assert [finished for finished in range(1, 21) if previews.due(finished, 20)] == [5, 10, 15]
    late = Previews(asked)
    assert [finished for finished in (17, 18, 19, 20) if late.due(finished, 20)] == [17, 18, 19]


# --- the queue -------------------------------------------------------------------------------------------------------


def blocked(jobs: Jobs) -> tuple[Job, threading.Event]:
    """A job that holds the engine until it is told."""
    held, begun = threading.Event(), threading.Event()

    def work(job: Job) -> str:
        begun.set()
        assert held.wait(20)
        job.check()
        return "done"

    job = jobs.submit(work, 60)
    assert begun.wait(20)
    return job, held


def test_jobs_run_in_order_and_the_queue_has_an_end() -> None:
    jobs, order = Jobs(3), []

    def noting(number: int) -> Callable[[Job], None]:
        return lambda job: order.append(number)

    first, held = blocked(jobs)
    others = [jobs.submit(noting(n), 60) for n in range(3)]
    with pytest.raises(QueueFullError, match="3 requests are waiting already: try again in 4 s"):
        jobs.submit(noting(9), 60)
    held.set()
    assert first.future.result(20) == "done"
    for job in others:
        job.future.result(20)
    assert order == [0, 1, 2]
    assert jobs.depth == 0
    jobs.close()


def test_a_job_that_is_too_old_or_not_wanted_does_not_begin() -> None:
    jobs = Jobs(9)
    first, held = blocked(jobs)
    late, unwanted = jobs.submit(lambda job: "made", 0.05), jobs.submit(lambda job: "made", 60)
    unwanted.cancel()
    assert jobs.depth == 2 and unwanted.future.done(), "it leaves at once"
    time.sleep(0.1)
    first.cancel()
    held.set()
    with pytest.raises(CancelledError):
        first.future.result(20)
    with pytest.raises(DeadlineError, match=r"0\.05 s old in the queue"):
        late.future.result(20)
    with pytest.raises(CancelledError):
        unwanted.future.result(20)
    assert jobs.submit(lambda job: "made", 60).future.result(20) == "made"
    jobs.close()


def test_who_leaves_the_queue_makes_room_at_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """While every thread of the engine is in something long."""
    made, held = pipeline.generate, threading.Event()
    monkeypatch.setattr(pipeline, "generate", lambda *args, **more: (held.wait(20), made(*args, **more))[1])
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
        monkeypatch.setattr(pipeline, "generate", lambda *_, before_round, **__: (held.wait(20), before_round()))
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
    made, held = pipeline.generate, threading.Event()

    def stuck(*args: Any, progress: Callable[[int, int], None], **more: Any) -> Any:
        def then_wait(finished: int, steps: int) -> None:
            progress(finished, steps)
            if finished == 2:
                held.wait(20)

        return made(*args, progress=then_wait, **more)

    with serving(pipeline, Limits(seconds=1.0)) as client:
        monkeypatch.setattr(pipeline, "generate", stuck)
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
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    opened = socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=20)
    opened.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
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


def test_a_client_that_leaves_while_it_waits_for_lanes(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        wanted = [files(ask(client, seed=14, lanes=lanes)) for lanes in (1, 2)]
        with posted(client, LONG), posted(client, LONG):
            until(lambda: pipeline.lanes.seated + pipeline.lanes.waiting == 2)
            with posted(client, LONG), posted(client, LONG):
                until(lambda: pipeline.lanes.seated + pipeline.lanes.waiting == 4)
                assert pipeline.lanes.waiting >= 2
            until(lambda: depth(client) == pipeline.lanes.seated + pipeline.lanes.waiting == 2)
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
        if (lanes := answer["report"]["lanes_per_round"]) in (1, 2):
            assert files(answer) == files(alone[seed, lanes]), "equal bytes for equal placement"
    assert 1 in {answer["report"]["lanes_per_round"] for answer in made}, "under load images share the lanes"


# --- who asks, and what is told --------------------------------------------------------------------------------------


def test_keys(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(keys=("secret-1", "schlüssel"))) as client:
        body = {"prompt": PROMPT, "num_inference_steps": 1}
        for header in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "Bearer secret-12"}):
            refused = client.post(GENERATE, json=body, headers=header)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        for key in (b"secret-1", "schlüssel".encode(), "schlüssel".encode("latin-1")):
            assert client.post(GENERATE, json=body, headers={b"Authorization": b"Bearer " + key}).status_code == 200
        for key in (b"schlussel", "schlÃ¼sse".encode(), b"schl\xffssel"):
            assert client.post(GENERATE, json=body, headers={b"Authorization": b"Bearer " + key}).status_code == 401
        assert client.get("/health/live").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_keys_come_from_a_file_and_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("one\n\n two \n")
    monkeypatch.setenv(KEYS_VARIABLE, "three,, four")
    assert read_keys(path) == ("one", "two", "three", "four")
    assert read_keys(None) == ("three", "four")
    path.write_text("\n")
    monkeypatch.setenv(KEYS_VARIABLE, "")
    with pytest.raises(Exception, match="holds no API key"):
        read_keys(path)
    with pytest.raises(Exception, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_a_request_keeps_its_id(client: httpx.Client) -> None:
    assert client.get("/v1/models", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {client.get("/v1/models").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert client.get("/v1/models", headers={"x-request-id": "a b\tc"}).headers["x-request-id"] != "a b\tc"


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


def test_the_openapi_document_describes_the_request(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"][GENERATE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(ImageRequest.model_fields)
    assert body["additionalProperties"] is False
    assert set(document["paths"]) >= {GENERATE, "/v1/models", "/health/live", "/health/ready", "/metrics"}
