"""`python -m runtime.serve`: its options, its start and its end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engines.store import Bundle
from runtime.serve.__main__ import KEYS_VARIABLE, listen, main, read_keys
from tests.client import GENERATE, PROMPT, ask, connect, events, process, received, values, wait_for

HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "matplotlib")


def test_keys_come_from_a_file_and_the_environment(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the office\none\n\n two \n  #three\n")
    monkeypatch.setenv(KEYS_VARIABLE, "three,, four")
    assert read_keys(path) == ("one", "two", "three", "four")
    assert read_keys(None) == ("three", "four")
    path.write_text("\n# none yet\n")
    monkeypatch.setenv(KEYS_VARIABLE, "")
    with pytest.raises(Exception, match="holds no API key"):
        read_keys(path)
    with pytest.raises(Exception, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(shapes: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(4) as pool:
        made = [pool.submit(ask, client, num_inference_steps=100, seed=n) for n in range(4)]
        while values(client)["driffusion_queue_depth"] < 4:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        wait_for("Shutting down: 4 requests", log, server)
        refused = client.post(GENERATE, json={"prompt": PROMPT})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        unready = client.get("/health/ready")
        assert (unready.status_code, unready.json()) == (503, {"status": "draining"})
        assert client.get("/health/live").status_code == 200
        assert all(one.result()["data"] for one in made)
        assert server.wait(30) == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_finished_in_time_is_given_up_and_told(stream: bool, shapes: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = {"prompt": PROMPT, "num_inference_steps": 999, "n": 1, "mode": "sequential", "stream": stream}
    if stream:
        body["partial_images"] = 3
    with process(shapes, log, "--drain", "1") as (server, port), connect(port) as client, ThreadPoolExecutor(1) as pool:
        made = pool.submit(client.post, GENERATE, json=body)
        while values(client)["driffusion_requests_running"] < 1:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        response = made.result()
        if stream and response.status_code == 200:
            assert events(response)[-1]["error"]["code"] == "shutting_down"
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert server.wait(30) == 0
    assert "1 requests were cancelled" in log.read_text() and "Traceback" not in log.read_text()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_the_image_is_finished(shapes: Bundle, tmp_path: Path, stop: signal.Signals) -> None:
    log = tmp_path / "log"
    with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(1) as thread:
        assert client.get("/health/ready").status_code == 200
        image = thread.submit(ask, client, num_inference_steps=60)
        time.sleep(0.5)
        server.send_signal(stop)
        assert len(received(image.result())) == 1
        assert server.wait(30) == 0
    lines = log.read_text().splitlines()
    assert not [line for line in lines if "Traceback" in line or "ERROR" in line]
    imported = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}
    assert "onnxruntime" in imported
    assert not imported & set(HEAVY)


def test_a_second_interrupt_does_not_wait(shapes: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(shapes, log) as (server, port), connect(port) as client, ThreadPoolExecutor(1) as thread:
        image = thread.submit(ask, client, num_inference_steps=999, n=4)
        time.sleep(0.5)
        server.send_signal(signal.SIGINT)
        wait_for("Shutting down", log, server)
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 1
        assert image.exception()


def start(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "runtime.serve", *options], capture_output=True, text=True, timeout=60)


def test_a_port_in_use_is_one_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start("--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")
    assert "Address already in use" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--port", "65536"),
        ("--port", "0", "--model", "nothing"),
        ("--port", "0", "--max-side", "63"),
        ("--port", "0", "--scheduler", "heun3"),
        ("--port", "0", "--replicas", "2"),
    ],
    ids=lambda options: options[-2],
)
def test_what_cannot_be_served_is_one_message(options: tuple[str, ...]) -> None:
    done = start(*options)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*(: choose|: make|; name one of|: a server).*\n", done.stderr)


def test_a_cluster_without_ray_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    monkeypatch.setattr(sys, "argv", ["serve", "--cluster", "--devices", "cpu*2"])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert main() == 1
    assert capsys.readouterr().err == "error: --cluster needs ray: pip install --editable '.[cluster]'\n"


def test_the_end_of_an_answer_does_not_wait_until_its_beginning_is_confirmed() -> None:
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_scheduler_of_requests_that_name_none(shapes: Bundle, tmp_path: Path) -> None:
    with process(shapes, tmp_path / "log", "--scheduler", "euler") as (_, port), connect(port) as client:
        assert ask(client)["report"]["scheduler"] == "euler"
        assert ask(client, scheduler="ddim")["report"]["scheduler"] == "ddim"
        assert client.get("/v1/models/shapes").json()["defaults"]["scheduler"] == "euler"
        body = client.get("/openapi.json").json()["paths"][GENERATE]["post"]["requestBody"]["content"]
        assert body["application/json"]["schema"]["properties"]["scheduler"]["default"] == "euler"
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 403


def test_names_and_origins_are_options(shapes: Bundle, tmp_path: Path) -> None:
    options = ["--allowed-hosts", "Images.example.com:443, other.example", "--allow-origin", "https://a.example"]
    options += ["--allow-origin", "http://b.example:3000"]
    with process(shapes, tmp_path / "log", *options) as (_, port), connect(port) as client:
        for host in ("images.example.com", "other.example:8000", "localhost"):
            assert client.get("/health/live", headers={"Host": host}).status_code == 200
        assert client.get("/health/live", headers={"Host": "evil.example"}).status_code == 403
        for origin in ("https://a.example", "http://b.example:3000"):
            answer = client.get("/v1/models", headers={"Origin": origin})
            assert answer.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://example.com/page", "ftp://a", ""])
def test_what_is_no_origin_is_one_message(origin: str) -> None:
    done = start("--port", "0", "--allow-origin", origin)
    assert done.returncode == 2 and "write https://HOST" in done.stderr
