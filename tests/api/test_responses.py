"""/v1/responses through the openai SDK: what chat says, in items, whole and in events that build the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest
from api_world import Server
from openai.types.responses import Response, ResponseStreamEvent

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)
SAID = [{"role": "user", "content": "Tell me about the fox"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def real(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def content(response: Response) -> Any:
    """What has to be the same whenever it is asked for."""
    said = response.model_dump(exclude={"id", "created_at"})
    if said["usage"]:
        said["usage"]["input_tokens_details"].pop("cached_tokens")
    for item in said["output"]:
        item.pop("id")
        item.pop("call_id", None)
    return said


def streamed(client: openai.OpenAI, **body: Any) -> tuple[list[Any], Response]:
    """All events, each of them checked by the SDK's own types, and the response of the last one."""
    events = list(client.responses.create(**body, stream=True))
    for event in events:
        EVENT.validate_python(event.to_dict(), strict=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    return events, events[-1].response


def rebuilt(events: list[Any]) -> list[dict[str, Any]]:
    """The items, from the deltas alone."""
    items: list[dict[str, Any]] = []
    for event in events:
        match event.type:
            case "response.output_item.added":
                assert event.output_index == len(items)
                assert event.item.status == "in_progress"
                items.append({"type": event.item.type, "text": ""})
            case "response.output_text.delta" | "response.reasoning_text.delta":
                items[event.output_index]["text"] += event.delta
            case "response.function_call_arguments.delta":
                items[event.output_index]["text"] += event.delta
    return items


def flat(response: Response) -> list[dict[str, Any]]:
    return [
        {
            "type": item.type,
            "text": item.arguments if item.type == "function_call" else "".join(part.text for part in item.content),
        }
        for item in response.output
    ]


def test_whole_and_streamed_say_what_chat_says(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": "Tell me about the fox", "max_output_tokens": 30}
    body |= {"temperature": 0.7, "extra_body": {"seed": 3}, "metadata": {"a": "b"}, "store": True}
    whole = sdk.responses.create(**body)
    Response.model_validate(whole.to_dict(), strict=True)
    chat = sdk.chat.completions.create(model="tiny", messages=SAID, max_tokens=30, temperature=0.7, seed=3)
    assert whole.output_text == chat.choices[0].message.content
    assert whole.usage is not None and chat.usage is not None
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.usage.output_tokens == chat.usage.completion_tokens
    assert whole.usage.total_tokens == chat.usage.total_tokens
    assert (whole.metadata, whole.temperature, whole.max_output_tokens) == ({"a": "b"}, 0.7, 30)
    assert whole.to_dict()["store"] is False
    events, last = streamed(sdk, **body)
    assert content(last) == content(whole)
    assert rebuilt(events) == flat(whole)


def test_what_max_output_tokens_cuts_is_incomplete(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": "The", "max_output_tokens": 2, "extra_body": {"seed": 1}}
    whole = sdk.responses.create(**body)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    events, _ = streamed(sdk, **body)
    assert events[-1].type == "response.incomplete"


def test_the_sdks_own_stream_and_parser(real: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        age: int = pydantic.Field(ge=0, le=9)

    asked: dict[str, Any] = {"model": "random", "input": "Who?", "max_output_tokens": 400, "extra_body": {"seed": 2}}
    parsed = real.responses.parse(**asked, text_format=Person)
    assert isinstance(parsed.output_parsed, Person)
    with real.responses.stream(**asked, text_format=Person) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    assert "response.output_text.delta" in kinds and kinds[-1] == "response.completed"


def test_a_schema_is_followed(real: openai.OpenAI) -> None:
    form = {"format": {"type": "json_schema", "name": "person", "schema": PERSON, "strict": True}}
    for seed in range(3):
        whole = real.responses.create(
            model="random", input="Who?", max_output_tokens=400, text=form, extra_body={"seed": seed}
        )
        assert whole.status == "completed"
        jsonschema.validate(json.loads(whole.output_text), PERSON)
        assert whole.to_dict()["text"] == form


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}], ids=str)
def test_calls_come_as_items_and_go_back_as_input(real: openai.OpenAI, choice: Any) -> None:
    body: dict[str, Any] = {"model": "random", "input": SAID, "tools": [WEATHER], "tool_choice": choice}
    body |= {"max_output_tokens": 400, "parallel_tool_calls": False, "extra_body": {"seed": 5}}
    whole = real.responses.create(**body)
    Response.model_validate(whole.to_dict(), strict=True)
    [call] = whole.output
    assert call.type == "function_call" and call.name == "weather" and call.status == "completed"
    jsonschema.validate(json.loads(call.arguments), WEATHER["parameters"])
    events, last = streamed(real, **body)
    assert content(last) == content(whole)
    assert rebuilt(events) == flat(whole)
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [("weather", call.arguments)]
    again = real.responses.create(
        model="random",
        input=[*SAID, call.to_dict(), {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
        max_output_tokens=3,
        extra_body={"seed": 1},
    )
    assert again.usage is not None and again.usage.input_tokens > 10


def test_a_conversation_of_items_is_the_conversation_of_messages(real_server: Server) -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain in Ulm?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Ulm"}'},
        {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
        {"role": "user", "content": "Thanks"},
    ]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    messages = [
        {"role": "system", "content": "You know the weather."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain in Ulm?"},
        {"role": "assistant", "reasoning_content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "1"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Thanks"},
    ]
    with real_server.client() as client:
        body = {"input": items, "instructions": "You know the weather.", "max_output_tokens": 20, "seed": 4}
        ours = client.post("/v1/responses", json=body).json()
        chat = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 20, "seed": 4}).json()
    [item] = ours["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert ours["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_log_probabilities_are_chats(sdk: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "input": "Tell me about the fox", "max_output_tokens": 12}
    body |= {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "extra_body": {"seed": 3}}
    whole = sdk.responses.create(**body)
    chat = sdk.chat.completions.create(
        model="tiny", messages=SAID, max_tokens=12, seed=3, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    expected = [entry.model_dump() for entry in chat.choices[0].logprobs.content or []]
    assert [entry.model_dump() for entry in whole.output[0].content[0].logprobs] == expected
    events, last = streamed(sdk, **body)
    assert content(last) == content(whole)
    told = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.logprob for entry in told] == [entry["logprob"] for entry in expected][: len(told)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": "x", "temperature": 3}, "temperature"),
        ({"input": "x", "max_output_tokens": 100_000}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "fox", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]}, "input[0].arguments"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "x", "tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"input": "x", "tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"input": "x", "tools": [WEATHER], "top_logprobs": 1}, "include"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "pigeon"}}}},
            "text.format",
        ),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_wrong_is_said_of_its_field(real_server: Server, body: dict[str, Any], param: str) -> None:
    with real_server.client() as client:
        for stream in (False, True):
            response = client.post("/v1/responses", json=body | {"stream": stream})
            assert response.status_code == 400, response.text
            error = response.json()["error"]
            assert error["param"] == param, error
            assert "'messages" not in error["message"] and "'response_format" not in error["message"]


