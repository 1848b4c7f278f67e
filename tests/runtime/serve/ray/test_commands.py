"""The commands of the READMEs: a cluster of `ray start`, the server on it, and Ray Serve's own command line."""
# covers: runtime/serve/ray/serve.yaml

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from runtime.pipeline import Pipeline
from tests import ROOT
from tests.client import ask, connect, expected, received, same, until, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]
BIN = Path(sys.executable).parent
README, MORE = (ROOT / name for name in ("README.md", "runtime/serve/ray/README.md"))


def commands(readme: Path) -> list[str]:
    """The lines of its block on clusters, without comments, with this environment's programs."""
    (block,) = re.findall(r"# More than one machine\n.*?```bash\n(.*?)```", readme.read_text(), re.DOTALL)
    return [line.split("  #")[0].strip().replace(".venv/bin/", f"{BIN}/") for line in block.splitlines()]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


class Started:
    """What `ray start --head` began, on ports of its own beside other clusters of this machine."""

    def __init__(self, stack: ExitStack) -> None:
        pytest.importorskip("ray", reason="make test-cluster installs it")
        self._stack = stack
        # not below pytest's folders: paths of sockets are short
        self._folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        self.port, self.dashboard = free_port(), free_port()
        install, head, self.node, self.serve, test = commands(README)
        assert install.endswith("-m pip install --editable '.[cluster]'")
        assert test == "make test-cluster"
        self.ray(head, "--port", self.port, "--dashboard-port", self.dashboard)
        until(self._answers, 60)

    def ray(self, command: str, *options: Any) -> None:
        """One that stays until the end of the test, with what keeps clusters of one machine apart."""
        options = (*options, "--num-cpus", 4, "--dashboard-agent-listen-port", free_port(), "--block")
        if "--head" in command:
            options = (*options, "--temp-dir", self._folder)
        words = [*shlex.split(command), *map(str, options)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)  # and all that it started

    def _answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.dashboard}/api/version", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False


def environment(**more: str) -> dict[str, str]:
    """Ray's processes find this tree, too."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@pytest.fixture
def started() -> Iterator[Started]:
    with ExitStack() as stack:
        yield Started(stack)


def test_the_readmes_commands_serve_on_two_nodes(started: Started, pipeline: Pipeline, tmp_path: Path) -> None:
    started.ray(started.node.replace("FIRST:6379", f"127.0.0.1:{started.port}"))
    words = [*shlex.split(started.serve), "--port", str(free_port())]
    log, known = tmp_path / "log", environment(RAY_ADDRESS=f"127.0.0.1:{started.port}")
    with log.open("wb") as output, subprocess.Popen(words, cwd=ROOT, stderr=output, env=known) as server:
        port = int(wait_for(r"http://127.0.0.1:(\d+) \(Ctrl-C", log, server)[1])
        with connect(port) as client:
            assert same(received(ask(client, seed=5)), expected(pipeline, seed=5), within=2)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0


def serve(started: Started, *words: str) -> str:
    """Ray Serve's command line; what it says."""
    address = ("--address", f"http://127.0.0.1:{started.dashboard}")
    done = subprocess.run([BIN / "serve", *words, *address], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_serve_deploy_takes_the_config_and_two_applications_on_one_store_are_one_message(
    started: Started, pipeline: Pipeline, tmp_path: Path
) -> None:
    (command,) = commands(MORE)
    program, word, file = shlex.split(command)
    assert (Path(program).name, word) == ("serve", "deploy")
    config = yaml.safe_load((ROOT / file).read_text())
    (first,) = config["applications"]
    config["http_options"]["port"] = port = free_port()
    first["args"]["build"] = str(ROOT / "build")
    path = tmp_path / "serve.yaml"

    def deploy(*applications: Any) -> None:
        path.write_text(yaml.safe_dump({**config, "applications": applications}))
        serve(started, "deploy", str(path))

    def status(name: str) -> str:
        told = yaml.safe_load(serve(started, "status"))["applications"].get(name, {})
        return str(told.get("status")) + "".join(one["message"] for one in told.get("deployments", {}).values())

    deploy(first)
    until(lambda: status("driffusion") == "RUNNING", 120)
    with connect(port) as client:
        assert same(received(ask(client, seed=5)), expected(pipeline, seed=5), within=2)
        second = {**first, "name": "second", "route_prefix": "/second"}
        second["args"] = {**first["args"], "models": [{"devices": "cpu@1"}]}
        second["args"]["models"][0]["replicas"] = [1, 1]
        deploy(first, second)
        words = "the application 'driffusion' of this cluster uses "
        until(lambda: words in status("second"), 120)
        assert ask(client)["data"]
