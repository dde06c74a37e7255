"""A response is a pure function of the request: alone or in a crowd, the same ids and the same bits of logprobs."""

from __future__ import annotations

import asyncio
import random

import httpx
import pytest
from serving import Serving


def requests(seed: int, count: int) -> list[dict]:
    """Prompts that share beginnings, of all lengths, greedy and seeded."""
    rng = random.Random(seed)
    stems = [[rng.randrange(300, 1500) for _ in range(200)] for _ in range(3)]
    made = []
    for i in range(count):
        stem = rng.choice(stems)[: rng.randint(1, 100)]
        tail = [rng.randrange(300, 1500) for _ in range(rng.randint(0, 40))]
        sampling = rng.choice([{"temperature": 0}, {"temperature": 1.1, "seed": i, "top_p": 0.95, "top_k": 50}])
        made.append(
            {
                "prompt": stem + tail,
                "max_tokens": rng.randint(1, 90),
                "ignore_eos": True,
                "logprobs": 3,
                "return_token_ids": True,
            }
            | sampling
        )
    return made


def answer(response: httpx.Response) -> tuple:
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]


async def crowd(url: str, bodies: list[dict], rng: random.Random) -> list[tuple]:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def ask(body: dict) -> tuple:
            await asyncio.sleep(rng.random())
            return answer(await client.post("/v1/completions", json=body))

        return await asyncio.gather(*(ask(body) for body in bodies))


@pytest.mark.parametrize(("dtype", "kv_memory"), [("float32", "1536KiB"), ("bfloat16", "768KiB")])
def test_alone_and_in_a_crowd(dtype: str, kv_memory: str) -> None:
    """The crowd is chunked (64 tokens an iteration), preempted (a tiny KV pool) and hits the prefix cache."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    bodies = requests(seed, 40)
    serve = ["--dtype", dtype, "--max-batch-tokens", "64", "--max-batch-size", "32", "--threads", "1"]
    with Serving(*serve, "--max-model-len", "256", "--kv-memory", kv_memory) as server:
        alone = [answer(server.client.post("/v1/completions", json=body)) for body in bodies]
        for _ in range(2):
            together = asyncio.run(crowd(server.url, bodies, random.Random(seed)))
            for body, expected, got in zip(bodies, alone, together, strict=True):
                assert got == expected, body
        assert server.gauge("vllm:prefix_cache_hits_total") > 0
        print(server.gauge("vllm:num_preemptions_total"), "preemptions")
        assert server.gauge("vllm:num_preemptions_total") > 0
