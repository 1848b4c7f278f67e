"""The real tritonclient over HTTP, in the process of the server."""

from __future__ import annotations

import gzip
import inspect
import io
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from runtime.pipeline import Pipeline
from tests.client import PROMPT, opened, serving


@pytest.fixture(scope="module")
def plain(pipeline: Pipeline) -> Iterator[httpx.Client]:
    with serving(pipeline) as connected:
        yield connected


@pytest.fixture
def client(plain: httpx.Client) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{plain.base_url.port}") as connected:
        yield connected


def tensor(name: str, datatype: str, values: Any, *, binary: bool = True) -> Any:
    kinds: dict[str, Any] = {
        "BYTES": np.object_,
        "INT64": np.int64,
        "FP32": np.float32,
        "UINT64": np.uint64,
        "BOOL": np.bool_,
    }
    array: np.ndarray = np.array(values, kinds[datatype])
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def inputs(*, binary: bool = True, seed: int = 5) -> list[Any]:
    given = [("prompt", "BYTES", [PROMPT]), ("steps", "INT64", [3]), ("seed", "UINT64", [seed])]
    return [tensor(*one, binary=binary) for one in given]


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_latents_and_report_are_the_pipelines(client: Any, pipeline: Pipeline, binary: bool) -> None:
    seed = int(np.random.default_rng().integers(2**63))
    expected = pipeline.generate(PROMPT, num_inference_steps=3, seed=seed)
    wanted = [triton.InferRequestedOutput(one, binary_data=binary) for one in ("report", "image", "latents")]
    made = client.infer("shapes", inputs(binary=binary, seed=seed), outputs=wanted, request_id="mine")
    assert np.array_equal(made.as_numpy("image"), np.stack([np.asarray(one) for one in expected.images]))
    assert np.array_equal(made.as_numpy("latents"), expected.latents)
    assert json.loads(made.as_numpy("report")[0])["seed"] == seed
    assert made.get_response()["id"] == "mine"


def test_every_output_comes_where_none_is_named(client: Any) -> None:
    made = client.infer("shapes", inputs())
    assert [one["name"] for one in made.get_response()["outputs"]] == ["image", "latents", "report"]


def test_files(client: Any) -> None:
    pixels = client.infer("shapes", inputs()).as_numpy("image")[0]
    wanted = triton.InferRequestedOutput("image")
    wanted._parameters["format"] = "png"
    file = client.infer("shapes", inputs(), outputs=[wanted]).as_numpy("image")[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels)


