"""Grammars that responses follow: which tokens may come next, by the library llguidance.

A mask follows from the grammar and the tokens generated so far, so that a response under a grammar is as much a
function of its request as any other. Grammars travel as the library's own text. What they may cost has LIMITS.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orcaserve.core.request import NewRequest
from orcaserve.model.config import read_generation

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

    Calls may come from several threads. Make it before there are others that wait: the library reads the tokenizer with
    Python's lock held, half a second for 150 000 tokens.
    """

    def __init__(self, folder: Path, vocab_size: int, end_token_id: int) -> None:
        """vocab_size: of the logits. end_token_id: one of the tokens that end a response.

        Raises GrammarError if there is no tokenizer, or none that the library knows the tokens' bytes of.
        """
        import llguidance

        self._limits = llguidance.LLParserLimits(**LIMITS)
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            self._tokenizer = llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=end_token_id)
        except (OSError, ValueError) as error:
            raise GrammarError(
                f"this model's tokenizer is none that grammars work with ({_line(str(error))})"
            ) from None
        self._make = llguidance.LLMatcher
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def known(self, grammar: str) -> Any | None:
        """What `compile` gives, if it was compiled lately."""
        return self._compiled.get(grammar)

    def compile(self, grammar: str) -> Any:
        """A matcher at the beginning of a response, of which each response takes a copy. Raises GrammarError.

        Others run meanwhile: the library works without Python's lock.
        """
        found = self._compiled.get(grammar)
        if found is None:
            found = self._new(grammar)
            first = found.deep_copy()  # copies share an automaton, whose beginning may take as long as the rest
            if not first.is_error():
                first.compute_bitmask()
            if first.is_error():
                raise GrammarError(_line(first.get_error()))
            self._compiled[grammar] = found
            if len(self._compiled) > MOST_CACHED:
                self._compiled.popitem(last=False)
        return found

    def anew(self, grammar: str) -> Any:
        """The same for one response alone. What others share of this grammar is forgotten: it has come to a limit."""
        self._compiled.pop(grammar, None)
        return self._new(grammar)

    def _new(self, grammar: str) -> Any:
        return self._make(self._tokenizer, grammar, log_level=0, limits=self._limits)


class Guide:
    """One response's place in its grammar. Owner of a matcher. num_consumed: generated tokens that it has seen.

    is_alone: nobody else's matcher shares its automaton.
    """

    def __init__(self, compiled: Any, end_token_ids: Sequence[int], vocab_size: int, *, is_alone: bool = False) -> None:
        """compiled: by a Compiler."""
        self.is_alone = is_alone
        self._matcher = compiled.deep_copy()
        self._ends = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        for id in end_token_ids:
            if id < vocab_size:
                self._ends[id // 32] |= np.uint32(1 << id % 32)
        self._bits = np.empty_like(self._ends)
        self._address = self._bits.ctypes.data
        self.num_consumed = 0

    def allowed(self, new: Sequence[int]) -> np.ndarray:
        """Which tokens may follow these, which come behind those that it has seen, as in `Allowed`.

        That stands until it is asked again. Raises GrammarError.
        """
        matcher = self._matcher
        self.num_consumed += len(new)
        if new and not matcher.consume_tokens(new):
            raise GrammarError(_line(matcher.get_error()))
        if matcher.is_stopped() and not matcher.is_error():
            return self._ends
        bits = self._bits
        matcher.unsafe_compute_mask_ptr(self._address, 4 * len(bits))
        if matcher.is_error():
            raise GrammarError(_line(matcher.get_error()))
        if matcher.is_accepting():
            bits |= self._ends
        return bits


# uint32 [ceil(V / 32)], a bit for each token, the first one's the lowest, set if it may come next; or why nobody knows.
Allowed = np.ndarray | GrammarError


class Follows(Protocol):
    """A request whose response follows a grammar, as a worker knows it."""

    @property
    def id(self) -> int: ...
    @property
    def grammar(self) -> str: ...
    @property
    def end_token_ids(self) -> Sequence[int]: ...
    def generated(self, start: int) -> Sequence[int]:
        """Its tokens but for the first so many."""
        ...

    guide: Guide | None
    allowed: Allowed | None


class Grammars:
    """Finds out what may come next. Owner of a compiler, and of what requests have prepared.

    It looks in the thread that calls: some ten microseconds for a response, which is less than to hand work to another
    thread and to wait for it, where all cores compute the model. A GPU computes meanwhile, and so do stages before.
    What is prepared is compiled in a thread of its own, one grammar at a time.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._compiler: Compiler | None = None  # where config.json names no end token, the first request does
        if ends := read_generation(folder).eos_token_ids:
            with suppress(GrammarError):  # each request is told
                self._compiler = Compiler(folder, vocab_size, ends[0])
        self._making = threading.Lock()  # of the compiler
        self._prepared: dict[int, Future[Any]] = {}
        self._thread = ThreadPoolExecutor(1, "grammars")

    @property
    def num_prepared(self) -> int:
        """Requests whose grammars are kept."""
        return len(self._prepared)

    def prepare(self, request: NewRequest, ready: Callable[[], None]) -> None:
        grammar = request.params.grammar or ""
        known = None if self._compiler is None else self._compiler.known(grammar)
        if known is None:
            future = self._thread.submit(self._compile, grammar, request.end_token_ids)
        else:  # it need not wait for those that are not
            future = Future()
            future.set_result(known)
        self._prepared[request.id] = future
        future.add_done_callback(lambda _: ready())

    def release(self, id: int) -> None:
        if (future := self._prepared.pop(id, None)) is not None:
            future.cancel()

    def look(self, requests: Iterable[Follows]) -> None:
        """Tells each what is allowed next."""
        for request in requests:
            try:
                request.allowed = self._allowed(request)
            except GrammarError as error:
                request.allowed = error

    def _allowed(self, request: Follows) -> np.ndarray:
        if request.guide is None:
            if (prepared := self._prepared.get(request.id)) is not None:
                compiled = prepared.result()
            else:
                compiled = self._compile(request.grammar, request.end_token_ids)
            request.guide = Guide(compiled, request.end_token_ids, self._vocab_size)
        try:
            return request.guide.allowed(request.generated(request.guide.num_consumed))
        except GrammarError:
            if request.guide.is_alone:
                raise
        # Copies share an automaton, with its limits and its errors: whether this response fails is its own affair.
        compiled = self._compiler_for(request.end_token_ids).anew(request.grammar)
        request.guide = Guide(compiled, request.end_token_ids, self._vocab_size, is_alone=True)
        allowed = request.guide.allowed(())
        for token in request.generated(0):
            allowed = request.guide.allowed((token,))
        return allowed

    def _compile(self, grammar: str, end_token_ids: Sequence[int]) -> Any:
        return self._compiler_for(end_token_ids).compile(grammar)

    def _compiler_for(self, end_token_ids: Sequence[int]) -> Compiler:
        with self._making:
            if self._compiler is None:
                self._compiler = Compiler(self._folder, self._vocab_size, end_token_ids[0])
            return self._compiler


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
