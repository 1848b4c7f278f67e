"""`python -m runtime.serve --cluster`: what it starts and ends, and its one message where that cannot be."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

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
