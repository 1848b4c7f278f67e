"""What perf_analyzer 2.60 sent and what it asks of the answers, recorded from it, over both transports.

`perf_analyzer -m shapes --input-data FILE` with {"data": [{"prompt": ["a star"], "steps": [3]}]}, once as it is and
once with `-i grpc`, alone and with `--async --streaming`.
"""

# covers: runtime/serve/kserve/model.py, runtime/serve/kserve/codec.py

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from runtime.pipeline import Pipeline
from runtime.serve.kserve.server import KServe
from runtime.serve.limits import Limits
from runtime.serve.openai.server import Server
from runtime.serve.service import Service
from tests.client import connect, opened, running, until

CURL = b"Host: 127.0.0.1:8000\r\nUser-Agent: libcurl-agent/1.0\r\nAccept: */*\r\n"
HEAD = (
    b'{"id":"","inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":10}},'
    b'{"name":"steps","datatype":"INT64","shape":[1],"parameters":{"binary_data_size":8}}],'
    b'"outputs":[{"name":"image","parameters":{"binary_data":true}},{"name":"latents","parameters":{"binary_data":true}},'
    b'{"name":"report","parameters":{"binary_data":true}}]}'
)
TENSORS = b"\x06\x00\x00\x00a star", b"\x03\x00\x00\x00\x00\x00\x00\x00"
OVER_HTTP = (
    b"POST /v2/models/shapes/infer HTTP/1.1\r\n" + CURL + b"Inference-Header-Content-Length: 358\r\n"
    b"Content-Type: application/octet-stream\r\nContent-Length: 376\r\n\r\n" + HEAD + b"".join(TENSORS)
)
OVER_GRPC = (
    b'\n\x06shapes%s"(\n"triton_enable_empty_final_response\x12\x02\x08\x01*\x12\n\x06prompt\x12\x05BYTES\x1a\x01\x01'
    b"*\x11\n\x05steps\x12\x05INT64\x1a\x01\x012\x07\n\x05image2\t\n\x07latents2\x08\n\x06report"
    b":\n\x06\x00\x00\x00a star:\x08\x03\x00\x00\x00\x00\x00\x00\x00"
)
REQUESTS = 2


@pytest.fixture(scope="module")
def kserve(pipeline: Pipeline) -> KServe:
    return KServe(Service(pipeline, Limits()), grpc="127.0.0.1:0")


@pytest.fixture(scope="module")
def plain(kserve: KServe) -> Iterator[httpx.Client]:
    server = Server(kserve.model.service, guests=[kserve])
    with running(server) as port:
        until(lambda: server.started)
        with connect(port) as connected:
            yield connected


@pytest.fixture(scope="module")
def channel(plain: httpx.Client, kserve: KServe) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{kserve.grpc_port}") as made:
        yield made


@pytest.fixture(scope="module")
def pixels(pipeline: Pipeline) -> bytes:
    return np.asarray(pipeline.generate("a star", num_inference_steps=3).images[0]).tobytes()


def measured(before: dict[str, Any], after: dict[str, Any]) -> None:
    """It ends with `Server side statistics compute counts must be the same` where they are not, and divides by them."""
    names = ("success", "queue", "compute_input", "compute_infer", "compute_output")
    rise = {one: int(after[one]["count"]) - int(before[one]["count"]) for one in names}
    assert rise == dict.fromkeys(names, REQUESTS)
    spent = {one: int(after[one]["ns"]) - int(before[one]["ns"]) for one in names}
    assert all(spent.values()) and sum(spent.values()) <= 2 * spent["success"] + 10 * REQUESTS


def test_over_http(plain: httpx.Client, pixels: bytes) -> None:
    def asked(path: str) -> Any:
        with opened(plain) as raw:
            raw.sendall(b"GET " + path.encode() + b" HTTP/1.1\r\n" + CURL + b"\r\n")
            return json.loads(received(raw)[1])

    assert [one["name"] for one in asked("/v2/models/shapes")["outputs"]] == ["image", "latents", "report"]
    config = asked("/v2/models/shapes/config")
    assert not config["model_transaction_policy"]["decoupled"], "it takes decoupled models over streams of gRPC alone"
    assert [one["name"] for one in config["input"] if not one["optional"]] == ["prompt"]
    assert asked("/v2")["extensions"]
    before = asked("/v2/models/shapes/stats")["model_stats"][0]["inference_stats"]
    with opened(plain) as raw:
        for _ in range(REQUESTS):
            raw.sendall(OVER_HTTP)
            fields, content = received(raw)
            size = int(fields["inference-header-content-length"])
            assert json.loads(content[:size])["outputs"][0]["parameters"] == {"binary_data_size": len(pixels)}
            assert content[size : size + len(pixels)] == pixels
    measured(before, asked("/v2/models/shapes/stats")["model_stats"][0]["inference_stats"])


def received(raw: Any) -> tuple[dict[str, str], bytes]:
    """Header fields and content of an answer."""
    with raw.makefile("rb") as answer:
        assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
        lines = iter(lambda: answer.readline().decode().strip().lower(), "")
        fields: dict[str, str] = dict(line.split(": ", 1) for line in lines)
        return fields, answer.read(int(fields["content-length"]))


@pytest.mark.parametrize("streaming", [False, True])
def test_over_grpc(channel: Any, pixels: bytes, streaming: bool) -> None:
    service = "/inference.GRPCInferenceService/"

    def asked(name: str, content: bytes, answer: Any) -> Any:
        return channel.unary_unary(service + name, response_deserializer=answer.FromString)(content, timeout=20)

    def statistics() -> dict[str, Any]:
        stats = asked("ModelStatistics", b"\n\x06shapes", pb.ModelStatisticsResponse).model_stats[0].inference_stats
        return {one.name: {"count": value.count, "ns": value.ns} for one, value in stats.ListFields()}

    policy = asked("ModelConfig", b"\n\x06shapes", pb.ModelConfigResponse).config.model_transaction_policy
    assert not policy.decoupled
    before = statistics()
    if streaming:
        stream = channel.stream_stream(
            f"{service}ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString
        )
        requests = (OVER_GRPC % b"\x1a\x01%d" % index for index in range(REQUESTS))
        made = [one.infer_response for one in stream(requests, timeout=20)]
        assert [one.id for one in made] == ["0", "1"]
    else:
        made = [asked("ModelInfer", OVER_GRPC % b"", pb.ModelInferResponse) for _ in range(REQUESTS)]
    assert [one.raw_output_contents[0] for one in made] == [pixels] * REQUESTS
    measured(before, statistics())
