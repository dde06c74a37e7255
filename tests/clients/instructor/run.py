"""instructor: a model of pydantic's filled in, by each of its ways to ask for one."""

from __future__ import annotations

from typing import Literal

import checks
import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

URL, MODEL, *_ = checks.arguments()
CLIENT = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me about the whale."}],
    "temperature": 0,
    "max_tokens": 600,
    "max_retries": 0,
}


class Animal(BaseModel):
    """What is known of an animal; nothing else, since the small model would never end."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    legs: int = Field(ge=0, le=8)
    home: Literal["sea", "forest", "sky"]


def filled_in(mode: instructor.Mode) -> None:
    animal = instructor.from_openai(CLIENT, mode=mode).chat.completions.create(response_model=Animal, **ASKED)
    assert isinstance(animal, Animal)


def tools() -> None:
    filled_in(instructor.Mode.TOOLS)


def strict_tools() -> None:
    filled_in(instructor.Mode.TOOLS_STRICT)


def json_schema() -> None:
    filled_in(instructor.Mode.JSON_SCHEMA)


def a_part_at_a_time() -> None:
    client = instructor.from_openai(CLIENT, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(client.chat.completions.create_partial(response_model=Animal, **ASKED))
    assert parts[-1].home in ("sea", "forest", "sky")


if __name__ == "__main__":
    checks.run([tools, strict_tools, json_schema, a_part_at_a_time])
