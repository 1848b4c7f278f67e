"""The real tritonclient over HTTP, in the process of the server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from runtime.pipeline import Pipeline
from tests.client import PROMPT, serving


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
