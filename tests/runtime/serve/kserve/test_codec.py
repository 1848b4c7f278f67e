"""What both transports read: damaged, oversized and random requests end in ParameterError, never in anything else."""

from __future__ import annotations

import json
import time
import warnings
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from google.protobuf.message import DecodeError

from engines.errors import ParameterError
from runtime.serve.kserve import http, rpc
from runtime.serve.kserve.codec import check_outputs, to_call
from runtime.serve.kserve.proto import inference_pb2 as pb
from runtime.serve.kserve.refused import Refused
from runtime.serve.kserve.regions import Regions
from runtime.serve.kserve.tensor import MOST_ELEMENTS, TYPES, from_raw, from_values
from runtime.serve.limits import Limits

CASES = 1500
WORDS = ["prompt", "steps", "size", "image", "seed", "BYTES", "INT64", "UINT8", "FP16", "X", "", "\ud800", "a" * 3000]
NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, float("nan"), 1e300, True, None]
NAMES = [
    "name", "datatype", "shape", "data", "parameters", "inputs", "outputs", "id", "binary_data_size", "binary_data",
    "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "format",
]  # fmt: skip


def anything(rng: np.random.Generator, depth: int = 3) -> Any:
    kind = rng.integers(5 if depth else 2)
    if kind == 0:
        return WORDS[rng.integers(len(WORDS))]
    if kind == 1:
        return NUMBERS[rng.integers(len(NUMBERS))]
    if kind == 2:
        return [anything(rng, depth - 1) for _ in range(rng.integers(4))]
    return {NAMES[rng.integers(len(NAMES))]: anything(rng, depth - 1) for _ in range(rng.integers(5))}


def tensor(rng: np.random.Generator) -> dict[str, Any]:
    """Nearly an input."""
    made = {"name": WORDS[rng.integers(5)], "datatype": WORDS[5 + rng.integers(4)], "shape": [1], "data": ["x"]}
    made[NAMES[rng.integers(5)]] = anything(rng)
    return made


def checked(parsed: Any) -> None:
    check_outputs(parsed)
    to_call(parsed, Limits(), {})


def test_random_json_is_refused_or_read(rng: np.random.Generator) -> None:
    refused = 0
    for _ in range(CASES):
        head: dict[str, Any] = {
            "inputs": [tensor(rng) for _ in range(rng.integers(4))],
            "outputs": [anything(rng)],
            "id": "a",
        }
        if rng.random() < 0.5:
            head.pop("outputs")
        content = json.dumps(head).encode() + rng.bytes(int(rng.integers(0, 9)))
        headers = {http.HEADER: str(rng.integers(0, len(content) + 2))} if rng.random() < 0.5 else {}
        try:
            checked(http.parse(content, headers, Regions(), 1 << 20)[0])
        except (ParameterError, Refused) as error:
            refused += 1
            assert http.refusal(error, 400).body
    assert refused > CASES // 2


def http_request() -> tuple[bytes, int]:
    made = [tritonclient.http.InferInput("prompt", [1], "BYTES"), tritonclient.http.InferInput("size", [2], "INT64")]
    made[0].set_data_from_numpy(np.array(["a red star"], object))
    made[1].set_data_from_numpy(np.array([64, 64]))
    body, length = tritonclient.http.InferenceServerClient.generate_request_body(made)
    return bytes(body), length


def test_damaged_binary_requests(rng: np.random.Generator) -> None:
    whole, length = http_request()
    checked(http.parse(whole, {http.HEADER: str(length)}, Regions(), 1 << 20)[0])
    read = 0
    for _ in range(CASES):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        if rng.random() < 0.3:
            del content[rng.integers(len(content)) :]
        try:
            checked(http.parse(bytes(content), {http.HEADER: str(length)}, Regions(), 1 << 20)[0])
            read += 1
        except (ParameterError, Refused):
            pass
    assert read < CASES


def test_damaged_messages(rng: np.random.Generator) -> None:
    message = pb.ModelInferRequest(model_name="shapes", raw_input_contents=[b"\x01\x00\x00\x00a", bytes(16)])
    message.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    message.inputs.add(name="size", datatype="INT64", shape=[2])
    message.parameters["timeout"].int64_param = 9
    whole, read = message.SerializeToString(), 0
    for _ in range(CASES):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        try:
            checked(rpc.parse(pb.ModelInferRequest.FromString(bytes(content)), Regions()))
            read += 1
        except (ParameterError, Refused, DecodeError):
            pass
    assert read < CASES


@pytest.mark.parametrize("datatype", [*TYPES, "BYTES"])
def test_bytes_both_ways_at_odd_sizes(datatype: str, rng: np.random.Generator) -> None:
    shape = tuple(int(one) for one in rng.integers(0, 6, rng.integers(0, 4)))
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array: np.ndarray = np.empty(count, object)
        array[:] = [rng.bytes(int(size)) for size in rng.integers(0, 9, count)]
        array = array.reshape(shape)
    else:
        array = rng.integers(0, 2, count).astype(TYPES[datatype]).reshape(shape)
    made = from_raw("x", datatype, shape, bytes(from_raw("x", datatype, shape, raw(datatype, array)).raw()))
    assert made.shape == list(shape) and np.array_equal(made.array, array)
    if datatype != "BYTES":
        assert np.array_equal(
            from_values("x", datatype, shape, array.tolist() if shape else [array.item()]).array, array
        )


def raw(datatype: str, array: np.ndarray) -> bytes:
    """By tritonclient's own functions where it has one."""
    if datatype != "BYTES":
        return array.tobytes()
    from tritonclient.utils import serialize_byte_tensor

    made = serialize_byte_tensor(array)
    return made.item() if made.size else b""


def test_sizes_that_lie_are_refused_at_once() -> None:
    """Neither memory nor time goes into elements that nobody can use."""
    begun = time.monotonic()
    many = 8 << 20
    for shape in ([many], [1], [2**40, 2**40], [many, 0]):
        with pytest.raises(ParameterError):
            from_raw("prompt", "BYTES", shape, bytes(4 * many))
    message = pb.ModelInferRequest()
    message.inputs.add(name="seed", datatype="INT64", shape=[many]).contents.int64_contents.extend(
        [1] * (MOST_ELEMENTS + 1)
    )
    with pytest.raises(ParameterError, match="raw contents"):
        rpc.parse(message, Regions())
    with pytest.raises(ParameterError, match="JSON of a request ends"):
        http.parse(b" " * 2000, {}, Regions(), 1000)
    assert time.monotonic() - begun < 5


def test_half_floats_that_overflow_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(from_values("guidance", "FP16", [1], [1e300]).array).all()


@pytest.mark.parametrize("kind", ["inputs", "outputs", "parameters"])
def test_too_many_of_a_kind(kind: str) -> None:
    message = pb.ModelInferRequest()
    for number in range(65):
        if kind == "parameters":
            message.parameters[str(number)].bool_param = True
        else:
            getattr(message, kind).add(name=str(number))
    with pytest.raises(ParameterError, match="up to 64"):
        rpc.parse(message, Regions())
    if kind != "parameters":
        body = json.dumps({kind: [{"name": str(n)} for n in range(65)]}).encode()
        with pytest.raises(ParameterError, match="up to 64"):
            http.parse(body, {}, Regions(), 1 << 20)
