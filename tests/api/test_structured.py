"""Responses that follow a schema, a pattern, a choice or a grammar: random weights say anything, and are held to it."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from api_world import Server
from schemas import schema

MESSAGES = [{"role": "user", "content": "Tell me"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1000} | fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


def test_a_schema_through_the_openai_client(real_server: Server) -> None:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        found = client.chat.completions.create(
            model="random", messages=MESSAGES, seed=1, max_tokens=1000, response_format=of_schema(PERSON)
        )
    assert found.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(found.choices[0].message.content or ""), PERSON)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_schemas_of_rising_complexity_are_followed(real_server: Server, depth: int) -> None:
    """All at once, greedy and seeded."""

    def ask(seed: int) -> None:
        asked = schema(seed, depth)
        with real_server.client() as client:
            got = chat(client, seed=seed, temperature=seed % 2, response_format=of_schema(asked))
        assert got["finish_reason"] == "stop", (seed, got)
        jsonschema.validate(json.loads(got["message"]["content"]), asked)

    with ThreadPoolExecutor(8) as several:
        list(several.map(ask, range(100 * depth, 100 * depth + 12)))


def test_a_load_changes_nothing(real_server: Server) -> None:
    fields = {"seed": 7, "logprobs": True, "top_logprobs": 2, "response_format": of_schema(PERSON)}
    with real_server.client() as client:
        alone = chat(client, **fields)
        with ThreadPoolExecutor(8) as several:
            for got in several.map(lambda _: chat(client, **fields), range(8)):
                assert got == alone


def test_log_probabilities_are_the_models_own(real_server: Server) -> None:
    """The likeliest tokens are those that it would have said without a grammar, which the chosen one seldom is."""
    with real_server.client() as client:
        free = chat(client, temperature=0, max_tokens=1, logprobs=True, top_logprobs=3)
        held = chat(client, temperature=0, logprobs=True, top_logprobs=3, guided_regex="[0-9]{3}")
    first = held["logprobs"]["content"][0]
    assert first["top_logprobs"] == free["logprobs"]["content"][0]["top_logprobs"]
    assert first["logprob"] < first["top_logprobs"][0]["logprob"]


@pytest.mark.parametrize("stream", [False, True])
def test_patterns_choices_and_grammars(real_server: Server, stream: bool) -> None:
    lark = 'start: "[" NUMBER ("," NUMBER)~1..3 "]"\nNUMBER: /[1-9][0-9]{0,2}/'
    wishes: list[tuple[dict[str, Any], str]] = [
        ({"guided_regex": r"[a-f]+/\d{2}\n?x{1,3}", "max_tokens": 300}, r"[a-f]+/\d{2}\n?x{1,3}"),
        ({"structured_outputs": {"regex": "(ab|cd){1,3}"}}, "(ab|cd){1,3}"),
        ({"guided_choice": ["yes", "no, never", 'a "b"']}, 'yes|no, never|a "b"'),
        ({"structured_outputs": {"choice": ["1", "2"]}}, "1|2"),
        ({"guided_grammar": lark}, r"\[[1-9]\d{0,2}(,[1-9]\d{0,2}){1,3}\]"),
        ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 99}}, r"\d\d"),
    ]
    with real_server.client() as client:
        for number, (wish, pattern) in enumerate(wishes):
            body = {"prompt": "x", "max_tokens": 60, "seed": number, "n": 3, "stream": stream} | wish
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            texts, reasons = ["", "", ""], [None, None, None]
            events = [response.text] if not stream else re.findall(r"data: (\{.*)", response.text)
            for choice in (choice for event in events for choice in json.loads(event)["choices"]):
                texts[choice["index"]] += choice["text"]
                reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            for text, reason in zip(texts, reasons, strict=True):
                if reason == "stop":
                    assert re.fullmatch(pattern, text), (wish, text)
                else:
                    assert wish.get("max_tokens"), (wish, text, "only the open pattern may be cut")


def test_any_json_object(real_server: Server) -> None:
    with real_server.client() as client:
        got = chat(client, seed=3, max_tokens=400, response_format={"type": "json_object"})
    assert got["message"]["content"].startswith("{")
    if got["finish_reason"] == "stop":
        assert isinstance(json.loads(got["message"]["content"]), dict)


def test_what_asks_for_nothing_in_a_schema_is_no_obstacle(real_server: Server) -> None:
    asked = {
        "type": "object",
        "properties": {
            "secret": {"type": "string", "format": "password", "maxLength": 4},
            "uniqueItems": {"const": {"uniqueItems": False}},
            "list": {"$ref": "#/$defs/list"},
        },
        "required": ["secret", "uniqueItems", "list"],
        "additionalProperties": False,
        "$defs": {"list": {"type": "array", "items": {"anyOf": [{"enum": [1]}]}, "uniqueItems": False, "maxItems": 2}},
    }
    with real_server.client() as client:
        got = chat(client, seed=4, response_format=of_schema(asked))
    assert got["finish_reason"] == "stop"
    said = json.loads(got["message"]["content"])
    jsonschema.validate(said, asked)
    assert said["uniqueItems"] == {"uniqueItems": False}, "a constant is no schema"


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"response_format": of_schema({"type": "array", "items": {}, "uniqueItems": True})}, "response_format"),
        ({"response_format": of_schema({"type": "pigeon"})}, "response_format"),
        ({"response_format": of_schema({"$ref": "#/nowhere"})}, "response_format"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_grammar": "start: nobody"}, "guided_grammar"),
        ({"guided_json": "{"}, None),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"guided_choice": []}, "guided_choice"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_is_refused(real_server: Server, wish: dict[str, Any], param: str | None) -> None:
    with real_server.client() as client:
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES} | wish)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "Traceback" not in error["message"] and len(error["message"]) < 500


HOSTILE: dict[str, dict[str, Any]] = {
    "backtracking": {"guided_regex": "(a+)+b"},
    "counting": {"guided_regex": "((a{1,100}){1,100}){1,100}"},
    "alternatives": {"guided_regex": "|".join(f"x{i}y*" for i in range(5000))},
    "deep": {"response_format": of_schema(schema(1, 1) | {"properties": {"a": {"$ref": "#"}}, "required": ["a"]})},
    "wide": {"response_format": of_schema({"properties": {f"p{i}": {"pattern": f"^(a|b)*{i}$"} for i in range(800)}})},
    "ambiguous": {"guided_grammar": 'start: s\ns: s s | "a" | ""'},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_stalls_nobody(real_server: Server, name: str) -> None:
    """It is refused, or followed; another stream goes on meanwhile, and every answer comes."""
    gaps: list[float] = []
    over = threading.Event()

    def listen() -> None:
        with real_server.client() as client:
            last = time.monotonic()
            while not over.is_set():
                assert client.get("/health").status_code == 200
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
                time.sleep(0.01)

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        with real_server.client() as client:
            body = {"messages": MESSAGES, "max_tokens": 40, "seed": 1} | HOSTILE[name]
            response = client.post("/v1/chat/completions", json=body)
            after = chat(client, temperature=0, max_tokens=5)
    finally:
        over.set()
        listener.join()
    code = response.json().get("error", {}).get("code")
    assert (response.status_code, code) in ((200, None), (400, "invalid_grammar"), (500, "generation_failed")), (
        response.text
    )
    assert after["finish_reason"] in ("stop", "length")
    print(f"{name}: {response.status_code} {response.text[:200]}, longest gap {max(gaps, default=0):.3f} s")


# -- tools -------------------------------------------------------------------------------------------------------------

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"$ref": "#/$defs/days"}},
                "required": ["city", "days"],
                "additionalProperties": False,
                "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call_that_is_insisted_on_comes(real_server: Server, choice: Any) -> None:
    """Whole and streamed, with the same seed, they are the same calls; arguments follow the tool's schema."""
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        for seed in range(4):
            asked: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": seed}
            asked |= {"model": "random", "max_tokens": 600, "parallel_tool_calls": False}
            whole = client.chat.completions.create(**asked).choices[0]
            assert whole.finish_reason == "tool_calls" and whole.message.content is None
            [call] = whole.message.tool_calls or []
            streamed = {}
            for chunk in client.chat.completions.create(**asked, stream=True):
                for delta in chunk.choices[0].delta.tool_calls or []:
                    streamed[delta.index] = (delta.function.name, delta.function.arguments)
                reason = chunk.choices[0].finish_reason
            assert streamed == {0: (call.function.name, call.function.arguments)} and reason == "tool_calls"
            arguments = json.loads(call.function.arguments)
            if call.function.name == "weather":
                jsonschema.validate(arguments, TOOLS[0]["function"]["parameters"])
            else:
                assert call.function.name == "clock" and arguments == {} and choice == "required"


