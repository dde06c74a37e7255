"""LLM and AsyncLLM with the built-in model: batches, streams, chats, errors, and nothing left behind."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys

import psutil
import pytest

from orcaserve import LLM, AsyncLLM, SamplingParams
from orcaserve.core.config import ModelError
from orcaserve.llm import RequestError


@pytest.fixture(scope="module")
def llm():
    with LLM(max_batch_size=8, kv_memory=8 << 20) as llm:
        yield llm


def test_many_prompts_come_back_in_order_and_equal_to_each_alone(llm: LLM) -> None:
    prompts = [f"Once upon a time, {i} foxes" for i in range(12)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=25, logprobs=2)
    together = llm.generate(prompts, params)
    alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    assert [response.choices for response in together] == [response.choices for response in alone]
    assert len({response.text for response in together}) > 1
    for response in together:
        [choice] = response.choices
        assert len(choice.token_ids) == len(choice.logprobs) <= 25
        assert all(math.isfinite(entry.logprob) and len(entry.top) == 2 for entry in choice.logprobs)


def test_token_ids_choices_stop_strings_and_prompt_logprobs(llm: LLM) -> None:
    [response] = llm.generate([300, 301, 302], n=3, seed=1, max_tokens=10, ignore_eos=True, prompt_logprobs=0)
    assert response.prompt_token_ids == (300, 301, 302)
    assert len(response.choices) == 3
    assert [entry.token_id for entry in response.prompt_logprobs] == [301, 302]
    assert all(len(choice.token_ids) == 10 and choice.finish_reason == "length" for choice in response.choices)
    [whole] = llm.generate("Once upon a time", temperature=0, max_tokens=30)
    middle = whole.text[len(whole.text) // 2 :][:4]
    [cut] = llm.generate("Once upon a time", temperature=0, max_tokens=30, stop=[middle])
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.choices[0].finish_reason == "stop"


def test_where_the_time_went_is_told_beside_the_answer(llm: LLM) -> None:
    responses = llm.generate(["Once upon a time"] * 3, n=2, max_tokens=8, ignore_eos=True)
    for response in responses:
        assert len(response.timings) == 2
        for timing in response.timings:
            assert timing.iterations >= 8 and timing.seconds > 0 and len(timing.ids) == 1
    assert max(timing.most_mates for response in responses for timing in response.timings) > 0
    [cut] = llm.generate("Once upon a time", max_tokens=30, temperature=0, stop=["e"])
    assert len(cut.timings) == 1


def test_a_conversation_goes_through_the_chat_template(llm: LLM) -> None:
    [response] = llm.generate([{"role": "user", "content": "Hello!"}], temperature=0)
    assert response.text.strip()
    assert response.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("x", {"temperature": float("nan")}, "not a request"),
        ("x", {"temperature": 3}, "temperature"),
        ("x", {"max_tokens": -1}, "max_tokens"),
        ("x", {"max_tokens": 10**6}, "context length"),
        ([-1], {}, "prompt"),
        ([10**6], {}, "token id"),
        ([{"role": "user"}], {"tools": [{}]}, "tools"),
    ],
)
def test_bad_requests_say_what_is_wrong_and_the_next_one_is_served(
    llm: LLM, prompt: object, fields: dict, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, **fields)
    assert llm.generate("Hello", max_tokens=1)[0].choices


def test_a_stream_is_the_whole_answer_and_leaving_it_frees_the_kv() -> None:
    async def story() -> None:
        async with AsyncLLM(kv_memory=4 << 20) as llm:
            whole = await llm.generate("Once upon a time", temperature=0, max_tokens=40)
            pieces = [piece async for piece in llm.stream("Once upon a time", temperature=0, max_tokens=40)]
            assert "".join(piece.text for piece in pieces) == whole.text
            assert len(pieces) > 5
            assert pieces[-1].timing is not None and all(piece.timing is None for piece in pieces[:-1])
            stream = llm.stream("Once upon a time", max_tokens=800, ignore_eos=True)
            assert await anext(stream)
            await stream.aclose()
            async with asyncio.timeout(10):
                while llm._pool.num_unfinished or llm._pool.stats.num_held_blocks:
                    await asyncio.sleep(0.02)

    asyncio.run(story())


def test_a_model_that_is_not_there_is_one_clear_line_and_leaves_no_process() -> None:
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ModelError, match="neither a model folder nor a name"):
        LLM("no-such-model")
    with pytest.raises(ModelError, match="policy"):
        LLM(policy="luck")
    assert psutil.Process().children(recursive=True) == before


def test_the_public_names_come_without_torch() -> None:
    code = "import sys, orcaserve; orcaserve.SamplingParams(); orcaserve.AsyncLLM; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