def test_information(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("shapes")
    assert client.is_model_ready("shapes", "1")
    assert client.get_server_metadata()["name"] == "driffusion"
    assert {one["name"] for one in client.get_model_metadata("shapes")["outputs"]} == {"image", "latents", "report"}
    assert client.get_model_config("shapes")["max_batch_size"] == 0
    before = client.get_inference_statistics("shapes")["model_stats"][0]["execution_count"]
    client.infer("shapes", inputs())
    assert client.get_inference_statistics()["model_stats"][0]["execution_count"] == before + 1
    assert client.get_model_repository_index()[0]["state"] == "READY"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("load_model", ("shapes",)), ("unload_model", ("shapes",)),
        ("get_system_shared_memory_status", ()), ("get_system_shared_memory_status", ("a/b",)),
        ("register_system_shared_memory", ("a", "/a", 1)), ("unregister_system_shared_memory", ()),
        ("unregister_system_shared_memory", ("a",)), ("get_cuda_shared_memory_status", ()),
        ("register_cuda_shared_memory", ("a", b"AAAA", 0, 1)), ("unregister_cuda_shared_memory", ()),
        ("get_trace_settings", ()), ("get_trace_settings", ("shapes",)), ("update_trace_settings", ()),
        ("get_log_settings", ()), ("update_log_settings", ({"log_info": True},)),
        ("get_model_metadata", ("other",)), ("get_model_config", ("shapes", "2")),
    ],
)  # fmt: skip
def test_refusals_are_read_by_the_client(client: Any, method: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(InferenceServerException) as refusal:
        getattr(client, method)(*arguments)
    assert "decoding" not in refusal.value.message()
    assert refusal.value.status() in ("400", "404")


def test_every_path_of_the_client_is_answered_or_refused(plain: httpx.Client) -> None:
    """The paths are those in its source; a foreign one gets the same shape of error."""
    source = inspect.getsource(inspect.getmodule(triton.InferenceServerClient) or triton)
    paths = sorted(set(re.findall(r'"(v2[^"]*)"', source)))
    assert len(paths) >= 30
    for path in (*paths, "v2/nowhere", "v2/models/shapes/versions/2", "v2/models/other/stats"):
        url = "/" + path.replace("versions/{}", "versions/1").replace("{}", "shapes")
        answers = {"GET": plain.get(url), "POST": plain.post(url, content=b"")}
        for method, answer in answers.items():
            if answer.status_code != 200:
                assert list(answer.json()) == ["error"] and isinstance(answer.json()["error"], str), (method, url)
        known = [one.status_code for one in answers.values() if one.status_code not in (404, 405)]
        assert bool(known) == (path in paths), url


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ([("prompt", "INT64", [1])], "must be BYTES"), ([("steps", "INT64", [3])], "prompt is missing"),
        ([("prompt", "BYTES", ["a"]), ("steps", "INT64", [3, 4])], "one element"),
        ([("prompt", "BYTES", ["a"]), ("step", "INT64", [3])], "did you mean"),
        ([("prompt", "BYTES", ["a"]), ("size", "INT64", [99999, 8])], "ends at"),
        ([("prompt", "BYTES", ["a"]), ("steps", "INT64", [0])], "num_inference_steps"),
        ([("prompt", "BYTES", ["a"]), ("guidance", "FP32", [np.nan])], "guidance_scale"),
        ([("prompt", "BYTES", [b"\xff"])], "UTF-8"),
        ([("prompt", "BYTES", ["a"]), ("seed", "INT64", [-2])], "seed"),
    ],
)  # fmt: skip
def test_bad_inputs(client: Any, given: list[Any], word: str) -> None:
    with pytest.raises(InferenceServerException, match=word) as refusal:
        client.infer("shapes", [tensor(*one) for one in given])
    assert refusal.value.status() == "400"


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (b"", None), (b"[]", None), (b"{", None), (b'{"inputs":[1]}', None), (b'{"inputs":[]}x', 13), (b"{}", 99),
        (b"[" * 100_000, None), (b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"data":[1]}]}', None),
        (b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[-1],"data":["a"]}]}', None),
        (b'{"inputs":[{"name":"prompt","datatype":"X","shape":[1],"data":["a"]}]}', None),
        (b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":9}}]}', None),
    ],
)  # fmt: skip
def test_damaged_bodies(plain: httpx.Client, body: bytes, length: int | None) -> None:
    headers = {"Inference-Header-Content-Length": str(length)} if length is not None else {}
    answer = plain.post("/v2/models/shapes/infer", content=body, headers=headers)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)
    assert plain.get("/v2/nowhere").json()["error"]


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_compressed_both_ways(client: Any, plain: httpx.Client, name: str) -> None:
    expected = client.infer("shapes", inputs()).as_numpy("image")
    ways = {"request_compression_algorithm": name, "response_compression_algorithm": name}
    assert np.array_equal(client.infer("shapes", inputs(), **ways).as_numpy("image"), expected)
    body, length = triton.InferenceServerClient.generate_request_body(inputs())
    sent = {"Inference-Header-Content-Length": str(length), "Accept-Encoding": name}
    answer = plain.post("/v2/models/shapes/infer", content=bytes(body), headers=sent)
    assert answer.headers["content-encoding"] == name
    listed = plain.post("/v2/models/shapes/infer", content=bytes(body), headers=sent | {"Accept-Encoding": "gzip, br"})
    assert "content-encoding" not in listed.headers


zipped = partial(gzip.compress, mtime=0)  # without the time, which would be part of the test's name


@pytest.mark.parametrize(
    ("content", "encoding", "status"),
    [
        (zipped(bytes(64 << 20)), "gzip", 413), (zlib.compress(bytes(64 << 20)), "deflate", 413),
        (b"no gzip", "gzip", 400), (zipped(b"{}")[:-4], "gzip", 400), (zipped(b"{}") + b"x", "gzip", 400),
        (b"{}", "br", 400), (zipped(zipped(b"{}")), "gzip, gzip", 400),
    ],
)  # fmt: skip
def test_bombs_and_damaged_compression(plain: httpx.Client, content: bytes, encoding: str, status: int) -> None:
    answer = plain.post("/v2/models/shapes/infer", content=content, headers={"Content-Encoding": encoding})
    assert answer.status_code == status and isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("form", ["pixels", "batch", "file"])
