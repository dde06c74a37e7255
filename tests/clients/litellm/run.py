"""litellm: chat, a stream, tools, structured output, text completion, embeddings, its errors."""

from __future__ import annotations

import asyncio
import json
import os

import checks

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet at import
import litellm

URL, MODEL, *_ = checks.arguments()
SERVER = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0}
CHAT = {**SERVER, "messages": [{"role": "user", "content": "What is a whale?"}], "temperature": 0, "max_tokens": 600}
ANIMAL = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "legs": {"enum": [0, 2, 4, 8]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "remember", "description": "An animal", "parameters": ANIMAL}}


def chat() -> None:
    whole = litellm.completion(**CHAT)
    assert whole.choices[0].message.content
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def openai_provider() -> None:
    by_another = litellm.completion(**{**CHAT, "model": f"openai/{MODEL}"})
    assert by_another.choices[0].message.content == litellm.completion(**CHAT).choices[0].message.content


def stream() -> None:
    chunks = list(litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}))
    whole = litellm.stream_chunk_builder(chunks)
    alone = litellm.completion(**CHAT)
    assert whole.choices[0].message.content == alone.choices[0].message.content
    assert whole.choices[0].finish_reason == alone.choices[0].finish_reason
    assert whole.usage.completion_tokens == alone.usage.completion_tokens


def several_at_once() -> None:
    async def ask() -> list[str]:
        answers = await asyncio.gather(*(litellm.acompletion(**CHAT) for _ in range(8)))
        return [answer.choices[0].message.content for answer in answers]

    assert len(set(asyncio.run(ask()))) == 1


def tools() -> None:
    named = {"type": "function", "function": {"name": "remember"}}
    for choice in ("required", named):
        message = (
            litellm.completion(**CHAT, tools=[TOOL], tool_choice=choice, parallel_tool_calls=False).choices[0].message
        )
        call = message.tool_calls[0].function
        assert call.name == "remember"
        assert set(json.loads(call.arguments)) == {"name", "legs"}


def tools_in_a_stream() -> None:
    chunks = list(
        litellm.completion(**CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, stream=True)
    )
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].finish_reason == "tool_calls"
    assert set(json.loads(whole.choices[0].message.tool_calls[0].function.arguments)) == {"name", "legs"}


def structured_output() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "animal", "schema": ANIMAL, "strict": True}}
    animal = json.loads(litellm.completion(**CHAT, response_format=schema).choices[0].message.content)
    assert set(animal) == {"name", "legs"}
    # How long an object without a schema gets is the model's affair: the first of some draws that ends by itself.
    draws = (
        litellm.completion(**{**CHAT, "temperature": 1}, seed=seed, response_format={"type": "json_object"})
        for seed in range(20)
    )
    ended = next(draw.choices[0] for draw in draws if draw.choices[0].finish_reason == "stop")
    assert isinstance(json.loads(ended.message.content), dict)


def responses() -> None:
    answer = litellm.responses(**SERVER, input="What is a whale?", temperature=0, max_output_tokens=100)
    assert answer.output_text


def text_completion() -> None:
    text = {**SERVER, "model": f"text-completion-openai/{MODEL}", "prompt": "Once upon a time", "temperature": 0}
    whole = litellm.text_completion(**text, max_tokens=10)
    parts = [chunk.choices[0].text or "" for chunk in litellm.text_completion(**text, max_tokens=10, stream=True)]
    assert "".join(parts) == whole.choices[0].text


def embeddings() -> None:
    vectors = litellm.embedding(**SERVER, input=["a fox", "a lake"]).data
    assert len(vectors) == 2
    assert len(vectors[0]["embedding"]) == len(vectors[1]["embedding"])


def errors_have_their_types() -> None:
    for change, kind in (
        ({"temperature": 3}, litellm.BadRequestError),
        ({"max_tokens": 100_000}, litellm.ContextWindowExceededError),
        ({"model": "hosted_vllm/other"}, litellm.NotFoundError),
    ):
        try:
            litellm.completion(**{**CHAT, **change})
        except kind:
            continue
        raise AssertionError(f"{change} was taken")


if __name__ == "__main__":
    checks.run(
        [
            chat,
            openai_provider,
            stream,
            several_at_once,
            tools,
            tools_in_a_stream,
            structured_output,
            responses,
            text_completion,
            embeddings,
            errors_have_their_types,
        ]
    )
