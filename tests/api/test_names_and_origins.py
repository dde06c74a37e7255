"""Several names for one model, and pages of other origins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_world import Server
from click.testing import CliRunner

from orcaserve.cli import serve


def test_every_name_is_the_model(model_dir: Path) -> None:
    names = {"served_model_names": ["first", "an/other"]}
    with Server(model_dir, http=names).ready() as server, server.client() as client:
        cards = client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["first", "an/other"]
        assert {card["root"] for card in cards} == {"first"}
        assert client.get("/v1/models/an/other").json()["id"] == "an/other"
        for name in ("first", "an/other", None):
            answer = client.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
            assert (answer.status_code, answer.json()["model"]) == (200, "first")
        refused = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert refused.status_code == 404
        assert 'model_name="first"' in client.get("/metrics").text


def test_only_pages_of_given_origins_may_read_answers(model_dir: Path) -> None:
    options = {"cors_origins": ["https://chat.example"], "api_keys": ["k"]}
    with Server(model_dir, http=options).ready() as server, server.client() as client:
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        asked = client.options("/v1/completions", headers={"Origin": "https://chat.example", **preflight})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://chat.example"
        other = client.options("/v1/completions", headers={"Origin": "https://else.example", **preflight})
        assert "access-control-allow-origin" not in other.headers
        refused = client.get("/v1/models", headers={"Origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example", "pages see why"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]


@pytest.fixture(scope="module")
def trusting(model_dir: Path) -> Iterator[Server]:
    """Without keys, but for pages of one origin."""
    with Server(model_dir, http={"cors_origins": ["https://chat.example"]}) as server:
        yield server.ready()


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://HOST", 200),
        ("http://localhost:3000", 200),
        ("https://chat.example", 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1.evil.example", 403),
        ("null", 403),
    ],
)
def test_without_keys_pages_from_elsewhere_may_not_post(trusting: Server, origin: str | None, status: int) -> None:
    """Browsers send text/plain without asking first."""
    host = trusting.url.removeprefix("http://")
    headers = {"Content-Type": "text/plain", **({"Origin": origin.replace("HOST", host)} if origin else {})}
    with trusting.client(headers=headers) as client:
        answer = client.post("/v1/completions", content=b'{"prompt": "x", "max_tokens": 1}')
        assert answer.status_code == status
        assert answer.headers["x-request-id"]
        if status == 403:
            assert answer.json()["error"]["code"] == "origin_not_allowed"
            assert client.get("/v1/models").status_code == 200, "which no page from elsewhere can read"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80", "192.0.2.1:8000", "a.localhost."]
)
def test_without_keys_addresses_and_localhost_are_its_names(trusting: Server, host: str) -> None:
    with trusting.client(headers={"Host": host}) as client:
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "[::1", "a"])
def test_without_keys_nobody_else_s_name_leads_to_it(trusting: Server, host: str) -> None:
    with trusting.client(headers={"Host": host}) as client:
        for path in ("/v1/models", "/", "/health", "/trace"):
            refused = client.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed"), path


def test_the_host_of_an_origin_that_may_call_is_a_name_too(trusting: Server, locked: Server) -> None:
    """So is every name where there are keys, which no page has, and where everybody may call."""
    with trusting.client(headers={"Host": "chat.example"}) as client:
        assert client.get("/v1/models").status_code == 200
    with locked.client(headers={"Host": "api.example", "Origin": "https://x.example"}) as client:
        body = {"prompt": "x", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).status_code == 401
        assert client.post("/v1/completions", json=body, headers={"Authorization": "Bearer k"}).status_code == 200


@pytest.fixture(scope="module")
def locked(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir, http={"api_keys": ["k"]}) as server:
        yield server.ready()


@pytest.mark.parametrize(
    "origin", ["https://x.example/", "x.example", "https://", "https://X.example", "https://*/a", ""]
)
def test_what_is_no_origin_ends_the_start(model_dir: Path, origin: str) -> None:
    with Server(model_dir, http={"cors_origins": [origin]}) as server:
        _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 1
    assert "is no origin" in err and len(err.splitlines()) == 1


def test_the_command_line_hands_all_of_it_on(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    given = []
    monkeypatch.setattr("orcaserve.serve.server.run", lambda engine, http, **rest: given.append(http) or 0)
    words = ["--served-model-name", "a", "--served-model-name", "b", "--cors-origin", "https://x", "--cors-origin", "*"]
    words += ["--grpc-port", "9", "--metrics-prefix", "mine"]
    result = CliRunner().invoke(serve, [str(model_dir), *words])
    assert result.exit_code == 0, result.output
    [http] = given
    assert http.served_model_names == ("a", "b")
    assert http.cors_origins == ("https://x", "*")
    assert (http.grpc_port, http.metrics_prefix) == (9, "mine")
