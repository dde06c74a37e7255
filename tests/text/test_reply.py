"""Reasoning, words and calls are told apart the same way however the text was cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.serve.reply import FORMATS, Call, Part, Reply, Thought, ToolFormat, format_of

HERMES, MISTRAL, LLAMA3 = FORMATS
CALL = '{"name": "f", "arguments": {"a": 1}}'
NAMES = frozenset("fg")
CASES: list[tuple[ToolFormat | None, bool, bool, str, list[Part]]] = [
    (None, False, False, "<think>x</think>", ["<think>x</think>"]),
    (None, True, False, "<think>\nhm\n</think>\n\nyes", [Thought("hm"), "yes"]),
    (None, True, True, "hm</think>yes", [Thought("hm"), "yes"]),
    (None, True, False, "yes <think>", ["yes <think>"]),
    (None, True, False, "<think>never said", [Thought("never said")]),
    (None, True, False, "<thin", ["<thin"]),
    (HERMES, False, False, f"<tool_call>\n{CALL}\n</tool_call>", [Call("f", '{"a": 1}')]),
    (
        HERMES,
        True,
        False,
        f"<think>a</think>\n\nI look.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        [Thought("a"), "I look.", Call("f", '{"a": 1}'), Call("f", '{"a": 1}')],
    ),
    (HERMES, False, False, "1 < 2 <tool_", ["1 < 2 <tool_"]),
    (HERMES, False, False, "<tool_call>no call</tool_call>!", ["<tool_call>no call</tool_call>!"]),
    (HERMES, False, False, f"<tool_call>{CALL}", [Call("f", '{"a": 1}')]),
    (HERMES, False, False, '<tool_call>{"name": "f", "arg', ['<tool_call>{"name": "f", "arg']),
    (HERMES, False, False, '<tool_call>{"name": "f"}</tool_call>', [Call("f", "{}")]),
    (HERMES, False, False, '{"name": "f"}', ['{"name": "f"}']),
    (MISTRAL, False, False, f"[TOOL_CALLS] [{CALL}, {CALL}]", [Call("f", '{"a": 1}'), Call("f", '{"a": 1}')]),
    (MISTRAL, False, False, "[TOOL] hello", ["[TOOL] hello"]),
    (LLAMA3, False, False, '{"name": "f", "parameters": {"a": "}"}}', [Call("f", '{"a": "}"}')]),
    (
        LLAMA3,
        False,
        False,
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"b": 2}}',
        [Call("f", "{}"), Call("g", '{"b": 2}')],
    ),
    (LLAMA3, False, False, '{"answer": 42}', ['{"answer": 42}']),
    (LLAMA3, False, False, '{"name": "f", "age": 3}', ['{"name": "f", "age": 3}']),
    (LLAMA3, False, False, '{"name": "Bob", "parameters": {}}', ['{"name": "Bob", "parameters": {}}']),
    (LLAMA3, False, False, "<|python_tag|>brave.call(x)", ["<|python_tag|>brave.call(x)"]),
    (LLAMA3, False, False, '<|python_tag|>{"name": "f"}', [Call("f", "{}")]),
    (LLAMA3, False, False, "It is 42. {x}", ["It is 42. {x}"]),
]


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of a kind are one."""
    found: list[Part] = []
    for part in parts:
        match found[-1:], part:
            case [str(before)], str(text):
                found[-1] = before + text
            case [Thought(before)], Thought(text):
                found[-1] = Thought(before + text)
            case _:
                found.append(part)
    return found


def parts_of(reply: Reply, pieces: list[str]) -> list[Part]:
    parts = [part for piece in pieces for part in reply.feed(piece)]
    return joined(parts + reply.finish())


@pytest.mark.parametrize(("tools", "thinks", "is_thinking", "text", "expected"), CASES, ids=[c[3] for c in CASES])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_what_a_text_holds(
    tools: ToolFormat | None, thinks: bool, is_thinking: bool, text: str, expected: list[Part], size: int
) -> None:
    reply = Reply(tools, names=NAMES, thinks=thinks, is_thinking=is_thinking)
    assert parts_of(reply, [text[i : i + size] for i in range(0, len(text), size)]) == expected
    assert reply.num_calls == sum(isinstance(part, Call) for part in expected)


PIECES = st.sampled_from(
    [
        "<",
        "<think>",
        "</think>",
        "\n",
        " ",
        "word",
        "<tool_call>",
        "</tool_call>",
        CALL,
        "[TOOL_CALLS]",
        "{",
        "}",
        ";",
        '"',
    ]
)


@given(
    tools=st.sampled_from([None, *FORMATS]),
    thinks=st.booleans(),
    is_thinking=st.booleans(),
    words=st.lists(PIECES, max_size=12),
    cuts=st.lists(st.integers(1, 9), min_size=1),
)
def test_cuts_change_nothing_and_no_word_is_lost(
    tools: ToolFormat | None, thinks: bool, is_thinking: bool, words: list[str], cuts: list[int]
) -> None:
    text = "".join(words)
    whole = parts_of(Reply(tools, names=NAMES, thinks=thinks, is_thinking=thinks and is_thinking), [text])
    pieces, at = [], 0
    while at < len(text):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(text[at : at + size])
        at += size
    assert parts_of(Reply(tools, names=NAMES, thinks=thinks, is_thinking=thinks and is_thinking), pieces) == whole
    for part in whole:
        if isinstance(part, Call):
            json.loads(part.arguments)
    said = "".join(part if isinstance(part, str) else part.text for part in whole if not isinstance(part, Call))
    assert said.count("word") == text.count("word")


def test_the_format_is_read_off_the_template() -> None:
    assert format_of("{% if tools %}<tool_call>{% endif %}") == HERMES
    assert format_of("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") == MISTRAL
    assert format_of("{{ messages }}<tool_call>") is None
    assert format_of("{% if tools %}{{ tools }}{% endif %}") is None
