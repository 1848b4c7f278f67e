"""A Ray cluster of two nodes on this machine: two raylets, each with cores for one replica of two lanes."""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.client import connect, until, values

CORES = 2  # of a node
NAME = "driffusion"


class Cluster:
    """Ray's own cluster of processes, and what tests do to it."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own modules warn about themselves
            import ray
            from ray import serve
            from ray.cluster_utils import Cluster as Nodes

        self._serve, self._ray = serve, ray
        self.nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": CORES, "include_dashboard": False})
        self._second = self.nodes.add_node(num_cpus=CORES)
        ray.init(address=self.nodes.address, log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray").setLevel(logging.ERROR)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._start()
        self._settings: dict[str, Any] | None = None

    def run(self, **settings: Any) -> None:
        """Deploys an application, in the place of another one, and waits until it is ready."""
        from runtime.serve.ray import app

        if settings != self._settings:
            self._start()
            self._serve.run(app(settings), name=NAME, route_prefix="/")
            self._settings = settings

    def _start(self) -> None:
        """Starts Serve where it does not run, with one proxy: those of two nodes would share an address here."""
        self._serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})

    def delete(self) -> None:
        """The application; its cores are free then."""
        self._start()
        self._serve.delete(NAME)
        self._settings = None

    def applications(self) -> tuple[str, ...]:
        return tuple(self._serve.status().applications)

    def deployment(self, name: str) -> Any:
        return self._serve.status().applications[NAME].deployments[name]

    def replicas(self) -> set[str]:
        """Of the model, by their names in metrics."""
        found = (re.fullmatch(rf"SERVE_REPLICA::{NAME}#shapes#(\w+)", one["name"]) for one in self._actors())
        return {one[1] for one in found if one}

    def kill(self, replica: str) -> None:
        """The actor's process, in whatever it does."""
        actor = self._ray.get_actor(f"SERVE_REPLICA::{NAME}#shapes#{replica}", namespace="serve")
        self._ray.kill(actor, no_restart=True)

    def play(self, replica: str, function: Callable[[Any], Any]) -> None:
        """Calls a function in the process of a replica."""
        actor = self._ray.get_actor(f"SERVE_REPLICA::{NAME}#shapes#{replica}", namespace="serve")
        self._ray.get(actor.__ray_call__.remote(function))

    def handle(self, name: str) -> Any:
        """What the ingress asks replicas by."""
        return self._serve.get_deployment_handle(name, NAME)

    def drain_second_node(self) -> None:
        """As before a planned end: its replicas move to other nodes."""
        words = ["drain-node", "--address", self.nodes.address, "--node-id", self._second.node_id]
        words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        command = [Path(sys.executable).parent / "ray", *words, "--deadline-remaining-seconds", "70"]
        subprocess.run(command, check=True, capture_output=True)

    def kill_second_node(self) -> None:
        """Its raylet and all of its actors, at once."""
        self.nodes.remove_node(self._second, allow_graceful=False)

    def add_second_node(self) -> Any:
        """In the place of the one that it returns."""
        before, self._second = self._second, self.nodes.add_node(num_cpus=CORES)
        return before

    def settle(self, replicas: int, seconds: float = 60) -> None:
        """Waits until so many replicas run and no other is left."""

        def settled() -> bool:
            return dict(self.deployment("shapes").replica_states) == {"RUNNING": replicas}

        until(settled, seconds)

    def close(self) -> None:
        self._serve.shutdown()
        self._ray.shutdown()
        self.nodes.shutdown()

    def _actors(self) -> list[Mapping[str, str]]:
        found: list[Mapping[str, str]] = self._ray.util.list_named_actors(all_namespaces=True)
        return found


def busy(client: httpx.Client) -> set[str]:
    """The replicas that make an image, of those that answer."""
    running = {
        name for name, value in values(client).items() if name.startswith("driffusion_requests_running") and value
    }
    return {name.partition('replica="')[2].partition('"')[0] for name in running}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="make test-cluster installs it")
    made = Cluster()
    yield made
    made.close()


@pytest.fixture
def two(cluster: Cluster) -> Iterator[httpx.Client]:
    """A client of two replicas, one on each node."""
    cluster.run(models=[{"replicas": [2, 2]}])
    cluster.settle(2)
    with connect(cluster.port) as client:
        yield client
