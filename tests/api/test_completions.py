"""/v1/completions and /v1/chat/completions over a real socket: shapes, and stream equal to whole, byte for byte."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
from api_world import events

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def complete(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def chat(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": CHAT, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, path: str, **body: Any) -> list[Any]:
    given = {} if path == "/v1/completions" else {"messages": CHAT}
    with client.stream("POST", path, json={"stream": True, **given, **body}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response)


def test_a_seed_decides_everything(client: httpx.Client) -> None:
    body = {"prompt": "The quick", "seed": 7, "max_tokens": 20, "logprobs": 2, "n": 2}
    first, second = complete(client, **body), complete(client, **body)
    assert first["choices"] == second["choices"]
    assert first["choices"][0]["text"] != first["choices"][1]["text"]
    assert complete(client, **{**body, "seed": 8})["choices"] != first["choices"]
    assert complete(client, **{**body, "seed": -7})["choices"] == complete(client, **{**body, "seed": -7})["choices"]


def test_a_stream_says_what_the_whole_response_says(client: httpx.Client) -> None:
    """Random requests, with stop strings taken from the text that comes without them."""
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(25):
        body: dict[str, Any] = {
            "prompt": draw.choice(["The fox", [5, 6, 7], ["a", "世界"], [[4], [9, 9]]]),
            "seed": draw.randrange(1000),
            "max_tokens": draw.randrange(40),
            "temperature": draw.choice([0, 0.7, 1.3]),
            "n": draw.randint(1, 3),
            "echo": draw.random() < 0.4,
            "logprobs": draw.choice([None, 0, 3]),
            "return_token_ids": True,
            "min_tokens": 0,
        }
        text = complete(client, **{**body, "echo": False, "logprobs": None})["choices"][0]["text"].replace("\ufffd", "")
        if len(text) > 3 and draw.random() < 0.7:
            at = draw.randrange(len(text) - 2)
            body["stop"] = [text[at : at + draw.randint(1, 4)], "never"]
        whole = complete(client, **body)
        chunks = stream(client, "/v1/completions", stream_options={"include_usage": True}, **body)
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
        gathered: dict[int, dict[str, Any]] = {}
        for chunk in chunks[:-1]:
            assert chunk["usage"] is None
            [choice] = chunk["choices"]
            before = gathered.setdefault(choice["index"], choice)
            if before is choice:
                continue
            assert before["finish_reason"] is None, "nothing may follow the end"
            assert "prompt_token_ids" not in choice
            before["text"] += choice["text"]
            before["token_ids"] += choice["token_ids"]
            before["finish_reason"] = choice["finish_reason"]
            if before["logprobs"] is not None:
                for name in before["logprobs"]:
                    before["logprobs"][name] += choice["logprobs"][name]
        assert [gathered[index] for index in sorted(gathered)] == whole["choices"]
        for choice in whole["choices"]:
            if "stop" in body and not body["echo"]:
                assert body["stop"][0] not in choice["text"]
        lengths = [len(choice["token_ids"]) for choice in whole["choices"]]
        assert whole["usage"]["completion_tokens"] == sum(lengths)


def test_a_chat_stream_says_what_the_whole_response_says(client: httpx.Client) -> None:
    for body in (
        {"seed": 3, "max_tokens": 30, "n": 2, "logprobs": True, "top_logprobs": 2, "return_token_ids": True},
        {"seed": 4, "max_completion_tokens": 12, "temperature": 0},
    ):
        whole = chat(client, **body)
        chunks = stream(client, "/v1/chat/completions", **body)
        for index, choice in enumerate(whole["choices"]):
            own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
            assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
            if body.get("logprobs"):
                content = [entry for c in own if c["logprobs"] for entry in c["logprobs"]["content"]]
                assert content == choice["logprobs"]["content"]
                assert all(len(entry["top_logprobs"]) == 2 for entry in content)
                assert [id for c in own for id in c.get("token_ids", [])] == choice["token_ids"]
                assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]


def test_stop_strings_cut_text_ids_logprobs_and_usage(client: httpx.Client) -> None:
    body = {"prompt": "The", "seed": 11, "max_tokens": 60, "logprobs": 0, "return_token_ids": True}
    free = complete(client, **body)["choices"][0]
    at = next(
        i for i in range(5, 50) if free["text"][i : i + 2].isascii() and free["text"].find(free["text"][i : i + 2]) == i
    )
    stop = free["text"][at : at + 2]
    whole = complete(client, **body, stop=stop)
    cut = whole["choices"][0]
    assert cut["text"] == free["text"][:at]
    assert cut["finish_reason"] == "stop"
    count = len(cut["token_ids"])
    assert 0 < count < 60
    assert cut["token_ids"] == free["token_ids"][:count]
    assert cut["logprobs"]["token_logprobs"] == free["logprobs"]["token_logprobs"][:count]
    assert whole["usage"]["completion_tokens"] == count
    later = complete(client, **body, stop=stop, min_tokens=count)["choices"][0]
    assert len(later["token_ids"]) > count, "a stop string counts only after min_tokens"


def test_end_and_stop_tokens_end_without_text(client: httpx.Client) -> None:
    free = complete(client, prompt="The", seed=5, max_tokens=12, return_token_ids=True)["choices"][0]
    token = free["token_ids"][6]
    first = free["token_ids"].index(token)
    cut = complete(client, prompt="The", seed=5, max_tokens=12, return_token_ids=True, stop_token_ids=[token])
    choice = cut["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == free["token_ids"][: first + 1]
    assert free["text"].startswith(choice["text"].rstrip("\ufffd"))
    biased = {"prompt": "The", "max_tokens": 5, "temperature": 0, "logit_bias": {"1": 100}}
    ended = complete(client, **biased)["choices"][0]
    assert (ended["text"], ended["finish_reason"]) == ("", "stop")
    ignored = complete(client, **biased, ignore_eos=True, return_token_ids=True)["choices"][0]
    assert (ignored["token_ids"], ignored["finish_reason"], ignored["text"]) == ([1] * 5, "length", "")
    shown = complete(client, **biased, ignore_eos=True, skip_special_tokens=False)["choices"][0]
    assert shown["text"] == "</s>" * 5


def test_logprobs_are_whole_float32_and_greedy_is_the_greatest(client: httpx.Client) -> None:
    import struct

    body = {"prompt": "The quick brown fox", "temperature": 0, "max_tokens": 8, "logprobs": 3, "echo": True}
    logprobs = complete(client, **body)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert struct.unpack("f", struct.pack("f", value))[0] == value
        assert value in top.values()
    for value, top in list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[-8:]:
        assert value == max(top.values())


def test_scoring_gives_the_prompt_and_nothing_else(client: httpx.Client) -> None:
    scored = complete(client, prompt=["The fox"], max_tokens=0, echo=True, logprobs=1)
    choice = scored["choices"][0]
    assert choice["text"] == "The fox"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["text_offset"] == [0, 0, 3]
    assert scored["usage"]["completion_tokens"] == 0
    longer = complete(client, prompt="The fox", max_tokens=3, echo=True, logprobs=1, seed=1)["choices"][0]
    assert longer["logprobs"]["token_logprobs"][:3] == choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize(
    ("prompt", "skips", "text", "offsets"),
    [
        ("The fox", False, "The fox", [0, 0, 3]),  # a beginning that nobody has written
        ("<s>The fox", True, "<s>The fox", [0, 0, 3, 6]),
        ([0, 0], False, "<s><s>", [0, 3]),
        ([0, 0], True, "", [0, 0]),
    ],
)
def test_special_tokens_of_an_echo_are_where_they_are_written(
    client: httpx.Client, prompt: str | list[int], skips: bool, text: str, offsets: list[int]
) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 0, "skip_special_tokens": skips}
    choice = complete(client, **body)["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == (text, offsets)


def test_a_prompt_is_truncated_to_leave_room_for_what_is_said_by_default(client: httpx.Client) -> None:
    body = {"prompt": list(range(5, 305)) * 4, "truncate_prompt_tokens": -1, "ignore_eos": True}
    assert complete(client, **body)["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("seed", range(5))
def test_text_offsets_point_at_the_tokens(client: httpx.Client, seed: int) -> None:
    choice = complete(client, prompt="世界 fox", max_tokens=60, echo=True, logprobs=0, seed=seed)["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert offsets == sorted(offsets)
    for offset, token in zip(offsets, tokens, strict=True):
        if not token.startswith(("bytes:", "<s>", "</s>")):
            assert choice["text"][offset:].startswith(token)


def test_prompts_may_come_as_text_or_ids_and_in_lists(client: httpx.Client) -> None:
    ids = client.post("/tokenize", json={"prompt": "The fox"}).json()["tokens"]
    by_text = complete(client, prompt="The fox", seed=1)
    assert by_text["usage"]["completion_tokens"] == 16, "the default"
    assert complete(client, prompt=ids, seed=1)["choices"] == by_text["choices"]
    many = complete(client, prompt=["The fox", "The dog"], seed=1, n=2)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["choices"][0]["text"] == by_text["choices"][0]["text"]
    assert complete(client, prompt=[ids, ids], seed=1)["choices"][1]["text"] == by_text["choices"][0]["text"]
    assert complete(client, prompt="", seed=1)["usage"]["prompt_tokens"] == 1, "the beginning token alone"
    short = complete(client, prompt=ids, seed=1, truncate_prompt_tokens=1, return_token_ids=True, echo=True)
    assert short["choices"][0]["prompt_token_ids"] == ids[-1:]
    assert short["choices"][0]["text"].startswith(" fox")


def test_chat_takes_what_the_context_allows(client: httpx.Client) -> None:
    whole = chat(client, seed=1, ignore_eos=True)
    assert whole["usage"]["total_tokens"] == 512
    assert whole["choices"][0]["finish_reason"] == "length"


def test_chat_template_variables_reach_the_template(client: httpx.Client) -> None:
    body = {"messages": CHAT, "chat_template_kwargs": {"mood": "fox"}}
    ids = client.post("/tokenize", json=body).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("<|user|>hi<|assistant|>fox")
    body["add_generation_prompt"] = False
    ids = client.post("/tokenize", json=body).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"].endswith("<|user|>hi")


def test_prompt_logprobs(client: httpx.Client) -> None:
    choice = complete(client, prompt="The fox", max_tokens=1, prompt_logprobs=2)["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == 3
    assert all(len(entry) in (2, 3) for entry in choice["prompt_logprobs"][1:])
    assert len(chat(client, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]) > 5


def test_cached_prompt_tokens_are_said(client: httpx.Client) -> None:
    prompt = list(range(100, 180))
    for _ in range(2):
        usage = complete(client, prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64
    salted = complete(client, prompt=prompt, max_tokens=1, cache_salt="other")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_null_means_not_given(client: httpx.Client, path: str) -> None:
    names = client.get("/openapi.json").json()["components"]["schemas"]
    schema = names["CompletionRequest" if path == "/v1/completions" else "ChatRequest"]
    required = {"prompt": "x"} if path == "/v1/completions" else {"messages": CHAT}
    body = dict.fromkeys(schema["properties"]) | required | {"max_tokens": 2}
    assert client.post(path, json=body).status_code == 200


def test_no_event_is_cut_at_a_line_end_of_unicode(client: httpx.Client) -> None:
    """Found by a random stream: httpx cuts lines at U+0085, which may stand in a JSON string."""
    prompt = "a\x85b\u2028c\u2029d\r\ne\x1ff"
    chunks = stream(client, "/v1/completions", prompt=prompt, echo=True, max_tokens=0)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == prompt
