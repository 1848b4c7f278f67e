"""What happens to a cluster under load: nothing that was accepted is lost, and images are those of a single server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI

from runtime.pipeline import Pipeline
from tests.client import PROMPT, ask, connect, decoded, expected, received, same, until
from tests.runtime.serve.ray.conftest import Cluster, busy

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]
MODEL = {"replicas": [1, 2], "seconds": 0.5, "up": 1, "down": 3}


class Load:
    """Closed-loop clients, each with seeds of its own, and what they got."""

    def __init__(self, port: int, clients: int, steps: int) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self._port, self._clients, self._steps = port, clients, steps
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Raises what a client met."""
        with ThreadPoolExecutor(self._clients) as pool:
            running = [pool.submit(self._ask, number * 10_000) for number in range(self._clients)]
            try:
                yield
            finally:
                self._stop.set()
            for one in running:
                one.result()

    def check(self, pipeline: Pipeline, rng: np.random.Generator) -> None:
        """Some of the images, against this process' own."""
        assert len(self.answers) >= 2 * self._clients
        for number in rng.choice(len(self.answers), 6, replace=False):
            seed, answer = self.answers[number]
            assert same(received(answer), expected(pipeline, seed=seed, num_inference_steps=self._steps), within=2)

    def _ask(self, seed: int) -> None:
        with connect(self._port) as client:
            while not self._stop.is_set():
                self.answers.append((seed, ask(client, seed=seed, num_inference_steps=self._steps)))
                seed += 1


