"""Several names for one model, and pages of other origins."""

from __future__ import annotations

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
