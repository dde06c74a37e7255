"""Tools that a client offers the model: checked at the door, shown to the template, and insisted on if asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from orcaserve.serve import errors
from orcaserve.serve.protocol import ChatRequest, Tool, ToolChoice
from orcaserve.serve.reply import ToolFormat, format_of
from orcaserve.serve.schemas import without_remarks
from orcaserve.serve.structured import WHITESPACE

MOST_TOOLS = 256


class Offer(msgspec.Struct, frozen=True):
    """What a conversation may call. shown: the tools as templates expect them. format: how calls are written.

    grammar: what the response must be, where it must be a call.
    """

    shown: tuple[dict[str, Any], ...]
    format: ToolFormat
    grammar: str | None


def offer_of(request: ChatRequest, template: str | None, special_id: Callable[[str], int | None]) -> Offer | None:
    """None: there is nothing to call. special_id: of a special token's text. Raises ApiError."""
    tools, choice = request.tools or [], request.tool_choice
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise errors.invalid("'tool_choice' asks for a call, but there are no 'tools'.", "tool_choice")
        return None
    if choice == "none":
        return None
    if len(tools) > MOST_TOOLS:
        raise errors.invalid(f"{len(tools)} tools are more than {MOST_TOOLS}.", "tools")
    form = format_of(template or "")
    if form is None:
        raise errors.unsupported("tools", "this model's chat template knows none; describe them in a message")
    grammar = None
    if isinstance(choice, ToolChoice):
        wanted = [tool for tool in tools if tool.function.name == choice.function.name]
        if not wanted:
            raise errors.invalid(f"'tool_choice' names no tool of 'tools': {choice.function.name!r}.", "tool_choice")
        grammar = _insist(form, wanted, 1, special_id)
    elif choice == "required":
        most = None if request.parallel_tool_calls is not False else 1
        grammar = _insist(form, tools, most, special_id)
    shown = tuple(msgspec.to_builtins(tool) for tool in tools)
    return Offer(shown, form, grammar)


def _insist(form: ToolFormat, tools: Sequence[Tool], most: int | None, special_id: Callable[[str], int | None]) -> str:
    """A grammar of a call, or of several, in the format's own marks."""
    from llguidance import LLMatcher

    one = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    form.arguments: _closed(tool.function.parameters or {"type": "object", "properties": {}}),
                },
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
    }
    schema = without_remarks({**one, **_definitions(one), "x-guidance": {"whitespace_pattern": WHITESPACE}})

    def mark(text: str) -> str:
        id = special_id(text)
        return msgspec.json.encode(text).decode() if id is None else f"<[{id}]>"

    inside = f"%json {msgspec.json.encode(schema).decode()}"
    if form.many == "one":
        again = "" if most == 1 else ' ("\\n" call)*'
        return str(
            LLMatcher.grammar_from_lark(
                f'start: call{again}\ncall: {mark(form.begin)} "\\n" one "\\n" {mark(form.end)}\none: {inside}\n'
            )
        )
    if form.many == "list":
        again = "" if most == 1 else ' (", " one)*'
        return str(LLMatcher.grammar_from_lark(f'start: {mark(form.begin)} "[" one{again} "]"\none: {inside}\n'))
    again = "" if most == 1 else ' ("; " one)*'
    return str(LLMatcher.grammar_from_lark(f"start: one{again}\none: {inside}\n"))


def _closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """Without arguments that the function does not name, unless its schema names none, speaks of others, or refers."""
    speaks = {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf"}
    is_closed = "properties" in parameters and not speaks & parameters.keys()
    return {**parameters, "additionalProperties": False} if is_closed else parameters


def _definitions(schema: dict[str, Any]) -> dict[str, Any]:
    """Definitions of the tools' schemas, moved to the root, where references look for them."""
    found: dict[str, Any] = {}
    for option in schema["anyOf"]:
        for value in option["properties"].values():
            for key in ("$defs", "definitions"):
                if isinstance(value, dict) and isinstance(value.get(key), dict):
                    found.setdefault(key, {}).update(value[key])
    return found
