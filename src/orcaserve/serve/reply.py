"""What an assistant's text holds: reasoning, words for the user, and calls of tools. Told apart while it comes.

Families of models write calls in ways of their own; which one, their chat template shows. Text leaves the parser as
soon as it is certain that it does not begin a call.
"""

from __future__ import annotations

from typing import Literal

import msgspec

THINK, THOUGHT = "<think>", "</think>"


class Call(msgspec.Struct, frozen=True):
    """A complete call. arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class Thought(msgspec.Struct, frozen=True):
    """Reasoning."""

    text: str


Part = str | Thought | Call


class ToolFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a family writes calls.

    begin, end: around a call, or around the list of all of them ("" for end: the end of the response).
    many: what stands between the marks: one call, a list of calls, or calls one after the other.
    arguments: the key of a call's arguments, beside "name".
    sign: what the chat template of such a model holds.
    """

    name: str
    begin: str
    end: str
    many: Literal["one", "list", "row"]
    arguments: str
    sign: str


# The first whose sign a template holds is taken.
FORMATS = (
    ToolFormat(name="hermes", begin="<tool_call>", end="</tool_call>", many="one", arguments="arguments",
               sign="<tool_call>"),
    ToolFormat(name="mistral", begin="[TOOL_CALLS]", end="", many="list", arguments="arguments", sign="[TOOL_CALLS]"),
    ToolFormat(name="llama3", begin="<|python_tag|>", end="", many="row", arguments="parameters", sign="ipython"),
)  # fmt: skip


def format_of(template: str) -> ToolFormat | None:
    """How the model with this chat template writes calls; None: it knows no tools."""
    if "tools" not in template:
        return None
    return next((one for one in FORMATS if one.sign in template), None)


class Reply:
    """The parts of one choice's text. Owner of what is held back until it is certain what it is.

    tools: how calls are written; None: there are none. names: of what may be called; JSON without a mark is a call
    only if it has one of these, and arguments. thinks: whether reasoning is told apart; is_thinking: whether the prompt
    has begun it.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        *,
        names: frozenset[str] = frozenset(),
        thinks: bool = False,
        is_thinking: bool = False,
    ) -> None:
        self._tools = tools
        self._names = names
        self._held = ""
        self._is_fresh = is_thinking  # reasoning has begun, but nothing of it was said
        # Where the text is: before anything was said, in reasoning, in words, or in a call.
        self._place = "thought" if is_thinking else "begin" if thinks else "words"
        self._is_bare = tools is not None and tools.many == "row"  # calls may come without their mark
        self.num_calls = 0
        self._num_told = 0

    def next_call(self) -> int:
        """The number of the call that is told next."""
        self._num_told += 1
        return self._num_told - 1

    def feed(self, text: str) -> list[Part]:
        """The parts that have become certain with this text."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts, is_over=False):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What is left at the end of the response. A call without its last mark counts if it is whole."""
        parts: list[Part] = []
        while self._step(parts, is_over=True):
            pass
        if self._held:
            held = Thought(self._held) if self._place == "thought" else self._held
            self._held = ""
            parts.append(held)
        return parts

    def _step(self, parts: list[Part], is_over: bool) -> bool:
        """Takes one part off what is held; whether something has changed."""
        if not self._held:
            return False
        match self._place:
            case "begin":
                return self._begin(is_over)
            case "thought":
                if self._is_fresh:
                    self._held = self._held.lstrip("\n")
                    self._is_fresh = not self._held
                return self._until(THOUGHT, "rest", parts, is_over, is_thought=True)
            case "rest":
                self._held = self._held.lstrip("\n")
                self._place = "words" if self._held else "rest"
                return bool(self._held)
            case "words":
                return self._words(parts, is_over)
            case _:
                return self._tools is not None and self._call(self._tools, parts, is_over)

    def _begin(self, is_over: bool) -> bool:
        seen = self._held.lstrip()
        if seen.startswith(THINK):
            self._place, self._held, self._is_fresh = "thought", seen.removeprefix(THINK), True
        elif THINK.startswith(seen) and not is_over:
            return False
        else:
            self._place = "words"
        return True

    def _words(self, parts: list[Part], is_over: bool) -> bool:
        tools = self._tools
        if tools is None:
            parts.append(self._held)
            self._held = ""
            return False
        seen = self._held.lstrip()
        if self._is_bare and not seen:
            return False
        if self._is_bare and seen.startswith("{"):
            self._place = "call"
            return True
        self._is_bare = self._is_bare and tools.begin.startswith(seen[: len(tools.begin)])
        found = self._until(tools.begin, "call", parts, is_over)
        self._is_bare = self._is_bare and not found
        return found

    def _until(self, mark: str, place: str, parts: list[Part], is_over: bool, is_thought: bool = False) -> bool:
        """Text up to a mark, which is taken out; what may be the beginning of one is held."""
        before, found, after = self._held.partition(mark)
        if found:
            self._place, self._held = place, after
        else:
            keep = 0 if is_over else _overlap(self._held, mark)
            before, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        # Blank lines around calls and reasoning are not said.
        text = before.rstrip("\n") if found else before
        if text and not found and text.endswith("\n") and not is_over:
            kept = text[len(text.rstrip("\n")) :]
            text, self._held = text.rstrip("\n"), kept + self._held
        if text:
            parts.append(Thought(text) if is_thought else text)
        return bool(found)

    def _call(self, tools: ToolFormat, parts: list[Part], is_over: bool) -> bool:
        inside, found, after = self._held.partition(tools.end) if tools.end else (self._held, "", "")
        if not found and not is_over:
            return False
        calls = read_calls(inside, tools, self._names if self._is_bare else None)
        if calls:
            parts += calls
            self.num_calls += len(calls)
        else:
            parts.append(("" if self._is_bare else tools.begin) + inside + found)
        self._place, self._held = "rest", after
        return bool(after)


def read_calls(text: str, tools: ToolFormat, names: frozenset[str] | None = None) -> list[Call]:
    """The calls of what stands between a format's marks; none if it is anything else.

    names: there are no marks: calls have arguments, and one of these names.
    """
    pieces = [text]
    if tools.many == "row":
        pieces = _row(text)
    calls: list[Call] = []
    for piece in pieces:
        try:
            found = msgspec.json.decode(piece.strip().encode(), type=list[_Written] | _Written)
        except (msgspec.MsgspecError, RecursionError, UnicodeError):
            return []
        for one in found if isinstance(found, list) else [found]:
            # Some models use the other family's word.
            arguments = bytes(one.arguments) or bytes(one.parameters)
            if names is not None and (one.name not in names or not arguments):
                return []
            calls.append(Call(one.name, arguments.decode() or "{}"))
    return calls


class _Written(msgspec.Struct):
    """A call as models write one. Arguments stay the text that they are."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw()
    parameters: msgspec.Raw = msgspec.Raw()


def _row(text: str) -> list[str]:
    """JSON objects one after the other, with ";", commas or blanks between."""
    pieces, depth, begin, in_string, is_escape = [], 0, 0, False, False
    for i, character in enumerate(text):
        if in_string:
            in_string = is_escape or character != '"'
            is_escape = character == "\\" and not is_escape
        elif character == '"':
            in_string = True
        elif character == "{":
            begin = i if depth == 0 else begin
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                pieces.append(text[begin : i + 1])
        elif depth == 0 and character not in "; ,\n\t":
            return [text]  # no row of calls
    return pieces or [text]


def _overlap(text: str, mark: str) -> int:
    """How many of the text's last characters may be the beginning of the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if mark.startswith(text[-n:])), 0)
