"""The promise under fire: 200 streams, the engine killed three times, and every text as in an undisturbed run."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
from serving import Serving

STREAMS = 200
OPENINGS = ["Once upon a time", "The fox", "In the morning", "Tell me about the sea.", "A small boat", "Hello"]


def body(i: int) -> dict:
    """Greedy for even ones, seeded sampling for odd ones; a few of each share a prompt."""
    sampling = {"temperature": 0} if i % 2 == 0 else {"temperature": 0.9, "seed": i}
    prompt = f"{OPENINGS[i % len(OPENINGS)]} {'and ' * (i % 7)}"
    return {
        "prompt": prompt,
        "max_tokens": 30 + i % 50,
        "stream": True,
        "return_token_ids": True,
        "logprobs": 1,
    } | sampling


async def stream(client: httpx.AsyncClient, i: int, progress: list[int]) -> tuple[str, list[int], list, str]:
    text, ids, logprobs, reason = "", [], [], ""
    async with client.stream("POST", "/v1/completions", json=body(i)) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text += choice["text"]
                ids += choice["token_ids"]
                logprobs += choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
                reason = choice["finish_reason"] or reason
                progress[i] = len(ids)
    return text, ids, logprobs, reason


async def all_streams(url: str, progress: list[int]) -> list:
    limits = httpx.Limits(max_connections=len(progress))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(stream(client, i, progress) for i in range(len(progress))))


async def disturbed(server: Serving, total: int) -> tuple[list, list[int]]:
    """The same streams while the engine dies when a sixth, a third and a half of all tokens have come."""
    progress = [0] * STREAMS
    running = asyncio.ensure_future(all_streams(server.url, progress))
    killed: list[int] = []
    for share in (1 / 6, 1 / 3, 1 / 2):
        while sum(progress) < share * total:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.005)
        engine = await asyncio.to_thread(lambda: server.engine)
        while engine.pid in killed:
            engine = await asyncio.to_thread(lambda: server.engine)
        assert not running.done()
        engine.kill()
        killed.append(engine.pid)
    return await running, killed


def test_200_streams_while_the_engine_is_killed_three_times() -> None:
    with Serving("--kv-memory", "16MiB", "--max-batch-size", "64") as server:
        began = time.monotonic()
        calm = asyncio.run(all_streams(server.url, [0] * STREAMS))
        calm_seconds = time.monotonic() - began
        total = sum(len(ids) for _, ids, _, _ in calm)
        began = time.monotonic()
        stormy, killed = asyncio.run(disturbed(server, total))
        print(
            f"{total} tokens: {calm_seconds:.1f} s undisturbed, {time.monotonic() - began:.1f} s with kills of {killed}"
        )
        assert len(set(killed)) == 3
        for i, (expected, got) in enumerate(zip(calm, stormy, strict=True)):
            assert got == expected, f"stream {i}: {got} instead of {expected}"
        assert {reason for _, _, _, reason in calm} <= {"stop", "length"}
        server.client.get("/health").raise_for_status()
        assert server.gauge("vllm:num_requests_running") == 0
        assert server.gauge("vllm:kv_cache_usage_perc") == 0