def test_an_image_to_start_from(client: Any, pipeline: Pipeline, form: str) -> None:
    pixels = np.random.default_rng().integers(0, 256, (64, 64, 3), np.uint8)
    start = Image.fromarray(pixels)
    expected = pipeline.generate(PROMPT, num_inference_steps=6, seed=5, image=start, strength=0.5)
    if form == "file":
        file = io.BytesIO()
        start.save(file, "PNG")
        image = triton.InferInput("image", [1], "BYTES")
        image.set_data_from_numpy(np.array([file.getvalue()], object))
    else:
        array = pixels if form == "pixels" else pixels[None]
        image = triton.InferInput("image", list(array.shape), "UINT8")
        image.set_data_from_numpy(array)
    given = [tensor("prompt", "BYTES", [PROMPT]), tensor("steps", "INT64", [6]), tensor("seed", "INT64", [5])]
    made = client.infer("shapes", [*given, tensor("strength", "FP32", [0.5]), image]).as_numpy("image")
    assert np.array_equal(made[0], np.asarray(expected.images[0]))
    assert {"image", "strength"} <= {one["name"] for one in client.get_model_metadata("shapes")["inputs"]}


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((64, 64), np.uint8), "height, width, 3"), (np.zeros((2, 64, 64, 3), np.uint8), "height, width, 3"),
        (np.zeros((0, 64, 3), np.uint8), "height, width, 3"), (np.zeros((1, 5000, 3), np.uint8), "end at 4096"),
        (np.zeros((5000, 2, 3), np.uint8), "end at 4096"), (np.array([b"no file"], object), "PNG"),
    ],
)  # fmt: skip
def test_what_is_no_image(client: Any, array: np.ndarray, word: str) -> None:
    image = triton.InferInput("image", list(array.shape), "BYTES" if array.dtype == object else "UINT8")
    image.set_data_from_numpy(array)
    with pytest.raises(InferenceServerException, match=word):
        client.infer("shapes", [tensor("prompt", "BYTES", ["a"]), image])


# what tritonclient sends for a prompt and a number of steps
RECORDED_HEAD = (
    b'{"inputs":[{"name":"prompt","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":10}},'
    b'{"name":"steps","shape":[1],"datatype":"INT64","parameters":{"binary_data_size":8}}],'
    b'"outputs":[{"name":"image","parameters":{"binary_data":true}}]}'
)
RECORDED = RECORDED_HEAD + b"\x06\x00\x00\x00a star" + b"\x03\x00\x00\x00\x00\x00\x00\x00"


def test_requests_byte_by_byte(plain: httpx.Client, client: Any, pipeline: Pipeline) -> None:
    """The body is the client's to the byte, and the answer is Triton's: JSON, its length in a header, then pixels."""
    given = [tensor("prompt", "BYTES", ["a star"]), tensor("steps", "INT64", [3])]
    wanted = [triton.InferRequestedOutput("image", binary_data=True)]
    body, length = triton.InferenceServerClient.generate_request_body(given, outputs=wanted)
    assert (bytes(body), length) == (RECORDED, len(RECORDED_HEAD))
    expected = pipeline.generate("a star", num_inference_steps=3).images[0].tobytes()
    with opened(plain) as raw:
        head = f"POST /v2/models/shapes/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(RECORDED)}\r\n"
        raw.sendall(f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode() + RECORDED)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(expected):
            answer += raw.recv(1 << 16)
    head_bytes, content = answer.split(b"\r\n\r\n", 1)
    fields = dict(line.lower().split(b": ", 1) for line in head_bytes.split(b"\r\n")[1:])
    size = int(fields[b"inference-header-content-length"])
    assert len(content) == int(fields[b"content-length"])
    entry = {"name": "image", "datatype": "UINT8", "shape": [1, 64, 64, 3], "parameters": {"binary_data_size": 12288}}
    assert json.loads(content[:size]) == {"model_name": "shapes", "model_version": "1", "outputs": [entry]}
    assert content[size:] == expected


def test_names_that_are_no_unicode_and_other_sites(plain: httpx.Client) -> None:
    answer = plain.post("/v2/models/shapes/infer", content=b'{"inputs":[{"name":"\\ud800","shape":[1],"data":[1]}]}')
    assert answer.status_code == 400 and answer.json()["error"]
    body = b'{"inputs":[{"name":"\\ud800","datatype":"INT8","shape":[1],"data":[1]}]}'
    assert plain.post("/v2/models/shapes/infer", content=body).status_code == 400
    evil = plain.post("/v2/models/shapes/infer", content=RECORDED, headers={"Origin": "https://evil.example"})
    assert evil.status_code == 403 and "--allow-origin" in evil.json()["error"]
    twice = b'{"inputs":[],"outputs":[{"name":"image"},{"name":"image"}]}'
    assert "twice" in plain.post("/v2/models/shapes/infer", content=twice).json()["error"]
