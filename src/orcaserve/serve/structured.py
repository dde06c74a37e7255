"""What a response is to follow: from a request's fields to one grammar, compiled once before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from orcaserve.serve import errors
from orcaserve.serve.protocol import GenerationRequest
from orcaserve.worker.grammars import Compiler, GrammarError

MOST_BYTES = 1 << 17  # of a grammar's text
WHITESPACE = r"[ \n\r\t]{0,24}"  # between the parts of JSON: room to indent, but not to go on for ever


class Structures:
    """Checks what requests want. Owner of a compiler over the model's vocabulary, made when the first one comes.

    One grammar is compiled at a time, in a thread, which leaves the others running while it works.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._compiler: Compiler | None = None
        self._turn = asyncio.Semaphore(1)

    async def grammar(
        self,
        request: GenerationRequest,
        end_token_ids: Sequence[int],
        vocab_size: int,
        insisted: tuple[str, str] | None = None,
    ) -> str | None:
        """The grammar that a response follows; None: none is asked for. Raises ApiError.

        insisted: a field that asks for one besides, and that grammar.
        """
        wish = _one_of([*_wishes(request), *([insisted] if insisted else [])])
        if wish is None:
            return None
        param, grammar = wish
        if len(grammar) > MOST_BYTES:
            raise errors.invalid(f"'{param}' is longer than {MOST_BYTES} characters.", param)
        if request.ignore_eos or request.min_tokens:
            name = "ignore_eos" if request.ignore_eos else "min_tokens"
            raise errors.invalid(f"'{name}' and '{param}' cannot both decide where a response ends.", name)
        if not end_token_ids:
            raise errors.invalid(f"This model has no end token, which '{param}' needs.", param)
        async with self._turn:
            try:
                await asyncio.to_thread(self._compile, grammar, end_token_ids[0], vocab_size)
            except GrammarError as error:
                raise errors.invalid(f"'{param}' cannot be followed: {error}", param, "invalid_grammar") from None
        return grammar

    def _compile(self, grammar: str, end_token_id: int, vocab_size: int) -> None:
        if self._compiler is None:
            self._compiler = Compiler(self._folder, vocab_size, end_token_id)
        self._compiler.compile(grammar)


def _wishes(request: GenerationRequest) -> list[tuple[str, str]]:
    """The fields that ask, and the grammars in the compiler's words."""
    found: list[tuple[str, str]] = []
    of = request.response_format
    if of is not None and of.type == "json_object":
        found.append(("response_format", _json({"type": "object"})))
    elif of is not None and of.type == "json_schema":
        if of.json_schema is None:
            raise errors.invalid("'response_format.json_schema' is required.", "response_format")
        found.append(("response_format", _json(of.json_schema.json_schema)))
    wishes = request.structured_outputs
    if wishes is not None:
        found += [(f"structured_outputs.{name}", text) for name, text in _each(msgspec.structs.asdict(wishes))]
    guided = {name: getattr(request, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
    found += [(f"guided_{name}", text) for name, text in _each(guided)]
    return found


def _one_of(found: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    if len(found) > 1:
        names = " and ".join(f"'{name}'" for name, _ in found[:2])
        raise errors.invalid(f"{names} are two things to follow; ask for one.", found[1][0])
    return found[0] if found else None


def _each(wishes: dict[str, Any]) -> list[tuple[str, str]]:
    from llguidance import LLMatcher

    found: list[tuple[str, str]] = []
    for name, value in wishes.items():
        if value is None or value is False:
            continue
        match name:
            case "json":
                found.append((name, _json(value)))
            case "json_object":
                found.append((name, _json({"type": "object"})))
            case "regex":
                found.append((name, LLMatcher.grammar_from_regex(value)))
            case "choice":
                options = " | ".join(msgspec.json.encode(option).decode() for option in value)
                found.append((name, LLMatcher.grammar_from_lark(f"start: {options}")))
            case "grammar":
                found.append((name, LLMatcher.grammar_from_lark(value)))
    return found


def _json(schema: dict[str, Any] | bool | str) -> str:
    """A schema, or its text, which is followed with limited room between the parts."""
    from llguidance import LLMatcher

    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            raise errors.invalid("The JSON schema is no valid JSON object.", code="invalid_grammar") from None
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))
