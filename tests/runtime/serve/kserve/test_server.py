"""Both transports share queue, deadlines, keys, limits and metrics with the other routes; clients may vanish."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from engines.errors import EngineError
from runtime.pipeline import Pipeline
from runtime.serve.access import Access
from runtime.serve.kserve.server import KServe
from runtime.serve.limits import Limits
from runtime.serve.openai.server import Server
from runtime.serve.service import Service
from tests.client import PROMPT, connect, opened, running, until, values

KEY = {"authorization": "Bearer secret"}


@contextmanager
def served(pipeline: Pipeline, limits: Limits, access: Access | None = None) -> Iterator[tuple[KServe, dict[Any, str]]]:
    kserve = KServe(Service(pipeline, limits), access, "127.0.0.1:0")
    server = Server(kserve.model.service, access, [kserve])
    with running(server) as port:
        until(lambda: server.started)
        yield kserve, {tritonclient.http: f"127.0.0.1:{port}", tritonclient.grpc: f"127.0.0.1:{kserve.grpc_port}"}


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


def inputs(library: Any, **given: Any) -> list[Any]:
    made = []
    for name, value in {"prompt": [PROMPT], **given}.items():
        array = np.array(value, object if isinstance(value[0], str) else None)
        made.append(library.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "INT64"))
        made[-1].set_data_from_numpy(array)
    return made


def refused(client: Any, given: list[Any], **options: Any) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as error:
        client.infer("shapes", given, **options)
    return str(error.value.status()), str(error.value.message())


def test_keys_and_metrics(library: Any, pipeline: Pipeline) -> None:
    access = Access(keys=("secret",))
    with served(pipeline, Limits(), access) as (_, where), library.InferenceServerClient(where[library]) as client:
        assert client.is_server_live() and client.is_server_ready()
        for headers in (None, {"authorization": "Bearer wrong"}, {"authorization": ""}):
            status, _ = refused(client, inputs(library, steps=[3]), headers=headers)
            assert status in ("401", "StatusCode.UNAUTHENTICATED")
        client.infer("shapes", inputs(library, steps=[3]), headers=dict(KEY))
        refused(client, inputs(library, steps=[0]), headers=dict(KEY))
        with connect(int(where[tritonclient.http].split(":")[1])) as plain:
            counts = values(plain)
        assert counts['driffusion_requests_total{outcome="200"}'] == 1
        assert counts['driffusion_requests_total{outcome="400"}'] == 1
        assert counts["driffusion_queue_seconds_count"] == 1
        with pytest.raises(InferenceServerException):
            client.get_model_metadata("shapes")


def test_one_queue_one_deadline_one_limit(library: Any, pipeline: Pipeline) -> None:
    limits = Limits(queue=0, seconds=3.0, steps=900, prompt=60, answer=64 * 64 * 3 * 2)
    with served(pipeline, limits) as (kserve, where), library.InferenceServerClient(where[library]) as client:
        service, image = kserve.model.service, [library.InferRequestedOutput("image")]
        client.infer("shapes", inputs(library, steps=[2]), outputs=image)
        assert "ends at 900" in refused(client, inputs(library, steps=[901]))[1]
        assert "60 characters" in refused(client, inputs(library, prompt=["a" * 61]))[1]
        assert "this server sends" in refused(client, inputs(library, num_images_per_prompt=[3]), outputs=image)[1]
        slow = {"steps": [900], "num_images_per_prompt": [2], "mode": ["sequential"]}
        with ThreadPoolExecutor(2) as pool:

            def run(_: int) -> tuple[str, str]:
                with library.InferenceServerClient(where[library]) as other:
                    return refused(other, inputs(library, **slow), outputs=image)

            waiting = [pool.submit(run, n) for n in range(2)]
            until(lambda: service.queue.depth == 2)
            status, message = refused(client, inputs(library, steps=[2]), outputs=image)
            assert status in ("429", "StatusCode.RESOURCE_EXHAUSTED") and "try again" in message
            assert {one.result()[0] for one in waiting} <= {"504", "StatusCode.DEADLINE_EXCEEDED"}
        until(lambda: service.queue.depth == 0)
        service.queue.drain(0)
        status, _ = refused(client, inputs(library, steps=[2]), outputs=image)
        assert status in ("503", "StatusCode.UNAVAILABLE")


def test_priorities_are_off_unless_allowed(library: Any, pipeline: Pipeline) -> None:
    body = {"prompt": PROMPT, "num_inference_steps": 2}
    for allowed in (False, True):
        with served(pipeline, Limits(priorities=allowed)) as (_, where):
            with library.InferenceServerClient(where[library]) as client:
                client.infer("shapes", inputs(library, steps=[2]), priority=0)
                if allowed:
                    made = client.infer("shapes", inputs(library, steps=[2]), priority=1)
                    assert "priority" not in json.loads(made.as_numpy("report")[0])["certificate"]["arguments"]
                    assert "1 to 9" in refused(client, inputs(library, steps=[2]), priority=10)[1]
                else:
                    assert "--priorities" in refused(client, inputs(library, steps=[2]), priority=1)[1]
            with connect(int(where[tritonclient.http].split(":")[1])) as plain:
                answer = plain.post("/v1/images/generations", json=body | {"priority": 9})
                assert answer.status_code == (200 if allowed else 400), answer.text
                assert allowed or answer.json()["error"]["param"] == "priority"


def test_a_client_that_goes_in_the_middle_frees_the_engine(pipeline: Pipeline) -> None:
    with served(pipeline, Limits()) as (kserve, where):
        service = kserve.model.service
        client = tritonclient.grpc.InferenceServerClient(where[tritonclient.grpc])
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result))
        slow = {"steps": [990], "mode": ["sequential"]}
        client.async_stream_infer("shapes", inputs(tritonclient.grpc, **slow), parameters={"previews": 10})
        assert answers.get(timeout=30).get_response().parameters["preview"].int64_param == 0
        client.stop_stream(cancel_requests=True)
        until(lambda: service.queue.depth == 0)
        body, length = tritonclient.http.InferenceServerClient.generate_request_body(inputs(tritonclient.http, **slow))
        with connect(int(where[tritonclient.http].split(":")[1])) as plain:
            with opened(plain) as raw:
                head = f"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                raw.sendall(f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode() + bytes(body))
                until(lambda: service.queue.depth == 1)
            until(lambda: service.queue.depth == 0)
            until(lambda: values(plain)['driffusion_requests_total{outcome="499"}'] == 2)


def test_compressed_bombs_over_grpc_are_refused(pipeline: Pipeline) -> None:
    with served(pipeline, Limits(upload=1 << 20)) as (_, where):
        client = tritonclient.grpc.InferenceServerClient(where[tritonclient.grpc])
        image = tritonclient.grpc.InferInput("image", [1024, 1024, 3], "UINT8")
        image.set_data_from_numpy(np.zeros((1024, 1024, 3), np.uint8))
        given = [*inputs(tritonclient.grpc), image]
        for way in (None, "gzip", "deflate"):
            assert refused(client, given, compression_algorithm=way)[0] == "StatusCode.RESOURCE_EXHAUSTED"
        assert client.infer("shapes", inputs(tritonclient.grpc, steps=[2]), compression_algorithm="gzip")
        client.close()


def test_bytes_that_are_no_grpc_leave_the_server_running(pipeline: Pipeline, rng: np.random.Generator) -> None:
    with served(pipeline, Limits()) as (_, where):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", int(where[tritonclient.grpc].split(":")[1]))) as raw:
                raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: rng.integers(25)] + rng.bytes(200))
        with tritonclient.grpc.InferenceServerClient(where[tritonclient.grpc]) as client:
            assert client.is_server_live()


def test_a_taken_port_is_one_message(pipeline: Pipeline) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        kserve = KServe(Service(pipeline, Limits()), grpc=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(EngineError, match="--grpc-port"):
            asyncio.run(kserve.start())
