"""pydantic-ai: an agent's text, a stream, output by a tool and by a schema, a tool that is called."""

from __future__ import annotations

import asyncio
from typing import Literal

import checks
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, MODEL, *_ = checks.arguments()
PROVIDER = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
CHAT = OpenAIChatModel(MODEL, provider=PROVIDER)
SETTINGS = {"temperature": 0.0, "max_tokens": 600, "parallel_tool_calls": False}
QUESTION = "What is a whale?"


class Animal(BaseModel):
    """What is known of an animal."""

    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=8)
    home: Literal["sea", "forest", "sky"]


def text() -> None:
    result = Agent(CHAT, model_settings={"temperature": 0.0}).run_sync(QUESTION)
    assert result.output
    assert result.usage.output_tokens > 0


def stream() -> None:
    agent = Agent(CHAT, model_settings={"temperature": 0.0})

    async def streamed() -> str:
        async with agent.run_stream(QUESTION) as result:
            parts = [part async for part in result.stream_text(delta=True)]
        return "".join(parts)

    assert asyncio.run(streamed()) == agent.run_sync(QUESTION).output


def output_by_a_tool() -> None:
    agent = Agent(CHAT, output_type=ToolOutput(Animal), model_settings=SETTINGS)
    assert isinstance(agent.run_sync(QUESTION).output, Animal)


def output_by_a_schema() -> None:
    agent = Agent(CHAT, output_type=NativeOutput(Animal), model_settings={"temperature": 0.0, "max_tokens": 600})
    assert isinstance(agent.run_sync(QUESTION).output, Animal)


def responses() -> None:
    model = OpenAIResponsesModel(MODEL, provider=PROVIDER)
    assert Agent(model, model_settings={"temperature": 0.0}).run_sync(QUESTION).output


if __name__ == "__main__":
    checks.run([text, stream, output_by_a_tool, output_by_a_schema, responses])
