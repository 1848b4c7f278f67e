"""What clients see of a cluster: the answers of a single server, also when replicas die in the middle of an image."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from engines.manifest import MANIFEST
from engines.store import Bundle
from runtime.pipeline import Pipeline
from tests.client import (
    GENERATE,
    PROMPT,
    ask,
    connect,
    decoded,
    expected,
    files,
    received,
    refused,
    same,
    until,
    values,
)  # fmt: skip
from tests.runtime.serve.ray.conftest import Cluster, busy

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]
LONG = 300  # steps of an image that takes seconds


def seeds(rng: np.random.Generator, count: int) -> list[int]:
    return [int(one) for one in rng.integers(0, 2**32, count)]


def test_images_are_those_of_a_single_server(
    cluster: Cluster, two: httpx.Client, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    modes = ("sequential", "aggressive", "srds", "conservative") * 3
    wanted = [{"seed": seed, "mode": mode} for seed, mode in zip(seeds(rng, len(modes)), modes, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda one: ask(two, n=2, **one), wanted))
    for answer, one in zip(answers, wanted, strict=True):
        assert same(received(answer), expected(pipeline, num_images_per_prompt=2, **one), within=2)
    spread = {name: value for name, value in values(two).items() if name.startswith("driffusion_requests_total")}
    assert len(spread) == 2, spread
    assert min(spread.values()) >= 2, "both replicas work"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_replica_that_dies_in_mid_image_is_replaced_by_another(
    cluster: Cluster, two: httpx.Client, pipeline: Pipeline, rng: np.random.Generator, *, streamed: bool
) -> None:
    (seed,) = seeds(rng, 1)
    body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": LONG, "mode": "sequential", "stream": streamed}
    body |= {"partial_images": 3} if streamed else {}
    events, answers = list[dict[str, Any]](), list[httpx.Response]()
    previewed = threading.Event()

    def read() -> None:
        with connect(cluster.port) as other, other.stream("POST", GENERATE, json=body) as response:
            if not streamed:
                response.read()
            else:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        events.append(json.loads(line.removeprefix("data: ")))
                        previewed.set()
            answers.append(response)

    reader = threading.Thread(target=read)
    reader.start()
    if streamed:
        assert previewed.wait(30)
    until(lambda: len(busy(two)) == 1)
    (victim,) = busy(two)
    cluster.kill(victim)
    reader.join(60)
    assert answers[0].status_code == 200
    (image,) = expected(pipeline, seed=seed, num_inference_steps=LONG, mode="sequential")
    if streamed:
        kinds = [one["type"].rpartition(".")[2] for one in events]
        assert kinds == ["partial_image"] * 3 + ["completed"]
        assert [one.get("partial_image_index") for one in events[:3]] == [0, 1, 2]
        assert np.array_equal(decoded(events[-1]["b64_json"]), image)
    else:
        assert same(received(answers[0].json()), [image])
    retries = [value for name, value in values(two).items() if name.startswith("driffusion_cluster_retries_total")]
    assert sum(retries) >= 1
    cluster.settle(2)
    assert victim not in cluster.replicas()


def test_a_request_whose_replicas_die_three_times_is_given_up(cluster: Cluster, two: httpx.Client) -> None:
    killed = set[str]()
    body = {"prompt": PROMPT, "num_inference_steps": 900, "mode": "sequential"}
    with ThreadPoolExecutor(1) as pool, connect(cluster.port) as other:
        asked = pool.submit(other.post, GENERATE, json=body)
        for _ in range(3):
            until(lambda: bool(busy(two) - killed), 60)
            (victim,) = busy(two) - killed
            cluster.kill(victim)
            killed.add(victim)
        response = asked.result()
    assert "3 in a row" in refused(response, 503, None, "replica_died")
    assert response.headers["retry-after"]


def test_a_request_that_is_asked_again_takes_the_place_of_the_first(cluster: Cluster, pipeline: Pipeline) -> None:
    """One image is made of an id at a time, whoever asks again."""
    from runtime.serve.ray.message import Asked

    cluster.run(models=[{}])
    handle = cluster.handle("shapes").options(method_name="answer", stream=True)

    def body(steps: int) -> bytes:
        return json.dumps({"prompt": PROMPT, "seed": 5, "mode": "sequential", "num_inference_steps": steps}).encode()

    headers = ((b"host", b"localhost"), (b"content-type", b"application/json"))
    asked = Asked("one id", 60.0, 0, "POST", GENERATE, b"", headers, body(900))
    with connect(cluster.port) as client:
        first = handle.remote(asked)
        until(lambda: len(busy(client)) == 1)
        started = time.monotonic()
        parts = list(handle.remote(asked._replace(body=body(3))))
        assert all(part.status in (0, 499) for part in first), "it was cancelled"
        assert time.monotonic() - started < 3
        until(lambda: not busy(client), 3)
    assert parts[0].status == 200
    image = received(json.loads(b"".join(part.body for part in parts)))
    assert same(image, expected(pipeline, seed=5, mode="sequential"), within=2)


def test_the_deadline_reaches_the_replica(cluster: Cluster) -> None:
    cluster.run(models=[{}], limits={"seconds": 1.5})
    body = {"prompt": PROMPT, "num_inference_steps": 900, "mode": "sequential"}
    with connect(cluster.port) as client:
        started = time.monotonic()
        refused(client.post(GENERATE, json=body), 504, None, "deadline_exceeded")
        assert time.monotonic() - started < 3
        until(lambda: not busy(client), 3)


def test_ids_of_requests_pass_through(cluster: Cluster, two: httpx.Client) -> None:
    for path, body in ((GENERATE, {"prompt": PROMPT, "num_inference_steps": 1}), ("/v1/models", None)):
        given = {"X-Request-ID": "mine"}
        answer = two.get(path, headers=given) if body is None else two.post(path, json=body, headers=given)
        assert answer.headers.get_list("x-request-id") == ["mine"], "Ray's proxy adds one of its own"
        if body is not None:
            assert answer.json()["report"]["request_id"] == "mine"


def test_models_are_chosen_by_name(cluster: Cluster, shapes: Bundle, pipeline: Pipeline, tmp_path: Path) -> None:
    """Several in one application: a deployment each, and the first one for requests that name none."""
    (tmp_path / "shapes").symlink_to(shapes.folder)
    shutil.copytree(shapes.folder, tmp_path / "other")
    manifest = tmp_path / "other" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"model": "other"}))
    cluster.run(models=[{"model": "shapes"}, {"model": "other"}], build=tmp_path)
    wanted = expected(pipeline, seed=5)
    with connect(cluster.port) as client:
        for named in ({"model": "other"}, {"model": "shapes"}, {}):
            assert same(received(ask(client, seed=5, **named)), wanted)
        image = {"image": ("one.png", files(ask(client, seed=5))[0], "image/png")}
        fields = {"prompt": PROMPT, "model": "other", "num_inference_steps": "3"}
        assert client.post("/v1/images/edits", data=fields, files=image).status_code == 200
        tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}
        assert client.post("/v2/models/other/infer", json={"inputs": [tensor]}).status_code == 200
        made = dict.fromkeys(("shapes", "other"), 0.0)
        for name, value in values(client).items():
            if name.startswith("driffusion_requests_total") and 'outcome="200"' in name:
                made[name.partition('model="')[2].partition('"')[0]] += value
        assert made == {"shapes": 3, "other": 3}
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["shapes", "other"]
        for path in ("/v1/models/other", "/v2/models/other", "/v2/models/other/ready"):
            assert client.get(path).status_code == 200, path
        unknown = client.post(GENERATE, json={"prompt": PROMPT, "model": "nope"})
        assert "'shapes', 'other'" in refused(unknown, 404, "model", "model_not_found")


def test_a_client_that_leaves_frees_the_lanes(cluster: Cluster, two: httpx.Client) -> None:
    with connect(cluster.port) as other, pytest.raises(httpx.ReadTimeout):
        other.post(GENERATE, json={"prompt": PROMPT, "num_inference_steps": 900, "mode": "sequential"}, timeout=1.5)
    until(lambda: not busy(two), 3)
    outcomes = [name for name in values(two) if name.startswith("driffusion_cluster_requests_total")]
    assert any('outcome="499"' in name for name in outcomes), outcomes
