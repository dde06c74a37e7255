"""A response has the same items however its text was cut, and its events build them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest
from msgspec.structs import replace
from plain_job import JOB
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from orcaserve.serve.choice import Piece
from orcaserve.serve.protocol import PromptTokensDetails, Usage
from orcaserve.serve.reply import FORMATS
from orcaserve.serve.responses import ResponsesWriter, ThoughtTokens
from orcaserve.serve.responses_protocol import ResponsesRequest
from orcaserve.serve.tokenizer import Tokenizer

CALL = '{"name": "f", "arguments": {"a": 1}}'
TEXTS = [
    "<think>hm, well\n</think>\n\nyes",
    f"<think>a</think>I look.<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
    f"one<tool_call>{CALL}</tool_call>two",
    "<think>never said",
    "plain",
    "",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE(vocab={piece: id for id, piece in enumerate(alphabet)}, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    folder: Path = tmp_path_factory.mktemp("bytes")
    library.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


class Generated:
    """What a generation gives: these pieces."""

    usage = Usage(2, 3, 5, PromptTokensDetails(1))

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = pieces

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        for piece in self._pieces:
            yield 0, piece


def pieces(text: str, sizes: list[int], tokenizer: Tokenizer, reason: str = "stop") -> list[Piece]:
    found, at = [], 0
    while at < len(text) or not found:
        size = sizes[len(found) % len(sizes)]
        part = text[at : at + size]
        found.append(Piece(text=part, token_ids=tokenizer.encode(part, add_special_tokens=False)))
        at += size
    found[-1].finish_reason = reason  # type: ignore[assignment]
    return found


def written(text: str, sizes: list[int], tokenizer: Tokenizer, reason: str = "stop") -> tuple[Any, list[Any]]:
    """The whole response, and the events."""

    def writer() -> ResponsesWriter:
        of = replace(JOB, tools=FORMATS[0], thinks=True)
        return ResponsesWriter(ResponsesRequest(input="x"), of, tokenizer, "1", "it")

    async def run() -> tuple[bytes, list[bytes]]:
        whole = await writer().whole(Generated(pieces(text, sizes, tokenizer, reason)))
        stream = writer().chunks(Generated(pieces(text, sizes, tokenizer, reason)))
        return whole, [event.data async for event in stream]

    whole, events = asyncio.run(run())
    return json.loads(whole), [json.loads(event) for event in events]


def items(response: Any) -> Any:
    """Without what is drawn."""
    return [
        {key: value for key, value in item.items() if key not in ("call_id", "created_at")}
        for item in response["output"]
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_cuts_change_nothing_and_events_build_the_response(text: str, tokenizer: Tokenizer) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    once, _ = written(text, [1000], tokenizer)
    for _ in range(20):
        sizes = [rng.randint(1, 12) for _ in range(rng.randint(1, 6))]
        whole, events = written(text, sizes, tokenizer)
        assert items(whole) == items(once)
        assert whole["usage"] == once["usage"]
        last = events[-1]["response"]
        assert items(last) == items(once) and last["usage"] == once["usage"]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert done == last["output"]
        said: dict[int, str] = {}
        for event in events:
            if event["type"].endswith(".delta"):
                said[event["output_index"]] = said.get(event["output_index"], "") + event["delta"]
        for index, item in enumerate(last["output"]):
            assert said[index] == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_items_are_what_was_said_in_order(tokenizer: Tokenizer) -> None:
    whole, _ = written(TEXTS[1], [3], tokenizer)
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call", "function_call"]
    assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "a"}]
    assert whole["output"][1]["content"][0]["text"] == "I look."
    assert [item["arguments"] for item in whole["output"][2:]] == ['{"a": 1}'] * 2
    assert len({item["id"] for item in whole["output"]}) == 4
    assert len({item["call_id"] for item in whole["output"][2:]}) == 2
    cut, events = written("<think>never said", [4], tokenizer, "length")
    assert (cut["status"], cut["output"][0]["status"]) == ("incomplete", "incomplete")
    assert events[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize(
    ("text", "is_thinking", "count"),
    [
        ("<think>ab</think>cd", False, len("<think>ab</think>")),
        ("\n <think>ab</think>cd", False, len("\n <think>ab</think>")),
        ("ab</think>cd", True, len("ab</think>")),
        ("<think>ab", False, len("<think>ab")),
        ("<thin", False, 0),
        ("words <think>ab</think>", False, 0),
        ("<think></think><think>more</think>", False, len("<think></think>")),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_tokens_of_reasoning(text: str, is_thinking: bool, count: int, size: int, tokenizer: Tokenizer) -> None:
    counter = ThoughtTokens(tokenizer, replace(JOB, thinks=True, is_thinking=is_thinking))
    ids = tokenizer.encode(text, add_special_tokens=False)
    for at in range(0, len(ids), size):
        counter.take(ids[at : at + size])
    assert counter.count == count
    silent = ThoughtTokens(tokenizer, JOB)
    silent.take(ids)
    assert silent.count == 0
