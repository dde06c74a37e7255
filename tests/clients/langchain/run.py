"""langchain-openai: chat, a stream, tools, structured output, several at once."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Literal

import checks
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import LengthFinishReasonError
from pydantic import BaseModel, Field

URL, MODEL, *_ = checks.arguments()
CHAT = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=600, max_retries=0)
QUESTION = "What is a whale?"


class Animal(BaseModel):
    """What is known of an animal."""

    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=8)
    home: Literal["sea", "forest", "sky"]


@tool
def weather(city: Annotated[str, Field(max_length=12)], unit: Literal["C", "F"]) -> str:
    """The weather in a city."""
    return f"It rains in {city}, at 9 degrees {unit}."


def chat() -> None:
    message = CHAT.invoke([SystemMessage("Be kind."), HumanMessage(QUESTION)])
    assert message.content
    assert message.usage_metadata["output_tokens"] > 0
    assert message.response_metadata["finish_reason"] in ("stop", "length")


def stream() -> None:
    whole = CHAT.invoke(QUESTION)
    added = None
    for chunk in CHAT.stream(QUESTION, stream_usage=True):
        added = chunk if added is None else added + chunk
    assert isinstance(added, AIMessageChunk)
    assert added.content == whole.content
    assert added.usage_metadata == whole.usage_metadata


def batch_and_async() -> None:
    alone = CHAT.invoke(QUESTION).content
    assert [message.content for message in CHAT.batch([QUESTION] * 4)] == [alone] * 4
    assert asyncio.run(CHAT.ainvoke(QUESTION)).content == alone


def logprobs() -> None:
    message = CHAT.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    content = message.response_metadata["logprobs"]["content"]
    assert len(content) >= message.usage_metadata["output_tokens"] - 1
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def tools() -> None:
    for choice in ("required", "weather"):
        message = CHAT.bind_tools([weather], tool_choice=choice).invoke("What is the weather in Rome?")
        call = message.tool_calls[0]
        assert call["name"] == "weather"
        assert set(call["args"]) == {"city", "unit"}
        answer = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        assert CHAT.bind_tools([weather], tool_choice="none").invoke(
            [HumanMessage("What is the weather in Rome?"), message, answer]
        )


def tools_in_a_stream() -> None:
    added = None
    for chunk in CHAT.bind_tools([weather], tool_choice="weather").stream("What is the weather in Rome?"):
        added = chunk if added is None else added + chunk
    assert added.tool_calls[0]["name"] == "weather"
    assert set(added.tool_calls[0]["args"]) == {"city", "unit"}


def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        animal = CHAT.with_structured_output(Animal, method=method).invoke("Tell me about the whale.")
        assert isinstance(animal, Animal), animal
    strict = CHAT.with_structured_output(Animal, method="json_schema", strict=True, include_raw=True)
    assert strict.invoke("Tell me about the whale.")["parsing_error"] is None
    for seed in range(20):  # how long an object without a schema gets is the model's affair: the first draw that ends
        drawn = CHAT.model_copy(update={"temperature": 1, "seed": seed})
        with contextlib.suppress(LengthFinishReasonError):
            assert isinstance(drawn.with_structured_output(None, method="json_mode").invoke("A whale, in JSON."), dict)
            return
    raise AssertionError("no draw ended by itself")


def responses_api() -> None:
    chat = CHAT.model_copy(update={"use_responses_api": True})
    message = chat.invoke(QUESTION)
    assert message.text
    assert "".join(chunk.text for chunk in chat.stream(QUESTION)) == message.text
    assert chat.bind_tools([weather], tool_choice="weather").invoke("Rome?").tool_calls[0]["name"] == "weather"


def completions() -> None:
    model = OpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=20)
    assert "".join(model.stream("Once upon a time")) == model.invoke("Once upon a time")


def embeddings() -> None:
    vectors = OpenAIEmbeddings(base_url=f"{URL}/v1", api_key="none", model=MODEL, check_embedding_ctx_length=False)
    assert len({len(vector) for vector in vectors.embed_documents(["a fox", "a lake"])}) == 1


if __name__ == "__main__":
    checks.run(
        [
            chat,
            stream,
            batch_and_async,
            logprobs,
            tools,
            tools_in_a_stream,
            structured_output,
            responses_api,
            completions,
            embeddings,
        ]
    )
