"""Who may ask: keys, host names, origins."""

from __future__ import annotations

import socket

import httpx
import pytest

from runtime.pipeline import Pipeline
from runtime.serve.access import Access, host_name
from tests.client import GENERATE, JSON, PROMPT, ask, refused, serving

HOSTS = {"localhost", "LocalHost:8000", "a.localhost", "127.0.0.1", "127.0.0.1:80", "127.9.9.9", "[::1]", "[::1]:8000"}
FOREIGN = {"evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.7", "",
           "[2001:db8::1]:80", "127.1", "2130706433", "[::1", "localhost@evil.example"}  # fmt: skip


def test_keys(pipeline: Pipeline) -> None:
    with serving(pipeline, access=Access(keys=("secret-1", "schlüssel"))) as client:
        body = {"prompt": PROMPT, "num_inference_steps": 1}
        for header in (
            {}, {"Authorization": "Bearer secret"}, {"Authorization": "Bearer secret-12"},
            {"Authorization": "secret-1"},
            {"Authorization": "Basic secret-1"}, {"Authorization": "Bearer"}, {"Authorization": "Bearersecret-1"},
        ):  # fmt: skip
            answer = client.post(GENERATE, json=body, headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in (b"secret-1", "schlüssel".encode(), "schlüssel".encode("latin-1")):
            for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
                assert client.post(GENERATE, json=body, headers={b"Authorization": scheme + key}).status_code == 200
        for key in (b"schlussel", "schlÃ¼sse".encode(), b"schl\xffssel"):
            assert client.post(GENERATE, json=body, headers={b"Authorization": b"Bearer " + key}).status_code == 401
        assert client.get("/health/live").status_code == 200
        assert client.get("/v1/models").status_code == client.get("/v1/models/shapes").status_code == 401


# --- host names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost"])
def test_a_local_server_answers_to_loopback_names(bound: str) -> None:
    access = Access.of_server(bound, (), (), ())
    assert {host for host in HOSTS | FOREIGN if access.has_host(host)} == HOSTS
    assert access.has_host(None), "HTTP/1.0 without the header"


def test_a_server_for_others_answers_to_its_addresses_and_names() -> None:
    access = Access.of_server("0.0.0.0", (), ("images.example.com",), ())
    for host in (*HOSTS, "10.0.0.7:8000", "[2001:db8::1]:80", "images.example.com:443", socket.gethostname()):
        assert access.has_host(host), host
    for host in ("evil.example", "www.images.example.com", "images.example.com.evil.example", ""):
        assert not access.has_host(host), host
    assert Access.of_server("127.0.0.1", (), ("*",), ()).has_host("evil.example")
    assert Access.of_server("server.example", (), (), ()).has_host("Server.Example.:8000")


def test_host_names_lose_port_case_brackets_and_final_dot() -> None:
    given = ("A.Example:80", "a.example.", "[::1]:8000", "::1", " a ")
    assert [host_name(host) for host in given] == ["a.example", "a.example", "::1", "", "a"]


@pytest.mark.parametrize("path", ["/", "/v1/models", "/health/live", "/metrics", "/openapi.json", "/nothing"])
def test_a_foreign_host_is_refused_everywhere(client: httpx.Client, path: str) -> None:
    """A page whose name resolves to this machine reads nothing, and no answer sends anyone there."""
    answer = client.get(path, headers={"Host": "evil.example"})
    assert "--allowed-hosts evil.example" in refused(answer, 403, None, "host_not_allowed")
    assert "evil.example" not in str(answer.headers)
    made = client.post(GENERATE, json={"prompt": PROMPT}, headers={"Host": "evil.example:8000"})
    refused(made, 403, None, "host_not_allowed")


def test_no_route_redirects(pipeline: Pipeline) -> None:
    with serving(pipeline, access=Access(hosts=("*",))) as client:
        for path in ("/v1/models/", "/health/live/", "/v1/images/generations/", "/%2Fevil.example/", "/metrics/"):
            answer = client.get(path, headers={"Host": "evil.example"})
            assert answer.status_code == 404 and "location" not in answer.headers


# --- other sites' pages ----------------------------------------------------------------------------------------------

PAGE = "https://images.example.com"


def preflight(client: httpx.Client, origin: str, path: str = GENERATE) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return client.options(path, headers={"Origin": origin, **asked})


def test_other_sites_pages_get_nothing_by_default(client: httpx.Client) -> None:
    assert preflight(client, PAGE).status_code == 405
    answer = client.get("/v1/models", headers={"Origin": PAGE})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("allowed", [PAGE, "*"])
def test_pages_of_an_allowed_origin_can_ask_and_read(pipeline: Pipeline, allowed: str) -> None:
    with serving(pipeline, access=Access(keys=("secret",), origins=(allowed,))) as client:
        asked = preflight(client, PAGE)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] in (PAGE, "*")
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        page = {"Origin": PAGE}
        answer = client.post(GENERATE, content=b"{}", headers=JSON | page | {"Authorization": "Bearer secret"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (400, allowed)
        answer = client.get("/v1/models", headers=page)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, allowed), "it can read why"
        if allowed != "*":
            assert preflight(client, "https://evil.example").status_code == 400
            answer = client.get("/v1/models", headers={"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [(None, (), 400), ("http://localhost:{port}", (), 400), (PAGE, (), 403), (PAGE, (PAGE,), 400), (PAGE, ("*",), 400),
     ("https://evil.example", (PAGE,), 403), ("null", (PAGE,), 403)],
)  # fmt: skip
def test_forms_come_from_own_pages_and_from_allowed_origins(
    pipeline: Pipeline, origin: str | None, allowed: tuple[str, ...], status: int
) -> None:
    """Behind a proxy that replaces Host, the page's own forms have the public origin."""
    with serving(pipeline, access=Access(origins=allowed)) as client:
        port = client.base_url.port
        headers = {"Host": f"localhost:{port}"} | ({"Origin": origin.format(port=port)} if origin else {})
        answer = client.post("/v1/images/edits", files={"image": b"none"}, data={"prompt": PROMPT}, headers=headers)
        assert answer.status_code == status, answer.text
        assert ("--allow-origin" in answer.text) == (status == 403)
        assert ask(client, num_inference_steps=1)["data"]
