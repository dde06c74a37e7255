"""Responses that are no streams share one bound: the oldest goes on, the others wait for room, and all are answered."""

from __future__ import annotations

import asyncio
import random
import time
import tracemalloc
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_world import Server
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plain_job import JOB

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.chat import ChatWriter
from orcaserve.serve.choice import Piece
from orcaserve.serve.completions import CompletionWriter
from orcaserve.serve.errors import ApiError
from orcaserve.serve.job import Job
from orcaserve.serve.protocol import PromptTokensDetails, Usage
from orcaserve.serve.replies import Replies, size_of
from orcaserve.serve.responses import ResponsesWriter
from orcaserve.serve.responses_protocol import ResponsesRequest
from orcaserve.serve.served_model import ServedModel

BOUND = 5 << 19


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8), min_size=1, max_size=6), st.integers(0, 9999))
def test_beyond_the_bound_only_the_oldest_grows_and_nobody_waits_for_ever(sizes: list[list[int]], seed: int) -> None:
    """One that comes to more than the bound by itself ends in an error, and in nothing else."""
    most, draw = 240, random.Random(seed)
    replies = Replies(most)
    held: dict[int, int] = {}

    async def one(number: int, pieces: list[int]) -> None:
        with replies.reply(JOB) as reply:
            held[number] = 0
            try:
                for size in pieces:
                    held[number] += 4 * size
                    if held[number] > most:
                        with pytest.raises(ApiError, match="Ask for a stream"):
                            await reply.take(Piece(text="x" * size))
                        return
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
        with replies.reply(JOB) as last, replies.reply(JOB) as other:
            await asyncio.wait_for(other.take(Piece(text="x" * (most // 4))), 1)  # all that was held is free again
            await last.take(Piece(text="x"))

    asyncio.run(main())


def test_what_a_response_keeps_has_a_size() -> None:
    with_ids, packed = replace(JOB, return_token_ids=True), replace(JOB, packs_vectors=True)
    assert size_of(Piece(), with_ids) == 0
    assert size_of(Piece(text="abc", token_ids=[1, 2]), JOB) >= 3
    assert size_of(Piece(text="abc", token_ids=[1, 2]), with_ids) > 3 + 2 * 8
    assert size_of(Piece(pooled=bytes(4 * 64)), JOB) > 64 * 32  # a list of floats
    assert size_of(Piece(pooled=bytes(4 * 64)), packed) >= 64 * (4 + 2 * 16 / 3)  # as they came, and as text twice


class Told:
    """A generation of one choice. num_bytes: what its response is counted to take so far."""

    def __init__(self, job: Job, num_tokens: int) -> None:
        self.job, self.num_tokens, self.num_bytes = job, num_tokens, 0
        self.usage = Usage(1, num_tokens, 1 + num_tokens, PromptTokensDetails(0))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        draw = random.Random(0)
        for at in range(self.num_tokens):
            top = tuple((draw.randrange(400), -9 * draw.random()) for _ in range(self.job.logprobs or 0))
            entry = TokenLogprobs(draw.randrange(400), -draw.random(), 1, top)
            reason = "length" if at == self.num_tokens - 1 else None
            piece = Piece(text="abcd", token_ids=[entry.token_id], logprobs=[entry], finish_reason=reason)
            self.num_bytes += size_of(piece, self.job)
            yield 0, piece


@pytest.mark.parametrize("num_top", [0, 5])
@pytest.mark.parametrize("writer", [CompletionWriter, ChatWriter, ResponsesWriter])
def test_log_probabilities_take_about_what_is_counted(model_dir: Path, writer: type, num_top: int) -> None:
    told = Told(replace(JOB, logprobs=num_top), 3000)
    tokenizer = ServedModel("m", model_dir).tokenizer
    if writer is ResponsesWriter:
        made = writer(ResponsesRequest(input="x"), told.job, tokenizer, "id", "model")
    else:
        made = writer(told.job, tokenizer, "id", "model", "profile")

    async def peak() -> int:
        tracemalloc.start()
        try:
            await made.whole(told)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert asyncio.run(peak()) <= 1.15 * told.num_bytes


def body(seed: int, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": "The fox", "max_tokens": 40, "n": 8, "logprobs": 20, "ignore_eos": True, "temperature": 1.0}
    return {**asked, "seed": seed, "include_timing": True, **fields}


def answer(response: dict[str, Any]) -> list[Any]:
    return [(choice["text"], choice["logprobs"]) for choice in response["choices"]]


@pytest.fixture(scope="module")
def narrow(model_dir: Path):
    context = ("--max-model-len", "131072", "--blocks", "9000")
    with Server(model_dir, *context, http={"whole_bytes": BOUND}) as server:
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


def metric(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}{{"))


def test_one_that_grows_beyond_the_bound_ends_there_and_the_others_go_on(narrow: Server) -> None:
    endless = {"messages": [{"role": "user", "content": "The fox"}], "logprobs": True, "top_logprobs": 20, "n": 4}
    endless |= {"ignore_eos": True, "temperature": 1.0, "seed": 3}
    with narrow.client() as client, ThreadPoolExecutor(5) as threads:
        alone = answer(client.post("/v1/completions", json=body(5)).json())
        others = [threads.submit(client.post, "/v1/completions", json=body(5)) for _ in range(2)]
        large = [threads.submit(client.post, "/v1/chat/completions", json=endless) for _ in range(2)]
        streamed = client.post("/v1/chat/completions", json={**endless, "max_tokens": 100, "stream": True})  # 2.9 MB
        for response in (future.result() for future in large):
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["code"] == "response_too_large"
            assert "a stream, limit its tokens" in error["message"] and "fewer log-probabilities" in error["message"]
        assert [answer(future.result().json()) for future in others] == [alone] * 2
        assert streamed.status_code == 200 and streamed.text.endswith("data: [DONE]\n\n")
        deadline = time.monotonic() + 20
        while metric(client, "num_requests_running") or metric(client, "kv_cache_usage_perc"):
            assert time.monotonic() < deadline, "the engine goes on, or keeps KV blocks"
            time.sleep(0.05)


def test_what_is_said_of_prompts_is_judged_at_the_door(narrow: Server) -> None:
    asked = {"prompt": [[5] * 40] * 10, "max_tokens": 1, "prompt_logprobs": 20}  # 2.9 MB
    with narrow.client() as client:
        before = metric(client, "prompt_tokens_total")
        response = client.post("/v1/completions", json=asked)
        assert response.status_code == 400 and response.json()["error"]["code"] == "response_too_large"
        assert metric(client, "prompt_tokens_total") == before
        assert client.post("/v1/completions", json={**asked, "stream": True}).status_code == 200
        assert client.post("/v1/completions", json={**asked, "prompt_logprobs": 10}).status_code == 200


def test_how_long_an_answer_could_become_is_no_matter(narrow: Server) -> None:
    """With a context of 128 000 tokens it could take 275 MB; without max_tokens, and with."""
    chat = {"messages": [{"role": "user", "content": "The fox"}], "logprobs": True, "top_logprobs": 5}
    chat |= {"logit_bias": {"1": 9}, "temperature": 1.0, "seed": 1}  # it ends soon
    with narrow.client() as client:
        for fields in ({}, {"n": 8}, {"max_tokens": 131000}, {"n": 8, "stream": True}):
            response = client.post("/v1/chat/completions", json={**chat, **fields})
            assert response.status_code == 200, response.text
