"""Responses that are no streams share one bound: the oldest goes on, the others wait for room, and all are answered."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from api_world import Server
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.serve.choice import Piece
from orcaserve.serve.replies import Replies, size_of

BOUND = 2 << 20


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 9999))
def test_beyond_the_bound_only_the_oldest_grows_and_nobody_waits_for_ever(sizes: list[list[int]], seed: int) -> None:
    most, draw = 240, random.Random(seed)
    replies = Replies(most)
    held: dict[int, int] = {}

    async def one(number: int, pieces: list[int]) -> None:
        with replies.reply(keeps_ids=False) as reply:
            held[number] = 0
            try:
                for size in pieces:
                    held[number] += 4 * size
                    await reply.take(Piece(text="x" * size))
                    assert sum(held.values()) <= most or number == min(held)
                    for _ in range(draw.randrange(3)):
                        await asyncio.sleep(0)
                if draw.random() < 0.2:
                    raise ConnectionError
            finally:
                del held[number]

    async def main() -> None:
        tasks = [one(number, pieces) for number, pieces in enumerate(sizes)]
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)
        assert all(result is None or isinstance(result, ConnectionError) for result in done)
        with replies.reply(keeps_ids=False) as last, replies.reply(keeps_ids=False) as other:
            await asyncio.wait_for(other.take(Piece(text="x" * (most // 4))), 1)  # all that was held is free again
            await last.take(Piece(text="x"))

    asyncio.run(main())


def test_what_a_response_keeps_has_a_size() -> None:
    assert size_of(Piece(), True) == 0
    assert size_of(Piece(text="abc", token_ids=[1, 2]), False) >= 3
    assert size_of(Piece(text="abc", token_ids=[1, 2]), True) > 3 + 2 * 8
    assert size_of(Piece(pooled=bytes(4 * 64)), False) > 64 * 8


def body(seed: int, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": "The fox", "max_tokens": 40, "n": 8, "logprobs": 20, "ignore_eos": True, "temperature": 1.0}
    return {**asked, "seed": seed, "include_timing": True, **fields}


def answer(response: dict[str, Any]) -> list[Any]:
    return [(choice["text"], choice["logprobs"]) for choice in response["choices"]]


@pytest.fixture(scope="module")
def narrow(model_dir: Path):
    with Server(model_dir, http={"whole_bytes": BOUND}) as server:
        yield server.ready()


def test_many_large_ones_at_once_are_paused_and_all_answered_as_alone(narrow: Server) -> None:
    with narrow.client() as client:

        def ask(seed: int) -> dict[str, Any]:
            response = client.post("/v1/completions", json=body(seed), timeout=120)
            assert response.status_code == 200, response.text
            return response.json()

        alone = [answer(ask(seed)) for seed in range(8)]
        with ThreadPoolExecutor(8) as threads:
            crowd = list(threads.map(ask, range(8)))
        assert [answer(response) for response in crowd] == alone
        lost = [timing["lost_seconds"] for response in crowd for timing in response["timing"]]
        assert any(lost), "nobody was paused"


def test_one_that_could_be_larger_than_all_may_be_must_be_a_stream(narrow: Server) -> None:
    with narrow.client() as client:
        response = client.post("/v1/completions", json=body(1, max_tokens=60))
        assert response.status_code == 400, response.text
        assert "Set 'stream'" in response.json()["error"]["message"] and response.json()["error"]["param"] == "stream"
        response = client.post("/v1/completions", json=body(1, max_tokens=60, stream=True))
        assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
