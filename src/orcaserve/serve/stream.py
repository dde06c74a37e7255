"""`Stream`: the `Update`s of one request's choices on their way from the pool to whoever asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, Self

import msgspec

from orcaserve.core.request import FinishReason, TokenLogprobs
from orcaserve.core.timing import Timing

CutOff = Literal["deadline_passed", "timeout", "cancelled", "draining", "failed", "other_profile"]

FULL_BYTES = 32 << 10  # of a stream's updates that nobody has taken: then it is better not to go on
LEAST_BYTES = 4 << 10  # of a choice of many: one that stops for every token gets nowhere
_TOKEN_BYTES, _ENTRY_BYTES, _TOP_BYTES = 40, 120, 140  # about what CPython takes for one of them


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice gained since its last update.

    num_cached: prompt tokens that the prefix cache spared; 0 after the choice's first update.
    queue_seconds: from its arrival to its first iteration; None after the choice's first update.
    prompt_logprobs: all at once, of the prompt positions 1 … num_prompt-1. pooled: the prompt as one vector, float32.
    finish_reason: set in the choice's last update. error: why it is "error", in words fit for a client.
    timing: where its time went so far; in its last update, unless it was ended without an engine, or in each, if timed.
    cut_off: it is an error that lies neither in the request nor in the model: a deadline passed before its first
        iteration ("deadline_passed"), or while it ran ("timeout"); an operator wished so ("cancelled"); the server is
        shutting down ("draining"); there is no engine any more ("failed"), or only one that computes other bits
        ("other_profile").
    """

    choice: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: bytes = b""
    num_cached: int = 0
    queue_seconds: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    timing: Timing | None = None
    cut_off: CutOff | None = None

    @property
    def num_bytes(self) -> int:
        """Of memory that it takes, about."""
        entries = (*self.logprobs, *self.prompt_logprobs)
        lists = sum(_ENTRY_BYTES + _TOP_BYTES * len(entry.top) for entry in entries)
        return _TOKEN_BYTES * len(self.token_ids) + lists + len(self.pooled)

    def then(self, later: Update) -> Update:
        """Both in one, for a consumer that is slower than the engine."""
        return Update(
            choice=self.choice,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            pooled=self.pooled or later.pooled,
            num_cached=self.num_cached + later.num_cached,
            queue_seconds=later.queue_seconds if self.queue_seconds is None else self.queue_seconds,
            finish_reason=later.finish_reason,
            error=later.error,
            timing=self.timing if later.timing is None else later.timing,
            cut_off=later.cut_off,
        )

    def apart(self) -> tuple[Update, ...]:
        """What came before an error, if something did, and the error by itself; any other update as it is."""
        if self.finish_reason not in ("error", "abort") or not (self.token_ids or self.prompt_logprobs):
            return (self,)
        replace = msgspec.structs.replace
        return (
            replace(self, finish_reason=None, error=None, cut_off=None),
            replace(self, token_ids=(), logprobs=(), prompt_logprobs=(), num_cached=0, queue_seconds=None),
        )


class Stream:
    """The updates of one request's choices, as they come. For one consumer.

    Slow consumers get fewer, larger updates. A choice of which its share of FULL_BYTES waits to be taken `is_full`:
    whoever pushes may stop until there is room. Leaving early aborts what is unfinished: `aclose`, the end of `async
    with`, a cancelled wait, or dropping the stream.
    """

    def __init__(
        self,
        choices: Iterable[int],
        on_abort: Callable[[int], None],
        on_room: Callable[[int], None] = lambda choice: None,
    ) -> None:
        """choices: their indexes. on_abort: told of each that is left before its end. on_room: of each that was full,
        when all of it has been taken."""
        self._on_abort = on_abort
        self._on_room = on_room
        self._sizes: dict[int, int] = {}  # bytes, of those whose consumer is late
        self._open = dict.fromkeys(choices)  # ordered, as a set is not
        self._full = max(LEAST_BYTES, FULL_BYTES // max(1, len(self._open)))
        self._buffered: dict[int, Update] = {}
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Update:
        if self._waiter is not None:
            raise RuntimeError("a stream has one consumer")
        while not self._buffered:
            if not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.abort()
                raise
            finally:
                self._waiter = None
        choice = next(iter(self._buffered))
        update = self._buffered.pop(choice)
        if self._sizes.pop(choice, 0) >= self._full:
            self._on_room(choice)
        return update

    def is_full(self, choice: int) -> bool:
        """Whether its consumer is so late that nothing should follow."""
        return self._sizes.get(choice, 0) >= self._full

    def abort(self, choice: int | None = None) -> None:
        """Ends a choice, or all of them; no further update of it follows. Ended and unknown ones are ignored."""
        for index in list(self._open) if choice is None else [choice]:
            if index in self._open:
                del self._open[index]
                self._on_abort(index)
        for index in list(self._buffered) if choice is None else [choice]:
            self._buffered.pop(index, None)
            self._sizes.pop(index, None)
        self._wake()

    async def aclose(self) -> None:
        self.abort()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        for index in self._open:
            self._on_abort(index)

    def push(self, update: Update) -> None:
        """The pool's news. Those about choices that have been left are dropped."""
        if update.choice not in self._open:
            return
        before = self._buffered.get(update.choice)
        if before is not None:  # a single update may be as large as it is: it is about to be taken
            self._sizes[update.choice] = self._sizes.get(update.choice, before.num_bytes) + update.num_bytes
            update = before.then(update)
        self._buffered[update.choice] = update
        if update.finish_reason is not None:
            del self._open[update.choice]
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