def test_a_model_that_loves_blanks_makes_its_call_all_the_same(real_server: Server) -> None:
    """Between the parts there is room to indent, but not to go on for ever."""
    with real_server.client() as client:
        [blank] = client.post("/tokenize", json={"prompt": " ", "add_special_tokens": False}).json()["tokens"]
        body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
        body |= {"max_tokens": 700, "seed": 1, "logit_bias": {str(blank): 100}}
        [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert choice["finish_reason"] == "tool_calls" and len(choice["message"]["tool_calls"]) == 1


def test_a_call_has_no_arguments_that_the_function_does_not_name(real_server: Server) -> None:
    """Schemas of functions seldom say so, and callers fail of what they do not know; one that allows more gets more."""
    day = {"properties": {"day": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["day"]}
    asked = {"messages": MESSAGES, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 300}
    with real_server.client() as client:
        [comma] = client.post("/tokenize", json={"prompt": ",", "add_special_tokens": False}).json()["tokens"]
        for says, finish in (({}, "tool_calls"), ({"additionalProperties": {"const": 1}}, "length")):
            function = {"name": "f", "parameters": {"type": "object", **day, **says}}
            body = asked | {"tools": [{"type": "function", "function": function}], "logit_bias": {str(comma): 100}}
            [choice] = client.post("/v1/chat/completions", json=body | {"seed": 1}).json()["choices"]
            assert choice["finish_reason"] == finish
            for call in choice["message"].get("tool_calls") or []:
                assert json.loads(call["function"]["arguments"]).keys() == {"day"}


def test_a_conversation_with_calls_goes_on(real_server: Server) -> None:
    said = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]  # fmt: skip
    with real_server.client() as client:
        body = {"messages": said, "max_tokens": 5, "seed": 1, "tools": TOOLS, "tool_choice": "auto"}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        ids = client.post("/tokenize", json={"messages": said}).json()["tokens"]
        text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
        assert "<tool_call>Ulm</tool_call>" in text and "tool: rain" in text
        without = client.post("/v1/chat/completions", json=body | {"tool_choice": "none", "return_token_ids": True})
        assert without.json()["prompt_token_ids"] == ids


def test_tools_that_cannot_be_offered_are_refused(server: Server, real_server: Server) -> None:
    with server.client() as client:  # its template knows none
        refused = client.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    nobody = {"type": "function", "function": {"name": "nobody"}}
    broken = [{"type": "function", "function": {"name": "f", "parameters": {"type": "pigeon"}}}]
    with real_server.client() as client:
        for wish, param in (
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tools": TOOLS, "tool_choice": nobody}, "tool_choice"),
            ({"tools": broken, "tool_choice": "required"}, "tool_choice"),
            ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "tool_choice"),
            ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ):
            answer = client.post("/v1/chat/completions", json={"messages": MESSAGES} | wish)
            assert answer.status_code == 400, (wish, answer.text)
            assert answer.json()["error"]["param"] == param, answer.text


def test_a_grammar_that_proves_too_hard_is_the_clients_mistake(real_server: Server) -> None:
    """It compiles, and only its first mask shows that it leads nowhere: 500 would have clients try it again."""
    nothing = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}}
    with real_server.client() as client:
        response = client.post("/v1/completions", json={"prompt": "x", "guided_json": nothing})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["code"] == "invalid_grammar"
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
