"""`python -m runtime.serve --cluster`: what it starts and ends, and its one message where that cannot be."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from engines.errors import EngineError
from tests.client import ask, connect, wait_for
from tests.runtime.serve.ray.conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


def command(cluster: Cluster, *options: str) -> list[str]:
    words = [sys.executable, "-m", "runtime.serve", "--cluster", cluster.nodes.address, "--port", str(cluster.port)]
    return [*words, "--devices", "cpu*2", *options]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cluster", "127.0.0.1:1"], "there is no Ray cluster at 127.0.0.1:1 ("),
        (["--devices", "cpu*3"], "needs 3 CPU on one node, and no node has that (at most 2 CPU)"),
        (["--model", "nope"], "there is no exported model 'nope' (exported: "),
        (["--port", "1"], "Ray Serve runs on this cluster with another port than 1"),
    ],
    ids=["no cluster", "no node", "no model", "other port"],
)
def test_what_cannot_be_started_is_one_message(cluster: Cluster, options: list[str], words: str) -> None:
    cluster.delete()
    done = subprocess.run(command(cluster, *options), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_cluster_that_is_over_is_one_message(cluster: Cluster) -> None:
    """Ray's own client would try for minutes, and then end the process."""
    words = [sys.executable, "-m", "runtime.serve", "--cluster", "--devices", "cpu*2"]
    over = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=over)
    assert done.returncode == 1
    assert re.fullmatch(r"error: there is no Ray cluster at \S+:1 \(.*refused\): start one with .*\n", done.stderr)


def test_no_cluster_at_all_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    from runtime.serve.ray.launch import join

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", set)  # not those of other tests
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    with pytest.raises(EngineError, match=r"no Ray cluster on this machine \(.*\): start one with `ray start --head`"):
        join("auto")


def test_what_is_served_already_is_not_served_twice(cluster: Cluster, two: httpx.Client) -> None:
    done = subprocess.run(command(cluster), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: the application 'driffusion' is on this cluster already: end the one that runs"
    )
    assert ask(two)["data"]


def test_another_application_at_the_same_address_is_one_message(cluster: Cluster, two: httpx.Client) -> None:
    """The first one goes on; the second one is not left behind."""
    code = (
        "import sys; from engines.command import exit_code; from runtime.serve.ray.launch import run; "
        "from runtime.serve.ray.settings import read_settings; "
        "settings = read_settings({'models': [{'devices': 'cpu*1'}]}); "
        f"sys.exit(exit_code(lambda: run(settings, {cluster.nodes.address!r}, '127.0.0.1', {cluster.port}, 'other')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    told = 'error: Prefix / is being used by application "driffusion". Failed to deploy application "other". Delete '
    assert done.stderr.splitlines()[-1].startswith(told)
    assert ask(two)["data"]
    assert set(cluster.applications()) == {"driffusion"}


def test_it_serves_until_a_signal_and_finishes_what_was_accepted(cluster: Cluster, tmp_path: Path) -> None:
    cluster.delete()
    log = tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen(command(cluster, "--replicas", "2"), stderr=output) as server:
        wait_for(r"http://127.0.0.1:(\d+) \(Ctrl-C", log, server)
        with connect(cluster.port) as client, ThreadPoolExecutor(3) as pool:
            made = [pool.submit(ask, client, num_inference_steps=200, seed=n) for n in range(3)]
            with pytest.raises(StopIteration):
                next(one for one in made if one.done())
            server.send_signal(signal.SIGTERM)
            assert all(one.result()["data"] for one in made)
        assert server.wait(60) == 0