def test_nothing_is_stored(client: httpx.Client) -> None:
    id = client.post("/v1/responses", json={"input": "x", "max_output_tokens": 1, "store": True}).json()["id"]
    assert id.startswith("resp_")
    assert client.get(f"/v1/responses/{id}").status_code == 404


def test_a_failure_on_the_way_is_the_last_event(model_dir: Any) -> None:
    with Server(model_dir, "--step-seconds", "0.02").ready() as server, server.client() as client:
        body = {"input": "The", "max_output_tokens": 300, "seed": 1, "stream": True, "timeout": 0.6}
        for seed in range(20):  # until one is long enough
            with client.stream("POST", "/v1/responses", json=body | {"seed": seed}) as response:
                assert response.status_code == 200
                lines = [line for line in response.iter_lines() if line]
            names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
            if names[-1] == "response.failed":
                break
        assert names[0] == "response.created" and names[-1] == "response.failed"
        last = json.loads(lines[-1].removeprefix("data: "))
        assert last["response"]["status"] == "failed"
        assert "timeout" in last["response"]["error"]["message"]
        EVENT.validate_python(last, strict=True)


def test_the_description_has_the_new_paths(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    events = document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    assert events["schema"]["$ref"].endswith("/ResponseEvent")
    assert "/v1/embeddings" in document["paths"]
    page = client.get("/docs").text
    assert "POST /v1/responses" in page and "POST /v1/embeddings" in page
