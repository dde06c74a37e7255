"""Bodies that would take long to parse are refused unparsed, and texts are not, whatever is in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.serve.tally import (
    MOST_BETWEEN,
    MOST_CONTAINERS,
    MOST_ESCAPES,
    MOST_FRACTIONS,
    MOST_NAMES,
    MOST_VALUES,
    Tally,
)

TEXT = st.text(alphabet=st.sampled_from('a,:[]{}.eE"\\\n1ü'), max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def count(value: Any) -> Iterator[tuple[str, int]]:
    """What there is of each kind, from the value itself."""
    if isinstance(value, dict):
        yield "lists and objects", 1
        yield "fields", len(value)
        yield "values", max(0, len(value) - 1)
        for inner in value.values():
            yield from count(inner)
    elif isinstance(value, list):
        yield "lists and objects", 1
        yield "values", max(0, len(value) - 1)
        for inner in value:
            yield from count(inner)
    elif isinstance(value, float):
        yield "fractions", sum(repr(value).count(sign) for sign in ".e")


@given(VALUE, st.booleans(), st.lists(st.integers(0, 200), max_size=6))
def test_it_counts_what_is_there_however_it_is_cut(value: Any, ascii: bool, cuts: list[int]) -> None:
    body = json.dumps(value, ensure_ascii=ascii).encode()
    tally, begin = Tally(), 0
    for end in [*sorted(cuts), len(body)]:
        tally.add(body[begin:end])
        begin = max(begin, end)
    totals: dict[str, int] = {}
    for name, number in count(value):
        totals[name] = totals.get(name, 0) + number
    for name in ("values", "fields", "lists and objects"):
        assert tally.counts[name] == totals.get(name, 0), (name, body)
    if len(cuts) == 0:  # a cut inside of "true" may count it
        assert tally.counts["fractions"] == totals.get("fractions", 0)


DEAR = {
    "token ids": '{"prompt":[' + "5," * MOST_VALUES + "5,5]}",
    "lists": '{"prompt":[' + "[]," * MOST_CONTAINERS + "[]]}",
    "unknown fields": '{"prompt":"x",' + '"y":0,' * MOST_NAMES + '"z":0}',
    "fractions": '{"prompt":"x","y":[' + "1.2345678901234567e-301," * MOST_FRACTIONS + "1]}",
    "escapes": '{"prompt":"' + "\\n" * (MOST_ESCAPES + 1) + '"}',
    "blanks": " " * MOST_BETWEEN + '{"prompt":"x"}',
}


@pytest.mark.parametrize("name", DEAR)
def test_what_takes_long_to_parse_is_refused(client: httpx.Client, name: str) -> None:
    """One of each kind took the event loop 0.1 to 26 seconds when bodies of 27 MB were parsed in it."""
    response = client.post("/v1/completions", content=DEAR[name])
    assert response.status_code == 413, response.text
    assert response.json()["error"]["code"] == "body_too_complex"
    assert client.get("/health").status_code == 200


def test_json_within_strings_is_counted_too(real_server: Any) -> None:
    """Arguments of calls are JSON in strings, and were parsed without any limit."""
    dear = "[" + "1.2345678901234567e-301," * MOST_FRACTIONS + "1]"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": dear}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    items = [{"type": "function_call", "call_id": "a", "name": "f", "arguments": dear}]
    asked = {
        "/v1/chat/completions": {"messages": messages},
        "/v1/responses": {"input": items},
        "/v1/completions": {"prompt": "x", "guided_json": dear},
    }
    with real_server.client() as client:
        for path, body in asked.items():
            response = client.post(path, json=body)
            assert response.status_code == 413, (path, response.text)


def test_a_text_may_hold_anything(client: httpx.Client) -> None:
    text = "a, [b] {c}: 1.5e3 " * (MOST_VALUES // 4)
    response = client.post("/v1/completions", json={"prompt": text})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_grammars_are_measured_before_they_are_read(client: httpx.Client) -> None:
    for body in (
        {"guided_regex": "whale" * 100_000},
        {"guided_grammar": "whale" * 100_000},
        {"guided_json": {"const": "whale" * 100_000}},
        {"guided_json": json.dumps({"const": "whale" * 100_000})},
    ):
        response = client.post("/v1/completions", json={"prompt": "x", **body})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(body))
