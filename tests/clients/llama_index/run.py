"""llama-index (OpenAILike): completion, chat, streams, tools, structured output."""

from __future__ import annotations

from typing import Literal

import checks
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

URL, MODEL, *_ = checks.arguments()
SERVER = {"api_base": f"{URL}/v1", "api_key": "none", "model": MODEL, "temperature": 0.0, "max_retries": 0}
CHAT = OpenAILike(**SERVER, max_tokens=600, context_window=1024, is_chat_model=True, is_function_calling_model=True)
MESSAGES = [ChatMessage(role="user", content="What is a whale?")]


class Animal(BaseModel):
    """What is known of an animal."""

    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=8)
    home: Literal["sea", "forest", "sky"]


def chat_and_stream() -> None:
    whole = CHAT.chat(MESSAGES).message.content
    assert whole
    assert "".join(part.delta for part in CHAT.stream_chat(MESSAGES)) == whole


def completion_and_stream() -> None:
    model = OpenAILike(**SERVER, max_tokens=20, context_window=1024)
    whole = model.complete("Once upon a time").text
    assert whole
    assert "".join(part.delta for part in model.stream_complete("Once upon a time")) == whole


def tools() -> None:
    tool = FunctionTool.from_defaults(lambda legs: legs, name="count", fn_schema=Animal)
    answer = CHAT.chat_with_tools(
        [tool], user_msg="How many legs?", tool_required=True, allow_parallel_tool_calls=False
    )
    [call] = CHAT.get_tool_calls_from_response(answer)
    assert call.tool_name == "count"
    assert Animal.model_validate(call.tool_kwargs)


def structured_output() -> None:
    for model in (CHAT, CHAT.model_copy(update={"should_use_structured_outputs": True})):
        answer = model.as_structured_llm(Animal).chat(MESSAGES)
        assert isinstance(answer.raw, Animal)


if __name__ == "__main__":
    checks.run([chat_and_stream, completion_and_stream, tools, structured_output])
