"""The real tritonclient over gRPC, in the process of the server."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from runtime.pipeline import Pipeline
from runtime.serve.access import Access
from runtime.serve.kserve.server import KServe
from runtime.serve.limits import Limits
from runtime.serve.openai.server import Server
from runtime.serve.service import Service
from tests.client import PROMPT, running, until


@pytest.fixture(scope="module")
def kserve(pipeline: Pipeline) -> Iterator[KServe]:
    made = KServe(Service(pipeline, Limits()), ACCESS, "127.0.0.1:0")
    server = Server(made.model.service, ACCESS, [made])
    with running(server):
        until(lambda: server.started)
        yield made


@pytest.fixture
def client(kserve: KServe) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{kserve.grpc_port}") as connected:
        yield connected


ACCESS = Access(keys=("secret",))
KEY = {"authorization": "Bearer secret"}


def inputs(steps: int = 3, seed: int = 5) -> list[Any]:
    made = []
    for name, kind, array in (
        ("prompt", "BYTES", np.array([PROMPT], object)), ("steps", "INT64", np.array([steps])),
        ("seed", "UINT64", np.array([seed], np.uint64)),
    ):  # fmt: skip
        made.append(triton.InferInput(name, [1], kind))
        made[-1].set_data_from_numpy(array)
    return made


def test_pixels_latents_and_report_are_the_pipelines(client: Any, pipeline: Pipeline) -> None:
    seed = int(np.random.default_rng().integers(2**63))
    expected = pipeline.generate(PROMPT, num_inference_steps=3, seed=seed)
    made = client.infer("shapes", inputs(seed=seed), headers=KEY, request_id="mine")
    assert np.array_equal(made.as_numpy("image"), np.stack([np.asarray(one) for one in expected.images]))
    assert np.array_equal(made.as_numpy("latents"), expected.latents)
    assert json.loads(made.as_numpy("report")[0])["seed"] == seed
    assert made.get_response().id == "mine"


def test_information(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("shapes", headers=KEY)
    assert client.get_server_metadata(headers=KEY).name == "driffusion"
    assert client.get_model_metadata("shapes", headers=KEY).inputs[0].name == "prompt"
    assert client.get_model_config("shapes", headers=KEY).config.input[0].name == "prompt"
    assert client.get_inference_statistics(headers=KEY).model_stats[0].name == "shapes"
    assert client.get_model_repository_index(headers=KEY).models[0].state == "READY"


def test_every_method_of_the_client_is_answered_or_refused(kserve: KServe) -> None:
    """Not by gRPC's own `Method not found!`, which says UNIMPLEMENTED, too."""
    (service,) = service_pb2.DESCRIPTOR.services_by_name.values()
    with grpc.insecure_channel(f"127.0.0.1:{kserve.grpc_port}") as channel:
        for method in service.methods:
            kind = channel.stream_unary if method.client_streaming else channel.unary_unary
            call, content = kind(f"/{service.full_name}/{method.name}"), b""
            try:
                call(iter([content]) if method.client_streaming else content, metadata=[*KEY.items()], timeout=20)
            except grpc.RpcError as error:
                assert error.details() and "not found" not in error.details(), method.name


def test_a_stream_has_previews_and_goes_on_after_an_error(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or result), headers=KEY)
    client.async_stream_infer("shapes", inputs(steps=0))
    assert "num_inference_steps" in answers.get(timeout=20).message()
    client.async_stream_infer("shapes", inputs(steps=8), parameters={"previews": 2, "x": "y"})
    made = [answers.get(timeout=20) for _ in range(3)]
    assert [one.get_response().parameters["triton_final_response"].bool_param for one in made] == [False, False, True]
    assert [one.get_response().parameters["preview"].int64_param for one in made[:2]] == [0, 1]
    assert made[0].as_numpy("image").shape == made[2].as_numpy("image").shape
    client.stop_stream()


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda one: one.infer("shapes", inputs()), "UNAUTHENTICATED"),
        (lambda one: one.infer("other", inputs(), headers=KEY), "NOT_FOUND"),
        (lambda one: one.infer("shapes", inputs(steps=0), headers=KEY), "INVALID_ARGUMENT"),
        (lambda one: one.load_model("shapes", headers=KEY), "UNIMPLEMENTED"),
        (lambda one: one.get_system_shared_memory_status(headers=KEY), "UNIMPLEMENTED"),
        (lambda one: one.get_log_settings(headers=KEY), "UNIMPLEMENTED"),
        (lambda one: one.infer("shapes", inputs(steps=900), headers=KEY, client_timeout=0.2), "DEADLINE_EXCEEDED"),
        (lambda one: one.infer("shapes", inputs(steps=900), headers=KEY, timeout=200_000), "DEADLINE_EXCEEDED"),
    ],
)
def test_refusals(client: Any, kserve: KServe, call: Any, status: str) -> None:
    with pytest.raises(InferenceServerException) as refusal:
        call(client)
    assert refusal.value.status() == f"StatusCode.{status}"
    until(lambda: kserve.model.service.queue.depth == 0)


def test_a_cancelled_call_frees_the_engine(client: Any, kserve: KServe) -> None:
    ended: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("shapes", inputs(900), lambda result, error: ended.put(error), headers=KEY)
    until(lambda: kserve.model.service.queue.depth == 1)
    call.cancel()
    assert ended.get(timeout=20).status() == "StatusCode.CANCELLED"
    until(lambda: kserve.model.service.queue.depth == 0, 10)