def test_an_upgrade_under_load_loses_nothing(
    cluster: Cluster, two: httpx.Client, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    before, load = cluster.replicas(), Load(cluster.port, 4, 20)
    with load.running():
        cluster.run(models=[{"replicas": [2, 2]}], revision="2")
        cluster.settle(2)
    assert not before & cluster.replicas(), "all of them are new"
    load.check(pipeline, rng)


def test_a_node_that_is_drained_under_load_loses_nothing(
    cluster: Cluster, two: httpx.Client, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    """As the pods of deploy/kubernetes/rayservice.yaml are before they end."""
    before, load = cluster.replicas(), Load(cluster.port, 4, 20)
    with load.running():
        cluster.drain_second_node()
        leaving = cluster.add_second_node()
        until(lambda: len(cluster.replicas() - before) == 1, 60)  # on the new node
        cluster.settle(2, 90)
        cluster.nodes.remove_node(leaving, allow_graceful=False)
        time.sleep(2)
    load.check(pipeline, rng)
    cluster.run(models=[{"replicas": [2, 2]}], revision="for a node that may be counted still")
    cluster.settle(2)


def test_a_replica_whose_lane_hangs_is_drained_and_replaced(
    cluster: Cluster, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own readiness is the replica's health; what it has accepted is still answered."""
    from runtime.serve.ray import application

    monkeypatch.setattr(application, "HEALTH_SECONDS", 0.5)
    cluster.run(models=[{}])
    cluster.settle(1)
    (sick,) = cluster.replicas()

    def hang(_: Any) -> None:
        from runtime.lanes import Lanes

        Lanes.overdue = lambda self, seconds: (0,)  # type: ignore[method-assign]

    with ThreadPoolExecutor(1) as pool, connect(cluster.port) as client:
        asked = pool.submit(ask, client, seed=3, num_inference_steps=900, mode="sequential")
        with connect(cluster.port) as other:
            until(lambda: len(busy(other)) == 1)
        cluster.play(sick, hang)
        until(lambda: bool(cluster.replicas() - {sick}), 60)
        answer = asked.result()
    assert same(received(answer), expected(pipeline, seed=3, num_inference_steps=900, mode="sequential"), within=2)
    cluster.settle(1)
    assert sick not in cluster.replicas()


def test_what_ray_reserves_for_a_replica() -> None:
    from ray import serve
    from ray.serve.config import AutoscalingConfig

    from runtime.serve.ray.application import options
    from runtime.serve.ray.replica import Replica
    from runtime.serve.ray.settings import read_settings

    def reserved(**model: Any) -> dict[str, Any]:
        settings = read_settings({"models": [model], "limits": {"queue": 7, "drain": 9}})
        found = options(settings.models[0], settings)
        serve.deployment(Replica).options(**found)  # Ray refuses an actor that does not fit into its bundle
        return found

    several = reserved(devices="cuda:0,cuda:1", replicas=(1, 3), up=4)
    assert several["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 2.0}]
    assert several["placement_group_strategy"] == "STRICT_PACK"
    assert several["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": 2.0}
    scaling = several["autoscaling_config"]
    assert isinstance(scaling, AutoscalingConfig)
    assert (scaling.min_replicas, scaling.max_replicas, scaling.upscale_delay_s) == (1, 3, 4)
    lanes = reserved(devices="cpu*2", replicas=(2, 2))
    assert "placement_group_bundles" not in lanes
    assert (lanes["num_replicas"], lanes["ray_actor_options"]["num_cpus"]) == (2, 2.0)
    assert (lanes["max_queued_requests"], lanes["graceful_shutdown_timeout_s"]) == (7, 9.0)


def test_a_node_that_dies_in_mid_image(
    cluster: Cluster, two: httpx.Client, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    """Both replicas make images; one of them is on the node that dies."""
    seeds = [int(one) for one in rng.integers(0, 2**32, 6)]
    with ThreadPoolExecutor(len(seeds)) as pool:

        def image(seed: int) -> dict[str, Any]:
            with connect(cluster.port) as client:
                return ask(client, seed=seed, num_inference_steps=150, mode="sequential")

        asked = [pool.submit(image, seed) for seed in seeds]
        until(lambda: len(busy(two)) == 2)
        cluster.kill_second_node()
        answers = [one.result() for one in asked]
    for seed, answer in zip(seeds, answers, strict=True):
        wanted = expected(pipeline, seed=seed, num_inference_steps=150, mode="sequential")
        assert same(received(answer), wanted, within=2)
    cluster.add_second_node()
    cluster.settle(2, 90)


def test_it_scales_up_under_load_and_back_and_loses_nothing(
    cluster: Cluster, pipeline: Pipeline, rng: np.random.Generator
) -> None:
    cluster.run(models=[MODEL])
    cluster.settle(1)
    load = Load(cluster.port, 6, 40)
    with load.running():
        until(lambda: cluster.deployment("shapes").replica_states.get("RUNNING") == 2, 90)
        time.sleep(2)
    load.check(pipeline, rng)
    lone = Load(cluster.port, 1, 2)
    with lone.running():
        cluster.settle(1, 90)
        until(lambda: len(lone.answers) >= 6)
    lone.check(pipeline, rng)


def test_real_clients(cluster: Cluster, two: httpx.Client, pipeline: Pipeline) -> None:
    import tritonclient.http as triton

    extra = {"num_inference_steps": 4, "seed": 7}
    (wanted,) = expected(pipeline, num_inference_steps=4, seed=7)
    openai = OpenAI(base_url=f"http://127.0.0.1:{cluster.port}/v1", api_key="none")
    whole = openai.images.generate(prompt=PROMPT, model="shapes", extra_body=extra)
    assert whole.data
    assert np.array_equal(decoded(whole.data[0].b64_json or ""), wanted)
    stream = openai.images.generate(prompt=PROMPT, model="shapes", stream=True, partial_images=2, extra_body=extra)
    *previews, last = list(stream)
    assert [one.type for one in previews] == ["image_generation.partial_image"] * 2
    assert np.array_equal(decoded(last.b64_json), wanted)

    client = triton.InferenceServerClient(f"127.0.0.1:{cluster.port}")
    assert client.is_server_ready()
    assert client.is_model_ready("shapes")
    given = {"prompt": np.array([PROMPT], object), "steps": np.array([4]), "seed": np.array([7], np.uint64)}
    kinds = {"prompt": "BYTES", "steps": "INT64", "seed": "UINT64"}
    inputs = []
    for name, value in given.items():
        inputs.append(triton.InferInput(name, list(value.shape), kinds[name]))
        inputs[-1].set_data_from_numpy(value)
    result = client.infer("shapes", inputs)
    assert np.array_equal(result.as_numpy("image")[0], wanted)
    assert client.get_inference_statistics("shapes")["model_stats"][0]["inference_stats"]["success"]["count"] >= 1
    client.close()
