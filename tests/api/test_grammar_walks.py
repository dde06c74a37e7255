"""What may come next under a grammar: whatever is chosen of it, the response is complete at its end."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from schemas import schema

from orcaserve import builtin
from orcaserve.serve.protocol import CompletionRequest
from orcaserve.serve.structured import Structures
from orcaserve.serve.tokenizer import Tokenizer
from orcaserve.worker.grammars import LIMITS, Allowed, GrammarError, Grammars, Guide

VOCAB_SIZE = 3072
ENDS = (1, 0)  # the second is of a request, and the library knows nothing of it


@dataclass
class Response:
    grammar: str
    tokens: list[int] = field(default_factory=list)
    id: int = 0
    end_token_ids: tuple[int, ...] = ENDS
    guide: Guide | None = None
    allowed: Allowed | None = None

    def generated(self, start: int) -> list[int]:
        return self.tokens[start:]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(builtin.MODEL_DIR, VOCAB_SIZE)


@pytest.fixture(scope="module")
def structures() -> Structures:
    return Structures(builtin.MODEL_DIR, VOCAB_SIZE, ENDS)


def asked(structures: Structures, **fields: Any) -> str:
    found = asyncio.run(structures.grammar(CompletionRequest(prompt="x", **fields)))
    assert found is not None
    return found


def allowed(response: Response) -> list[int]:
    assert isinstance(response.allowed, np.ndarray), response.allowed
    return np.flatnonzero(np.unpackbits(response.allowed.view(np.uint8), bitorder="little")).tolist()


def walk(grammars: Grammars, structures: Structures, wanted: dict[str, Any], seed: int) -> list[int]:
    """The tokens of an answer, any of those that are allowed each time."""
    rng = np.random.default_rng(seed)
    response = Response(asked(structures, guided_json=wanted))
    while len(response.tokens) < 5000:
        grammars.look([response])
        ids = allowed(response)
        assert not set(ids) & set(ENDS) or set(ids) >= set(ENDS), seed
        if (token := int(rng.choice(ids))) in ENDS:
            return response.tokens
        response.tokens.append(token)
    raise AssertionError(f"no end: {wanted}")


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(token) for token in tokens).decode()


def test_any_way_through_200_schemas_is_an_answer(grammars: Grammars, structures: Structures) -> None:
    tokenizer = Tokenizer(builtin.MODEL_DIR)
    for seed in range(200):
        wanted = schema(seed, 1 + seed // 50)
        text = text_of(tokenizer, walk(grammars, structures, wanted, seed))
        jsonschema.validate(json.loads(text), wanted)


INTEGER = {"type": "integer", "minimum": 0, "maximum": 99}


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "string", "format": "uuid"},
        {"type": "string", "format": "ipv4"},
        {"type": ["string", "null"], "maxLength": 3},
        {"type": "integer", "multipleOf": 5, "minimum": -20, "maximum": 1000},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "array", "prefixItems": [INTEGER, {"type": "boolean"}], "items": False},
        {"oneOf": [INTEGER, {"type": "boolean"}]},
        {"allOf": [{"properties": {"a": INTEGER}, "required": ["a"]}, {"required": ["b"]}],
         "properties": {"a": {}, "b": INTEGER}, "type": "object", "additionalProperties": False},
        {"type": "object", "patternProperties": {"^[ab]$": INTEGER}, "additionalProperties": False, "minProperties": 1},
        {"$defs": {"p": {"type": "object", "properties": {"x": INTEGER, "next": {"$ref": "#/$defs/p"}},
                         "required": ["x"], "additionalProperties": False}}, "$ref": "#/$defs/p"},
        {"const": {"a": [1, {"b": None}]}},
    ],
    ids=str,
)  # fmt: skip
def test_what_clients_send_is_held_to(grammars: Grammars, structures: Structures, wanted: dict[str, Any]) -> None:
    tokenizer = Tokenizer(builtin.MODEL_DIR)
    for seed in range(5):
        found = json.loads(text_of(tokenizer, walk(grammars, structures, wanted, seed)))
        jsonschema.validate(found, wanted, format_checker=jsonschema.FormatChecker())


def test_a_response_is_taken_up_from_its_tokens(grammars: Grammars, structures: Structures) -> None:
    wanted = asked(structures, guided_json=schema(150, 4))
    first, rng = Response(wanted), np.random.default_rng(1)
    for _ in range(60):
        grammars.look([first])
        other = Response(wanted, list(first.tokens))
        grammars.look([other])
        assert allowed(other) == allowed(first)
        grammars.look([first])  # asked again, as after a failed iteration
        assert allowed(other) == allowed(first)
        token = int(rng.choice(allowed(first)))
        if token in ENDS:
            break
        first.tokens.append(token)


def test_one_that_leaves_its_grammar_fails_alone(grammars: Grammars, structures: Structures) -> None:
    wanted = asked(structures, guided_regex="[0-9]{3}")
    astray, sound = Response(wanted, [2000, 2001]), Response(wanted)
    grammars.look([astray, sound])
    assert isinstance(astray.allowed, GrammarError)
    alone = Response(wanted)
    grammars.look([alone])
    assert allowed(sound) == allowed(alone) != []


@pytest.mark.parametrize(
    ("text", "is_followed"),
    [
        ('{"a":1,"b":[1,2]}', True),
        ('{"a": 1, "b": [1, 2]}', True),
        ('{\n  "a": 1,\n  "b": [\n    1,\n    2\n  ]\n}', True),
        ('{\n\t"a": 1,\n\t"b": [1, 2]\n}', True),
        ('{"a":  1, "b": [1, 2]}', False),
        ('{"a":\n\n1, "b": [1, 2]}', False),
    ],
)
def test_json_is_laid_out_as_people_do(
    grammars: Grammars, structures: Structures, text: str, is_followed: bool
) -> None:
    integer = {"type": "integer"}
    wanted = {
        "type": "object",
        "properties": {"a": integer, "b": {"type": "array", "items": integer}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    response = Response(
        asked(structures, guided_json=wanted), Tokenizer(builtin.MODEL_DIR).encode(text, add_special_tokens=False)
    )
    grammars.look([response])
    assert isinstance(response.allowed, np.ndarray) == is_followed
    assert not is_followed or set(allowed(response)) == set(ENDS)


def test_a_response_that_comes_to_a_limit_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses of one grammar share an automaton that grows with all of them, and once too large stays in error."""
    monkeypatch.setitem(LIMITS, "max_lexer_states", 2000)
    grammars, tokenizer = Grammars(builtin.MODEL_DIR, VOCAB_SIZE), Tokenizer(builtin.MODEL_DIR)
    wanted = LLMatcher.grammar_from_regex(r"(a|b)*a(a|b){12}c|z+")
    letters = {token for token in range(5, VOCAB_SIZE) if set(tokenizer.token_bytes(token)) <= set(b"ab")}

    def run(seed: int) -> list[Allowed]:
        rng, response, found = np.random.default_rng(seed), Response(wanted), []
        for _ in range(150):
            grammars.look([response])
            found.append(response.allowed.copy())
            response.tokens.append(int(rng.choice(sorted(letters & set(allowed(response))))))
        return found

    crowd = [run(seed) for seed in range(10)]
    grammars = Grammars(builtin.MODEL_DIR, VOCAB_SIZE)
    alone = run(9)
    assert all(np.array_equal(*pair) for pair in zip(crowd[9], alone, strict=True))
