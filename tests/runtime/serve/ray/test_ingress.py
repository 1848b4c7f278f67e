"""What clients see of a cluster: the answers of a single server, also when replicas die in the middle of an image."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from runtime.pipeline import Pipeline
from tests.client import GENERATE, PROMPT, ask, connect, decoded, expected, received, same, until, values
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


def test_a_client_that_leaves_frees_the_lanes(cluster: Cluster, two: httpx.Client) -> None:
    with connect(cluster.port) as other, pytest.raises(httpx.ReadTimeout):
        other.post(GENERATE, json={"prompt": PROMPT, "num_inference_steps": 900, "mode": "sequential"}, timeout=1.5)
    until(lambda: not busy(two), 3)
    outcomes = [name for name in values(two) if name.startswith("driffusion_cluster_requests_total")]
    assert any('outcome="499"' in name for name in outcomes), outcomes
