"""The openai SDK, unmodified, finds everything where it looks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from api_world import Server

MESSAGES = [{"role": "user", "content": "Tell me about the fox"}]


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(sdk: openai.OpenAI) -> None:
    [model] = sdk.models.list().data
    assert sdk.models.retrieve(model.id).id == model.id == "tiny"


def test_completions(sdk: openai.OpenAI) -> None:
    whole = sdk.completions.create(model="tiny", prompt="The", n=3, max_tokens=10, logprobs=2, seed=1, echo=True)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    for choice in whole.choices:
        assert choice.text.startswith("The")
        assert choice.finish_reason in ("stop", "length")
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset or [])
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    texts = {0: "", 1: "", 2: ""}
    for chunk in sdk.completions.create(model="tiny", prompt="The", n=3, max_tokens=10, seed=1, echo=True, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}


def test_chat(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=20, seed=2, logprobs=True, top_logprobs=3
    )
    [choice] = whole.choices
    assert choice.message.role == "assistant"
    assert choice.logprobs is not None
    for entry in choice.logprobs.content or []:
        assert entry.bytes is not None
        assert len(entry.top_logprobs) == 3
    content, usage, reasons = "", None, []
    stream = sdk.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=20,
        seed=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for part in chunk.choices:
            content += part.delta.content or ""
            reasons += [part.finish_reason] if part.finish_reason else []
    assert content == choice.message.content
    assert reasons == [choice.finish_reason]
    assert usage is not None
    assert whole.usage is not None
    assert usage.total_tokens == whole.usage.total_tokens
    assert usage.prompt_tokens_details is not None


def test_stop(sdk: openai.OpenAI) -> None:
    free = (
        sdk.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40, seed=3).choices[0].message.content
    )
    assert free is not None
    stop = next(free[at] for at in range(4, len(free)) if free[at] != "\ufffd")
    cut = sdk.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=40, seed=3, stop=[stop]).choices[0]
    assert cut.message.content == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_errors_have_their_types(sdk: openai.OpenAI, model_dir: Path) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.completions.create(model="tiny", prompt="x", temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        sdk.completions.create(model="tiny", prompt="x", max_tokens=10_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.completions.create(model="other", prompt="x")
    assert unknown.value.code == "model_not_found"
    with Server(model_dir, http={"api_keys": ["right", "also right"]}).ready() as locked:
        url = f"{locked.url}/v1"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="wrong").models.list()
        for key in ("right", "also right"):
            assert openai.OpenAI(base_url=url, api_key=key).models.list().data


def test_a_full_queue_is_a_rate_limit(model_dir: Path) -> None:
    """More requests than may wait: the rest get 429 and when to come again; those that were taken are answered."""

    async def flood(url: str) -> list[object]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            body = {"model": "tiny", "prompt": [5] * 200, "max_tokens": 2}
            calls = [client.completions.create(**body) for _ in range(24)]
            return await asyncio.gather(*calls, return_exceptions=True)

    with Server(model_dir, "--step-seconds", "0.05", limits={"max_queue_requests": 4}).ready() as server:
        results = asyncio.run(flood(server.url))
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert refused
    assert len(refused) + sum(hasattr(result, "choices") for result in results) == 24
    for error in refused:
        assert int(error.response.headers["retry-after"]) >= 1
        assert int(error.response.headers["retry-after-ms"]) >= 1
        assert error.response.headers["x-should-retry"] == "true"
        assert error.code == "queue_full"
