"""`include_timing`: where each choice's time went, in whole responses and in a stream's last chunk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_world import Server, events

PATHS = {
    "/v1/completions": {"prompt": "The fox"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
FIELDS = {
    "index",
    "engine_ids",
    "queue_seconds",
    "prefill_seconds",
    "decode_seconds",
    "lost_seconds",
    "preemptions",
    "recomputed_tokens",
    "swapped_tokens",
    "cached_tokens",
    "iterations",
    "mean_batch_mates",
    "max_batch_mates",
}


def whole(client: httpx.Client, path: str, **fields: Any) -> Any:
    response = client.post(path, json={**PATHS[path], **fields})
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: httpx.Client, path: str, **fields: Any) -> list[Any]:
    with client.stream("POST", path, json={**PATHS[path], "stream": True, **fields}) as response:
        return events(response)


def check(timing: Any, lengths: list[int], seconds: float) -> None:
    assert [one["index"] for one in timing] == list(range(len(lengths)))
    for one, length in zip(timing, lengths, strict=True):
        assert set(one) == FIELDS
        parts = [one[f"{part}_seconds"] for part in ("queue", "prefill", "decode", "lost")]
        assert min(parts) >= 0 and 0 < sum(parts) <= seconds + 1e-4
        assert one["iterations"] == length and len(one["engine_ids"]) == 1
        assert 0 <= one["mean_batch_mates"] <= one["max_batch_mates"] <= len(lengths) - 1


@pytest.mark.parametrize("path", PATHS)
def test_it_is_told_when_asked_and_only_then(client: httpx.Client, path: str) -> None:
    body = {"max_tokens": 6, "ignore_eos": True, "n": 2, "seed": 1}
    assert "timing" not in whole(client, path, **body)
    assert all("timing" not in chunk for chunk in streamed(client, path, **body))
    began = time.monotonic()
    reply = whole(client, path, **body, include_timing=True)
    check(reply["timing"], [6, 6], time.monotonic() - began)
    began = time.monotonic()
    *chunks, last = streamed(client, path, **body, include_timing=True)
    check(last["timing"], [6, 6], time.monotonic() - began)
    assert last["choices"] == [] and "usage" not in last
    assert all("timing" not in chunk for chunk in chunks)
    *_, both = streamed(client, path, **body, include_timing=True, stream_options={"include_usage": True})
    assert both["usage"]["completion_tokens"] == 12 and len(both["timing"]) == 2


def test_a_choice_that_a_stop_string_cuts_has_a_timing_too(client: httpx.Client) -> None:
    body = {"seed": 11, "max_tokens": 60, "return_token_ids": True}
    free = whole(client, "/v1/completions", **body)["choices"][0]["text"]
    stop = next(free[i : i + 2] for i in range(5, 50) if free[i : i + 2].isascii() and free.find(free[i : i + 2]) == i)
    reply = whole(client, "/v1/completions", **body, stop=stop, include_timing=True)
    [timing] = reply["timing"]
    count = len(reply["choices"][0]["token_ids"])
    assert reply["choices"][0]["finish_reason"] == "stop" and 0 < count < 60
    assert timing["iterations"] >= count


def test_many_prompts_have_a_timing_each_and_later_ones_are_cached(client: httpx.Client) -> None:
    prompt = [[7] * 40, [8] * 40]
    first = whole(client, "/v1/completions", prompt=prompt, max_tokens=2, ignore_eos=True, include_timing=True)
    again = whole(client, "/v1/completions", prompt=prompt, max_tokens=2, ignore_eos=True, include_timing=True)
    assert [one["cached_tokens"] for one in again["timing"]] == [32, 32]
    ids = [id for reply in (first, again) for one in reply["timing"] for id in one["engine_ids"]]
    assert ids == sorted(set(ids))


def test_a_response_is_known_by_the_requests_id(client: httpx.Client) -> None:
    for path, prefix in (("/v1/completions", "cmpl"), ("/v1/chat/completions", "chatcmpl")):
        body = {**PATHS[path], "max_tokens": 1}
        given = client.post(path, json=body, headers={"x-request-id": "order-66"})
        assert given.json()["id"] == f"{prefix}-order-66" and given.headers["x-request-id"] == "order-66"
        drawn = client.post(path, json=body)
        assert drawn.json()["id"] == f"{prefix}-{drawn.headers['x-request-id']}"


def test_metrics_are_made_of_it(client: httpx.Client) -> None:
    def read_metrics() -> dict[str, float]:
        lines = [line.split(" ") for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name.partition("{")[0]: float(value) for name, value in lines if "le=" not in name}

    before = read_metrics()
    reply = whole(client, "/v1/completions", max_tokens=9, ignore_eos=True, n=3, include_timing=True)
    after = read_metrics()
    for name, part in (
        ("vllm:request_prefill_time_seconds", "prefill_seconds"),
        ("vllm:request_decode_time_seconds", "decode_seconds"),
        ("orcaserve:request_lost_time_seconds", "lost_seconds"),
    ):
        assert after[f"{name}_count"] - before[f"{name}_count"] == 3
        told = sum(one[part] for one in reply["timing"])
        assert after[f"{name}_sum"] - before[f"{name}_sum"] == pytest.approx(told, abs=1e-4)


def test_an_error_has_no_timing_and_harms_no_metric(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json={"prompt": "x", "include_timing": "yes"})
    assert response.status_code == 400 and "include_timing" in response.json()["error"]["message"]


def test_a_crowd_shares_its_iterations(model_dir: Path) -> None:
    with Server(model_dir, "--step-seconds", "0.002").ready() as server, server.client() as client:
        body = {"prompt": [[4, n] for n in range(5, 13)], "max_tokens": 20, "ignore_eos": True}
        reply = whole(client, "/v1/completions", **body, include_timing=True)
        assert all(one["max_batch_mates"] == 7 and one["mean_batch_mates"] > 3 for one in reply["timing"])
