"""What a response is to follow: from a request's fields to one grammar, compiled once before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from orcaserve.serve import errors
from orcaserve.serve.decode_body import decode_text
from orcaserve.serve.protocol import GenerationRequest
from orcaserve.serve.schemas import without_remarks
from orcaserve.serve.tally import Tally
from orcaserve.worker.grammars import Compiler, GrammarError

MOST_BYTES = 1 << 17  # of a grammar's text
WHITESPACE = r"( |\n[ \t]{0,24})?"  # between the parts of JSON: what anybody writes there, and no room to ramble


class Structures:
    """Checks what requests want. Owner of a compiler over the model's vocabulary.

    One grammar is compiled at a time, in a thread, which leaves the others running while it works.
    """

    def __init__(self, folder: Path, vocab_size: int, end_token_ids: Sequence[int]) -> None:
        """vocab_size: of the logits. end_token_ids: tokens that end a response."""
        self._compiler: Compiler | None = None
        self._why_not = "this model has no end token"
        if end_token_ids:
            try:
                self._compiler = Compiler(folder, vocab_size, end_token_ids[0])
            except GrammarError as error:
                self._why_not = str(error)
        self._turn = asyncio.Semaphore(1)

    async def grammar(self, request: GenerationRequest, insisted: tuple[str, str] | None = None) -> str | None:
        """The grammar that a response follows; None: none is asked for. Raises ApiError.

        insisted: a field that asks for one besides, and that grammar.
        """
        wish = _one_of([*_wishes(request), *([insisted] if insisted else [])])
        if wish is None:
            return None
        param, grammar = wish
        _check_length(grammar, param)
        if request.ignore_eos or request.min_tokens:
            name = "ignore_eos" if request.ignore_eos else "min_tokens"
            raise errors.invalid(f"'{name}' and '{param}' cannot both decide where a response ends.", name)
        try:
            await self._compile(grammar)
        except GrammarError as error:
            raise errors.invalid(f"'{param}' cannot be followed: {error}", param, "invalid_grammar") from None
        return grammar

    async def _compile(self, grammar: str) -> None:
        if self._compiler is None:
            raise GrammarError(self._why_not)
        if self._compiler.known(grammar) is not None:
            return  # it need not wait for those that are not
        async with self._turn:
            await asyncio.to_thread(self._compiler.compile, grammar)


def _wishes(request: GenerationRequest) -> list[tuple[str, str]]:
    """The fields that ask, and the grammars in the compiler's words."""
    found: list[tuple[str, str]] = []
    of = request.response_format
    if of is not None and of.type == "json_object":
        found.append(("response_format", _json({"type": "object"}, "response_format")))
    elif of is not None and of.type == "json_schema":
        if of.json_schema is None:
            raise errors.invalid("'response_format.json_schema' is required.", "response_format")
        found.append(("response_format", _json(of.json_schema.json_schema, "response_format")))
    wishes = request.structured_outputs
    if wishes is not None:
        found += _each(msgspec.structs.asdict(wishes), "structured_outputs.")
    guided = {name: getattr(request, f"guided_{name}") for name in ("json", "regex", "choice", "grammar")}
    found += _each(guided, "guided_")
    return found


def _too_long(param: str) -> errors.ApiError:
    return errors.invalid(f"'{param}' is longer than {MOST_BYTES} characters.", param)


def _check_length(text: str, param: str) -> None:
    if len(text) > MOST_BYTES:
        raise _too_long(param)


def _has_more(value: Any, most: int) -> bool:
    """Whether so many characters are not enough for a value as JSON; it is looked at no further than that."""
    rest = [value]
    while rest and most >= 0:
        one = rest.pop()
        most -= 1 + (len(one) if isinstance(one, (str, list, dict)) else 0)
        if isinstance(one, dict):
            rest += [*one, *one.values()] if most >= 0 else []
        elif isinstance(one, list):
            rest += one if most >= 0 else []
    return most < 0


def _one_of(found: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    if len(found) > 1:
        names = " and ".join(f"'{name}'" for name, _ in found[:2])
        raise errors.invalid(f"{names} are two things to follow; ask for one.", found[1][0])
    return found[0] if found else None


def _each(wishes: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    from llguidance import LLMatcher

    found: list[tuple[str, str]] = []
    for name, value in wishes.items():
        if value is None or value is False:
            continue
        param = prefix + name
        if isinstance(value, str):
            _check_length(value, param)  # before the library reads it
        match name:
            case "json":
                found.append((param, _json(value, param)))
            case "json_object":
                found.append((param, _json({"type": "object"}, param)))
            case "regex":
                found.append((param, LLMatcher.grammar_from_regex(value)))
            case "choice":
                options = " | ".join(msgspec.json.encode(option).decode() for option in value)
                found.append((param, LLMatcher.grammar_from_lark(f"start: {options}")))
            case "grammar":
                found.append((param, LLMatcher.grammar_from_lark(value)))
    return found


def _json(schema: dict[str, Any] | bool | str, param: str) -> str:
    """A schema, or its text, which is followed with limited room between the parts."""
    from llguidance import LLMatcher

    if isinstance(schema, str):
        try:
            schema = decode_text(schema, Tally())
        except ValueError:
            schema = ""
        if not isinstance(schema, dict):
            raise errors.invalid("The JSON schema is no valid JSON object.", code="invalid_grammar")
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if _has_more(schema, MOST_BYTES):
        raise _too_long(param)
    schema = without_remarks(schema)
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))
