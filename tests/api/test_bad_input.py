"""Whatever a client sends, it gets a 4xx in OpenAI's shape that says what to do, and the next request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_world import Server, make_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orcaserve.serve.app import make_app
from orcaserve.serve.frontend import Frontend, HttpOptions
from orcaserve.serve.metrics import Metrics

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def check(response: httpx.Response, status: int, param: str | None = None, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    lowered = response.text.lower()
    assert not any(word in lowered for word in ("traceback", ".py", "/home", "0x7f", "object at"))
    assert response.headers["x-request-id"]
    return str(error["message"])


def check_alive(client: httpx.Client) -> None:
    assert client.post(COMPLETIONS, json={"prompt": "The", "max_tokens": 1}).status_code == 200


BAD = {
    "NaN": ('{"prompt": "x", "temperature": NaN}', None),
    "infinite": ('{"prompt": "x", "temperature": 1e999}', "temperature"),
    "text for a number": ('{"prompt": "x", "temperature": "hot"}', "temperature"),
    "hot": ('{"prompt": "x", "temperature": 2.5}', "temperature"),
    "token -1": ('{"prompt": [-1]}', "prompt[0]"),
    "token = vocabulary": ('{"prompt": [1, 400]}', "prompt"),
    "token = vocabulary, nested": ('{"prompt": [[1], [400]]}', "prompt[1]"),
    "huge token": ('{"prompt": [1000000000000000000000]}', "prompt[0]"),
    "n = 10^9": ('{"prompt": "x", "n": 1000000000}', "n"),
    "n = 0": ('{"prompt": "x", "n": 0}', "n"),
    "broken JSON": ('{"prompt": "x"', None),
    "no JSON": ("hello", None),
    "no object": ("[1]", None),
    "empty": ("", None),
    "not UTF-8": (b'{"prompt": "\xff"}', None),
    "half a surrogate": ('{"prompt": "\\ud800"}', None),
    "nested": ('{"prompt": "x", "a": ' + "[" * 30_000, None),
    "nested variables": ('{"prompt": ' + "[" * 5_000 + "]" * 5_000 + "}", None),
    "negative max_tokens": ('{"prompt": "x", "max_tokens": -1}', "max_tokens"),
    "logit_bias too large": ('{"prompt": "x", "logit_bias": {"5": 101}}', "logit_bias"),
    "logit_bias beyond": ('{"prompt": "x", "logit_bias": {"400": 1}}', "logit_bias"),
    "logit_bias of a word": ('{"prompt": "x", "logit_bias": {"fox": 1}}', "logit_bias"),
    "logit_bias of -1": ('{"prompt": "x", "logit_bias": {"-1": 1}}', "logit_bias"),
    "stop token beyond": ('{"prompt": "x", "stop_token_ids": [400]}', "stop_token_ids"),
    "empty stop": ('{"prompt": "x", "stop": ""}', "stop"),
    "many stops": (json.dumps({"prompt": "x", "stop": ["s"] * 17}), "stop"),
    "top_p": ('{"prompt": "x", "top_p": 1.1}', "top_p"),
    "min_p": ('{"prompt": "x", "min_p": -0.1}', "min_p"),
    "top_k": ('{"prompt": "x", "top_k": -2}', "top_k"),
    "penalty": ('{"prompt": "x", "presence_penalty": 3}', "presence_penalty"),
    "repetition": ('{"prompt": "x", "repetition_penalty": 0}', "repetition_penalty"),
    "repetition so small that scores become infinite": (
        '{"prompt": "x", "repetition_penalty": 1e-300}',
        "repetition_penalty",
    ),
    "seed": ('{"prompt": "x", "seed": 9223372036854775808}', "seed"),
    "logprobs": ('{"prompt": "x", "logprobs": 21}', "logprobs"),
    "min_tokens": ('{"prompt": "x", "min_tokens": 20, "max_tokens": 10}', "min_tokens"),
    "suffix": ('{"prompt": "x", "suffix": "y"}', "suffix"),
    "best_of": ('{"prompt": "x", "best_of": 5}', "best_of"),
    "no prompt": ("{}", "prompt"),
    "no prompts": ('{"prompt": [], "n": 0}', "n"),
    "mixed prompts": ('{"prompt": ["x", [1]]}', "prompt"),
    "many prompts": (json.dumps({"prompt": ["x"] * 1025}), "prompt"),
    "context": ('{"prompt": "x", "max_tokens": 512}', "prompt"),
    "huge max_tokens": ('{"prompt": "x", "max_tokens": 1000000000000}', "max_tokens"),
    "cost": (json.dumps({"prompt": ["x7" * 200] * 8, "n": 128, "max_tokens": 1, "prompt_logprobs": 20}), "n"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_completions(client: httpx.Client, name: str) -> None:
    body, param = BAD[name]
    check(client.post(COMPLETIONS, content=body), 400, param)
    check_alive(client)


MESSAGE = {"role": "user", "content": "x"}
BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "other role": ({"messages": [{"role": "parrot", "content": "x"}]}, "messages"),
    "number": ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    "no content": ({"messages": [{"role": "user"}]}, "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages[0].content[0]",
    ),
    "top_logprobs alone": ({"messages": [MESSAGE], "top_logprobs": 2}, "top_logprobs"),
    "a format without a schema": (
        {"messages": [MESSAGE], "response_format": {"type": "json_schema"}},
        "response_format",
    ),
    "an unknown format": ({"messages": [MESSAGE], "response_format": {"type": "xml"}}, "response_format.type"),
    "tools": ({"messages": [MESSAGE], "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "own template": ({"messages": [MESSAGE], "chat_template": "{{ 1 }}"}, "chat_template"),
    "own bos": ({"messages": [MESSAGE], "chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(client: httpx.Client, name: str) -> None:
    body, param = BAD_CHATS[name]
    check(client.post(CHAT, json=body), 400, param)
    check_alive(client)


def test_clients_know_a_prompt_that_is_too_long_by_its_words(client: httpx.Client) -> None:
    """Clients look for these words of OpenAI's, and then shorten the prompt or take another model."""
    for body in ({"prompt": [5], "max_tokens": 100_000}, {"prompt": "x" * 10_000_000}):
        message = check(client.post(COMPLETIONS, json=body), 400, "prompt", "context_length_exceeded")
        assert message.startswith("This model's maximum context length is 512 tokens")


