"""Keys, request ids, and the pages about the server itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from api_world import HERE, Server
from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture(scope="module")
def locked(model_dir: Path) -> Server:
    with Server(model_dir, http={"api_keys": ["right"], "served_model_names": ["my/model"]}).ready() as server:
        yield server


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/metrics",
        "/version",
        "/openapi.json",
        "/nothing",
        "/health/",
        "/health/../v1/models",
        "/health//",
    ],
)
def test_everything_needs_a_key(locked: Server, path: str) -> None:
    with locked.client() as client:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "right"},
            {"Authorization": "Bearer"},
        ):
            response = client.get(path, headers=headers)
            assert response.status_code == 401, response.text
            assert response.json()["error"]["code"] == "invalid_api_key"
        raw = client.build_request("GET", path, headers={"Authorization": "bearer right"})
        assert client.send(raw).status_code != 401


def test_probes_need_no_key(locked: Server) -> None:
    with locked.client() as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert client.get("/%68ealth").status_code == 401, "the raw path counts"


def test_a_name_of_its_own_may_hold_a_slash(locked: Server) -> None:
    with locked.client(headers={"Authorization": "Bearer right"}) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == "my/model"
        assert client.get("/v1/models/my/model").json()["id"] == "my/model"
        answer = client.post("/v1/completions", json={"model": "my/model", "prompt": "x", "max_tokens": 1})
        assert answer.json()["model"] == "my/model"


def test_request_ids_are_echoed_if_they_are_harmless(client: httpx.Client) -> None:
    assert client.get("/version", headers={"X-Request-Id": "abc-1.2_Z"}).headers["x-request-id"] == "abc-1.2_Z"
    for bad in ("a b", "<script>", "x" * 129, ""):
        given = client.get("/version", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given != bad
        assert given.isalnum()


def test_the_description_names_every_endpoint_and_holds_together(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"} <= set(document["paths"])
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    temperature = document["components"]["schemas"]["CompletionRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0, "maximum": 2} in temperature["anyOf"]
    for path, operations in document["paths"].items():
        if "get" in operations and "{" not in path:
            assert client.get(path).status_code == 200


def test_the_page_of_the_api_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert not any(word in page.text for word in ("<script", "<link", "src=", "@import", "url("))
    assert "number (≥ 0, ≤ 2) or null" in page.text
    assert "POST /v1/chat/completions" in page.text


def test_metrics_have_vllms_names(client: httpx.Client) -> None:
    def read() -> dict[str, float]:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(response.text)
        return {
            sample.name + sample.labels.get("finished_reason", ""): sample.value
            for family in families
            for sample in family.samples
            if "le" not in sample.labels
        }

    before = read()
    body = {"prompt": "The fox", "max_tokens": 6, "ignore_eos": True, "n": 2}
    assert client.post("/v1/completions", json=body).status_code == 200
    after = read()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained["vllm:generation_tokens_total"] == 12
    assert gained["vllm:prompt_tokens_total"] == 3
    assert gained["vllm:request_success_totallength"] == 2
    assert gained["vllm:time_to_first_token_seconds_count"] == 2
    assert 0 < gained["vllm:inter_token_latency_seconds_count"] <= 10
    assert gained["vllm:e2e_request_latency_seconds_count"] == 2
    assert gained["vllm:iteration_tokens_total_count"] > 0
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:cache_config_info",
    ):
        assert name in after, name
    assert gained["vllm:request_queue_time_seconds_count"] == gained["vllm:request_prefill_time_seconds_count"] == 2
    assert gained["vllm:request_decode_time_seconds_count"] == gained["vllm:request_generation_tokens_count"] == 2
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1


def test_tokenizer_endpoints(client: httpx.Client) -> None:
    both = [
        client.post("/tokenize", json={"prompt": "Grüße 世界", "add_special_tokens": add}).json()
        for add in (True, False)
    ]
    assert both[0]["tokens"] == [0, *both[1]["tokens"]]
    assert both[1]["count"] == len(both[1]["tokens"])
    assert client.post("/detokenize", json={"tokens": both[1]["tokens"]}).json() == {"prompt": "Grüße 世界"}
    info = client.get("/tokenizer_info").json()
    assert {"eos_token": "</s>", "bos_token": "<s>"}.items() <= info.items()
    assert "messages" in info["chat_template"]


def test_version_and_health(client: httpx.Client) -> None:
    version = client.get("/version").json()
    assert version["deterministic"] is True
    assert version["profile"] == "trigram"
    assert client.get("/health").json()["status"] == "ok"


def test_the_frontend_loads_no_torch() -> None:
    code = "import sys, orcaserve.serve.app, orcaserve.serve.server; print('torch' in sys.modules)"
    argv = [sys.executable, "-c", code]
    env = {"PYTHONPATH": str(HERE.parent.parent / "src")}
    assert subprocess.run(argv, capture_output=True, text=True, env=env, check=True).stdout.strip() == "False"
