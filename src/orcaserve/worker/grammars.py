"""Grammars that responses follow: which tokens may come next, by the library llguidance.

A mask follows from the grammar and the tokens generated so far, so that a response under a grammar is as much a
function of its request as any other. Grammars travel as the library's own text. What they may cost has LIMITS.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

NOT_FOLLOWED = "the grammar cannot be followed"  # how the error of a response begins whose grammar proves too hard
MOST_CACHED = 64  # compiled grammars that are kept
# Some ten milliseconds for a grammar at first, and a few for a token, by the library's own figures.
LIMITS = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}


class GrammarError(ValueError):
    """A grammar that cannot be followed; the message is one clear line."""


class Compiler:
    """Compiles grammars over one vocabulary. Owner of the vocabulary's trie, and of what was compiled lately.

    Calls may come from several threads; making it takes as long as reading the tokenizer.
    """

    def __init__(self, folder: Path, vocab_size: int, end_token_id: int) -> None:
        """vocab_size: of the logits. end_token_id: one of the tokens that end a response."""
        import llguidance

        self._limits = llguidance.LLParserLimits(**LIMITS)
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=end_token_id)
        self._make = llguidance.LLMatcher
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def compile(self, grammar: str) -> Any:
        """A matcher at the beginning of a response. Raises GrammarError."""
        found = self._compiled.get(grammar)
        if found is None:
            found = self._make(self._tokenizer, grammar, log_level=0, limits=self._limits)
            if found.is_error():
                raise GrammarError(_line(found.get_error()))
            self._compiled[grammar] = found
            if len(self._compiled) > MOST_CACHED:
                self._compiled.popitem(last=False)
        return found.deep_copy()


class Guide:
    """One response's place in its grammar. Owner of a matcher."""

    def __init__(self, matcher: Any, end_token_ids: Sequence[int], vocab_size: int) -> None:
        self._matcher = matcher
        self._ends = np.array(sorted({id for id in end_token_ids if id < vocab_size}), dtype=np.int64)
        self._vocab_size = vocab_size
        self._num_consumed = 0

    def allowed(self, generated: Sequence[int]) -> np.ndarray:
        """bool [V]: tokens that may follow these, of which it has seen a beginning. Raises GrammarError."""
        matcher = self._matcher
        new = list(generated[self._num_consumed :])
        self._num_consumed = len(generated)
        if new and not matcher.consume_tokens(new):
            raise GrammarError(_line(matcher.get_error()))
        if matcher.is_stopped() and not matcher.is_error():
            allowed = np.zeros(self._vocab_size, dtype=bool)
            allowed[self._ends] = True
            return allowed
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if matcher.is_error():
            raise GrammarError(_line(matcher.get_error()))
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(bool)
        if matcher.is_accepting():
            allowed[self._ends] = True
        return allowed


class Follows(Protocol):
    """A request whose response follows a grammar, as a worker knows it."""

    @property
    def grammar(self) -> str: ...
    @property
    def end_token_ids(self) -> Sequence[int]: ...
    @property
    def generated(self) -> Sequence[int]: ...

    guide: Guide | None
    allowed: Future[np.ndarray] | None


class Grammars:
    """Finds out what may come next while the device computes. Owner of a thread and, once it is needed, a compiler."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._compiler: Compiler | None = None
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, requests: Iterable[Follows]) -> None:
        """Begins to work for them: each gets a future, which gives bool [V] or raises GrammarError."""
        for request in requests:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "grammars")
            request.allowed = self._thread.submit(self._allowed, request)

    def _allowed(self, request: Follows) -> np.ndarray:
        if request.guide is None:
            if self._compiler is None:
                self._compiler = Compiler(self._folder, self._vocab_size, request.end_token_ids[0])
            matcher = self._compiler.compile(request.grammar)
            request.guide = Guide(matcher, request.end_token_ids, self._vocab_size)
        return request.guide.allowed(request.generated)


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