def test_variables_may_have_pythons_names(client: httpx.Client) -> None:
    """Of the name "self" there are two in a call by keywords, which was our mistake, not the client's."""
    for name in ("self", "args", "kwargs", "context"):
        body = {"messages": [MESSAGE], "chat_template_kwargs": {name: "x"}, "max_tokens": 1}
        assert client.post(CHAT, json=body).status_code == 200, name


def test_our_own_mistakes_have_the_shape_of_errors_too() -> None:
    broken = Frontend("x", None, Metrics("x"), HttpOptions())  # type: ignore[arg-type]

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(broken), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/health")

    assert "mistake" in check(asyncio.run(ask()), 500, None, "internal_error")


def test_prompts_far_beyond_the_context(client: httpx.Client) -> None:
    """Ten megabytes as text, as a conversation and as ids; and beyond the limit of a body, declared or not."""
    text = "x" * 10_000_000
    message = check(client.post(COMPLETIONS, json={"prompt": text}), 400, "prompt", "context_length_exceeded")
    assert "512" in message
    check(client.post(CHAT, json={"messages": [{**MESSAGE, "content": text}]}), 400, "messages")
    check(client.post(COMPLETIONS, json={"prompt": [5] * 200_000}), 400, "prompt", "context_length_exceeded")
    message = check(client.post(COMPLETIONS, json={"prompt": "x " * 400}), 400, "prompt", "context_length_exceeded")
    assert "512" in message
    check(client.post(COMPLETIONS, json={"prompt": [5] * 200_000, "echo": True}), 400, "prompt")
    check(client.post(COMPLETIONS, json={"prompt": ["x"] * 200_000}), 400, "prompt")
    check(client.post(COMPLETIONS, json={"prompt": "fox " * 4_000}), 400, "prompt", "context_length_exceeded")
    check(client.post(CHAT, json={"messages": [MESSAGE] * 30_000}), 400, "messages", "context_length_exceeded")
    kept = client.post(COMPLETIONS, json={"prompt": "fox " * 2_000, "truncate_prompt_tokens": 9, "max_tokens": 1})
    assert kept.json()["usage"]["prompt_tokens"] == 9
    check(client.post(COMPLETIONS, content=b'{"prompt": "' + b"x" * (33 << 20)), 413)

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * (1 << 20)

    # The server may hang up while we are still talking.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        check(client.post(COMPLETIONS, content=endless()), 413)
    check_alive(client)


def test_unknown_things(client: httpx.Client) -> None:
    check(client.post(COMPLETIONS, json={"prompt": "x", "model": "gpt-17"}), 404, "model", "model_not_found")
    check(client.get("/v1/models/gpt-17"), 404, "model", "model_not_found")
    check(client.get("/nothing"), 404)
    check(client.get("/v1/models/"), 404)
    check(client.get(COMPLETIONS), 405)
    check(client.put("/health"), 405)
    check(client.post("/tokenize", json={"prompt": "x", "messages": []}), 400)
    check(client.post("/detokenize", json={"tokens": [400]}), 400, "tokens")
    check_alive(client)


def test_a_failing_row_fails_its_request_alone(model_dir: Path) -> None:
    with Server(model_dir, "--nan-on", "77", "--step-seconds", "0.005").ready() as server, server.client() as client:
        body = {"prompt": "The", "max_tokens": 300, "ignore_eos": True, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as other:
            lines = other.iter_lines()
            next(lines)
            failed = client.post(COMPLETIONS, json={"prompt": [77]})
            assert "NaN" in check(failed, 500)
            assert failed.headers["x-should-retry"] == "false"
            # A stream has not begun before its first token, so that its status can still say it.
            assert "NaN" in check(client.post(COMPLETIONS, json={"prompt": [77], "stream": True}), 500)
            assert '"finish_reason":"length"' in [line for line in lines if line][-2]


def test_models_without_beginning_or_template(tmp_path: Path) -> None:
    with Server(make_model(tmp_path / "bare", bos=False, template=False)).ready() as server, server.client() as client:
        check(client.post(COMPLETIONS, json={"prompt": ""}), 400, "prompt")
        check(client.post(COMPLETIONS, json={"prompt": []}), 400, "prompt")
        check(client.post(COMPLETIONS, json={"prompt": ["x", ""]}), 400, "prompt[1]")
        check(client.post(CHAT, json={"messages": [MESSAGE]}), 400, "messages", "no_chat_template")
        check_alive(client)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    ["prompt", "messages", "max_tokens", "temperature", "n", "stop", "seed", "logprobs", "logit_bias", "stream_options"]
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([COMPLETIONS, CHAT, "/tokenize", "/detokenize"]), st.dictionaries(NAMES, JSON, max_size=5))
def test_random_bodies_never_get_a_5xx(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json=body)
    assert response.status_code < 500, (body, response.text)
    if response.status_code != 200:
        check(response, response.status_code)
