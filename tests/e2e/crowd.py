"""Many streams at once of one server: what each of them gave, and how far they have come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import httpx

OPENINGS = ["Once upon a time", "The fox", "In the morning", "Tell me about the sea.", "A small boat", "Hello"]
Answer = tuple[str, list[int], list, str]  # text, ids, log-probabilities, finish reason


def body(i: int, max_tokens: int, **more: object) -> dict:
    """Greedy for even ones, seeded sampling for odd ones; a few of each share a prompt."""
    sampling = {"temperature": 0} if i % 2 == 0 else {"temperature": 0.9, "seed": i}
    prompt = f"{OPENINGS[i % len(OPENINGS)]} {'and ' * (i % 7)}"
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "return_token_ids": True,
        "logprobs": 1,
        **sampling,
        **more,
    }


async def stream(client: httpx.AsyncClient, body: dict, progress: list[int], i: int) -> Answer:
    """progress[i] is how many tokens have come."""
    text, ids, logprobs, reason = "", [], [], ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
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


async def all_streams(url: str, bodies: Sequence[dict], progress: list[int]) -> list[Answer]:
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return await asyncio.gather(*(stream(client, body, progress, i) for i, body in enumerate(bodies)))
