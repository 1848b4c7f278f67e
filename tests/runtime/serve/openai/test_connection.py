"""Clients that are slow, silent or too many."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, cast

import pytest

from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from runtime.serve.openai.connection import SPARE
from runtime.serve.openai.server import Server
from runtime.serve.service import Service
from tests.client import GENERATE, POST, PROMPT, ask, connect, opened, running, serving, until

LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_a_client_that_sends_slowly_is_told_and_holds_up_nobody(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(seconds=0.5)) as client:
        head = f"{POST}Content-Length: 99\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as slow:
            slow.settimeout(20)
            slow.sendall(head.encode() + b'{"prompt')
            assert ask(client, num_inference_steps=1)["data"]
            assert b" 408 " in slow.recv(4096)


@pytest.mark.parametrize("before", [b"", LIVE], ids=["first", "next"])
def test_a_client_that_never_ends_its_head_is_cut_off(pipeline: Pipeline, before: bytes) -> None:
    """Also when it sends a byte now and then, on a connection that has answered before or has not."""
    with serving(pipeline, Limits(seconds=0.6)) as client, opened(client) as slow:
        slow.sendall(before)
        answer = b""
        while before and not answer.endswith(b'"live"}'):
            answer += slow.recv(4096)
        start = time.monotonic()
        slow.settimeout(0.2)
        slow.sendall(b"GET / HTTP/1.1\r\n")
        with suppress(ConnectionError):
            while time.monotonic() - start < 5:
                slow.sendall(b"x")
                with suppress(TimeoutError):
                    assert slow.recv(4096) == b""
                    break
        assert 0.5 < time.monotonic() - start < 4
        assert client.get("/health/live").status_code == 200


def test_connections_have_a_limit(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(connections=3)) as client, connect(client.base_url.port or 0) as late:
        assert client.get("/v1/models").status_code == 200  # one, which stays open
        with opened(client), opened(client):
            assert late.get("/health/live").status_code == 200
            response = late.post(GENERATE, json={"prompt": PROMPT}, headers={"x-request-id": "mine"})
            assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_connections")
            assert response.headers["connection"] == "close" and int(response.headers["retry-after"]) > 0
            assert response.headers["x-request-id"] == "mine"
            assert client.get("/v1/models").status_code == 200
        until(lambda: late.get("/v1/models").status_code == 200)
        assert 'driffusion_requests_total{outcome="503"} 1.0' in client.get("/metrics").text


@contextmanager
def slow_reader(server: Server, port: int) -> Iterator[Callable[[], bytes]]:
    """A client whose answer, far larger than all buffers on its way, waits in the server; reads it to its end."""
    body = json.dumps({"prompt": PROMPT, "n": 10, "num_inference_steps": 2})
    with socket.socket() as slow:
        slow.settimeout(10)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(("127.0.0.1", port))
        slow.sendall(f"{POST}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: unsent(server) > 20_000)
        yield lambda: b"".join(iter(lambda: slow.recv(1 << 16), b""))


def unsent(server: Server) -> int:
    """Bytes of answers that clients do not take."""
    connections = list(server.server_state.connections)
    return sum(cast(Any, one).transport.get_write_buffer_size() for one in connections)


def whole(answer: bytes) -> bool:
    """Whether all ten images have arrived."""
    return len(json.loads(answer.split(b"\r\n\r\n", 1)[1])["data"]) == 10


def test_a_client_that_reads_slowly_holds_up_nobody(pipeline: Pipeline) -> None:
    server = Server(Service(pipeline, Limits()))
    with running(server, send_buffer=4096) as port, slow_reader(server, port) as rest, connect(port) as client:
        for seed in range(3):
            assert ask(client, seed=seed)["data"]
        assert unsent(server) > 20_000, "it has not read"
        assert whole(rest())


def test_draining_gives_slow_clients_what_is_left_of_its_time(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.serve.openai.server.LATE_SECONDS", 0.3)
    server = Server(Service(pipeline, Limits(drain=20)))
    with running(server, send_buffer=4096) as port, slow_reader(server, port) as rest:
        server.handle_exit(signal.SIGTERM, None)
        time.sleep(2)
        assert unsent(server) > 20_000, "it has not read"
        assert whole(rest())
        until(lambda: not server.server_state.connections)


def held(connections: list[socket.socket]) -> int:
    """How many of these the server has not closed."""
    for one in connections:
        one.setblocking(False)
    count = 0
    for one in connections:
        try:
            count += one.recv(1) != b""
        except BlockingIOError:
            count += 1
        except ConnectionError:
            pass
    return count


def test_idle_connections_beyond_the_limit_are_closed(pipeline: Pipeline) -> None:
    """Health checks are answered meanwhile, and so are the clients that were there before."""
    with serving(pipeline, Limits(connections=5)) as client, ExitStack() as stack:
        assert client.get("/health/live").status_code == 200
        idle = [stack.enter_context(opened(client)) for _ in range(200)]
        with connect(client.base_url.port or 0) as probe:
            assert probe.get("/health/live").status_code == 200
            assert probe.get("/v1/models").json()["error"]["code"] == "too_many_connections"
        assert client.get("/v1/models").status_code == 200
        until(lambda: held(idle) <= 4, 5)
        for one in idle:
            one.close()
        until(lambda: client.get("/v1/models").status_code == 200, 5)
        assert ask(client, num_inference_steps=1)["data"]


def test_few_connections_beyond_the_limit_are_open_at_once(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long they might be idle: the newest push out the oldest."""
    monkeypatch.setattr("runtime.serve.openai.connection.SPARE_SECONDS", 60.0)
    with serving(pipeline, Limits(connections=5)) as client, ExitStack() as stack:
        idle = [stack.enter_context(opened(client)) for _ in range(200)]
        until(lambda: held(idle) <= 5 + SPARE, 5)
        assert held(idle[:5]) == 5 and held(idle[-SPARE:]) == SPARE
        assert client.get("/health/live").status_code == 200


def test_a_health_check_beyond_the_limit_does_not_stay(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(connections=1)) as client:
        assert client.get("/health/live").status_code == 200  # the one that there may be
        with opened(client) as late:
            late.settimeout(3)  # others may be idle for five seconds
            late.sendall(LIVE)
            received = b"".join(iter(lambda: late.recv(4096), b""))
        assert received.startswith(b"HTTP/1.1 200 ") and received.endswith(b'{"status":"live"}')
