"""Every metric that deploy/grafana.json asks for is there, with the labels that it sorts by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from api_world import Server

BOARD = json.loads((Path(__file__).parent.parent.parent / "deploy" / "grafana.json").read_text())
_NAME = re.compile(r"\b(?:vllm|orcaserve):[a-z0-9_]+")
# What conventions and ready-made boards ask for.
_VLLM = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "admission_rejections_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "iteration_tokens_total_bucket",
)


def names(metrics: str) -> set[str]:
    """What can be asked for, by the types that /metrics tells; a counter with labels may have no sample yet."""
    found = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", metrics, re.MULTILINE):
        found |= {f"{name}{end}" for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
    return found


def expressions(value: Any) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if key in ("expr", "query") and isinstance(inner, str):
            yield inner
        elif isinstance(inner, dict | list):
            yield from expressions(inner)


def test_every_query_finds_its_metric(client: httpx.Client) -> None:
    assert client.post("/v1/completions", json={"prompt": "The", "max_tokens": 3}).status_code == 200
    there = names(client.get("/metrics").text)
    asked = [text for text in expressions(BOARD) if ":" in text]
    assert len(asked) > 30
    for text in asked:
        assert (wanted := set(_NAME.findall(text))), text
        assert wanted <= there, (text, wanted - there)
    samples = client.get("/metrics").text
    for label in ("replica", "finished_reason", "model_name", "num_gpu_blocks", "block_size"):
        assert f'{label}="' in samples


def test_vllms_names_are_complete(client: httpx.Client) -> None:
    there = names(client.get("/metrics").text)
    assert {f"vllm:{name}" for name in _VLLM} <= there, {f"vllm:{name}" for name in _VLLM} - there


def test_panels_have_places_of_their_own() -> None:
    cells = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_another_prefix(model_dir: Path) -> None:
    with Server(model_dir, http={"metrics_prefix": "mine"}).ready() as server, server.client() as client:
        there = names(client.get("/metrics").text)
    assert {f"mine:{name}" for name in _VLLM} <= there
    assert not any(name.startswith("vllm") for name in there)
    with Server(model_dir, http={"metrics_prefix": "9 lives"}) as server:
        _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 1
    assert "9 lives" in err and "Traceback" not in err
