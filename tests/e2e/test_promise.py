"""A response is a pure function of the request: alone or in a crowd, the same ids and the same bits of logprobs."""

from __future__ import annotations

import asyncio
import itertools
import random

import httpx
import kernel_sets
import pytest
from serving import Serving


def requests(seed: int, count: int, shared: tuple[int, int], own: int, tokens: tuple[int, int]) -> list[dict]:
    """Prompts that share beginnings, greedy and seeded. shared, tokens: the least and most; own: the most."""
    rng = random.Random(seed)
    stems = [[rng.randrange(300, 1500) for _ in range(200)] for _ in range(3)]
    made = []
    for i in range(count):
        stem = rng.choice(stems)[: rng.randint(*shared)]
        tail = [rng.randrange(300, 1500) for _ in range(rng.randint(0, own))]
        sampling = rng.choice([{"temperature": 0}, {"temperature": 1.1, "seed": i, "top_p": 0.95, "top_k": 50}])
        made.append(
            {
                "prompt": stem + tail,
                "max_tokens": rng.randint(*tokens),
                "ignore_eos": True,
                "logprobs": 3,
                "return_token_ids": True,
            }
            | sampling
        )
    return made


def at_once(seed: int, count: int) -> dict:
    """count prompts of 36 tokens in one request: the engine gets them together, however slowly a crowd comes.

    Each begins with three blocks of 16 tokens and ends with five: five of them outgrow a pool of 15 to 24 blocks, two
    one of 6 to 9.
    """
    rng = random.Random(seed + 10**6)
    return {
        "prompt": [[rng.randrange(300, 1500) for _ in range(36)] for _ in range(count)],
        "max_tokens": 32,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 3,
        "return_token_ids": True,
    }


def prompts(body: dict) -> list[list[int]]:
    return body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]


def answers(response: httpx.Response) -> list[tuple]:
    assert response.status_code == 200, response.text
    return [
        (choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"])
        for choice in response.json()["choices"]
    ]


async def crowd(url: str, bodies: list[dict], rng: random.Random) -> list[tuple]:
    """The answers to bodies that come at random times, in the order of bodies and of their prompts."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def ask(body: dict) -> list[tuple]:
            await asyncio.sleep(rng.random() * len(bodies) / 100)
            return answers(await client.post("/v1/completions", json=body))

        return list(itertools.chain.from_iterable(await asyncio.gather(*(ask(body) for body in bodies))))


@pytest.mark.parametrize(
    ("options", "kv_memory"),
    [
        pytest.param(["--dtype", "float32"], "1536KiB", id="float32"),
        pytest.param(["--dtype", "bfloat16"], "768KiB", id="bfloat16"),
        pytest.param(["--quantization", "int8"], "768KiB", id="int8", marks=kernel_sets.NEEDS_NATIVE),
        pytest.param(["--quantization", "int4"], "768KiB", id="int4", marks=kernel_sets.NEEDS_NATIVE),
        pytest.param(["--dtype", "bfloat16", "--kv-cache-dtype", "int8"], "448KiB", id="kv-int8"),
        pytest.param(["--kernels", "torch"], "320KiB", id="torch"),
    ],
)
def test_alone_and_in_a_crowd(options: list[str], kv_memory: str, pytestconfig: pytest.Config) -> None:
    """Alone on one thread; in a crowd on two, chunked, preempted (a tiny KV pool), with hits in the prefix cache."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    if "torch" in options:  # it is slow: a few requests
        bodies = [*requests(seed, 3, shared=(40, 40), own=8, tokens=(28, 32)), at_once(seed, 2)]
    else:
        asked = pytestconfig.getoption("promised") or 24
        bodies = [*requests(seed, asked, shared=(1, 100), own=40, tokens=(1, 90)), at_once(seed, 5)]
    one_by_one = [body | {"prompt": prompt} for body in bodies for prompt in prompts(body)]
    count = len(one_by_one)
    serve = [*options, "--max-model-len", "128" if "torch" in options else "256"]
    with Serving(*serve, "--threads", "1") as server:
        alone = [answers(server.client.post("/v1/completions", json=body))[0] for body in one_by_one]
    crowded = ["--threads", "2", "--max-batch-tokens", "64", "--max-batch-size", "32", "--kv-memory", kv_memory]
    with Serving(*serve, *crowded, "--max-queue-requests", str(count)) as server:
        together = asyncio.run(crowd(server.url, bodies, random.Random(seed)))
        found = server.gauge("vllm:prefix_cache_hits_total")
        for _ in range(2):  # the second time what the first left in the cache is there for certain
            together += answers(server.client.post("/v1/completions", json=one_by_one[-1]))
        alone += alone[-1:] * 2
        equal = sum(got == expected for expected, got in zip(alone, together, strict=True))
        print(f"{equal} of {len(alone)} equal; {server.gauge('vllm:num_preemptions_total'):.0f} preemptions,", end=" ")
        print(f"{found:.0f} prompt tokens from the cache")
        assert equal == len(alone)
        assert server.gauge("vllm:prefix_cache_hits_total") > found > 0
        assert server.gauge("vllm:num_preemptions_total") > 0
