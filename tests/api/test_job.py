"""Where a request is silent the model's own wishes count, then OpenAI's defaults; and no choice gets more than fits."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from api_world import make_model

from orcaserve.core.config import EngineInfo
from orcaserve.core.request import SamplingParams
from orcaserve.serve.errors import ApiError
from orcaserve.serve.job import _INLINE_CHARACTERS, Job, _weight, chat_job, completion_job
from orcaserve.serve.protocol import ChatRequest, CompletionRequest, Message
from orcaserve.serve.served_model import ServedModel

INFO = EngineInfo(
    architecture="x",
    dtype="x",
    vocab_size=400,
    max_model_len=100,
    block_size=16,
    num_blocks=10,
    profile="x",
)


def make(folder: Path, generation: dict[str, Any]) -> ServedModel:
    make_model(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return ServedModel("m", folder)


def test_all_that_a_template_may_write_counts_before_it_runs_in_the_loop() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for fields in ({"content": "x" * 9000}, {"tool_calls": [call] * 900}, {"reasoning_content": "x" * 9000}):
        assert _weight(Message(role="assistant", **fields)) > _INLINE_CHARACTERS
    assert _weight(Message(role="user", content="hello")) < 20


def complete(model: ServedModel, **fields: Any) -> Job:
    return asyncio.run(completion_job(CompletionRequest(**{"prompt": [5, 6], **fields}), model, INFO))


def params(model: ServedModel, **fields: Any) -> SamplingParams:
    return complete(model, **fields).prompts[0].params


def test_defaults(tmp_path: Path) -> None:
    wishes = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "repetition_penalty": 1.5, "eos_token_id": [1, 9]}
    model = make(tmp_path / "wishes", wishes)
    given = params(model)
    assert (given.temperature, given.top_k, given.top_p, given.repetition_penalty) == (0.5, 7, 0.25, 1.5)
    assert given.max_tokens == 16
    assert complete(model).end_token_ids == (1, 9)
    given = params(model, temperature=0, top_k=-1, top_p=1.0, repetition_penalty=1.0)
    assert (given.temperature, given.top_k, given.top_p, given.repetition_penalty) == (0, 0, 1, 1)
    assert complete(model, ignore_eos=True, stop_token_ids=[4]).end_token_ids == (4,)
    silent = params(make(tmp_path / "silent", {}))
    assert silent == SamplingParams(max_tokens=16)
    foolish = params(make(tmp_path / "foolish", {"temperature": 99, "top_p": -1, "top_k": -5}))
    assert foolish == SamplingParams(max_tokens=16)


def test_defaults_shrink_to_what_fits_and_wishes_do_not(tmp_path: Path) -> None:
    model = make(tmp_path / "m", {})
    assert params(model, prompt=[5] * 90).max_tokens == 10
    assert params(model, prompt=[5] * 90, max_tokens=10).max_tokens == 10
    assert params(model, prompt=[5] * 100, max_tokens=0, echo=True).max_tokens == 0
    for fields in ({"max_tokens": 11}, {"prompt": [5] * 100}, {"prompt": [5] * 101, "max_tokens": 0}):
        with pytest.raises(ApiError) as raised:
            params(model, **{"prompt": [5] * 90, **fields})
        assert raised.value.status == 400
        assert raised.value.body.error.code == "context_length_exceeded"
        assert "100" in str(raised.value)
    chat = asyncio.run(chat_job(ChatRequest(messages=[Message("user", "x")]), model, INFO))
    assert chat.prompts[0].params.max_tokens == 100 - len(chat.prompts[0].ids)


def test_log_probabilities_are_asked_for_once(tmp_path: Path) -> None:
    model = make(tmp_path / "m", {})
    assert params(model).prompt_logprobs is None
    assert params(model, logprobs=3).prompt_logprobs is None
    assert params(model, logprobs=3, echo=True).prompt_logprobs == 3
    assert params(model, logprobs=3, echo=True, prompt_logprobs=5).prompt_logprobs == 5
    assert params(model, logprobs=0).logprobs == 0
