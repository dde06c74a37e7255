"""`Pool`: the request pool in the frontend, source of truth of every request; engines come and go behind it.

For every unfinished choice it keeps what is needed to go on: prompt, drawn seed, and all tokens so far. When an engine
dies, the unfinished choices are handed to the next one with what they have, and their streams go on with no lost and
no repeated token. Runs in one event loop, and everything here is called from it.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.core.request import FinishReason, NewRequest, Output, SamplingParams, TokenLogprobs
from orcaserve.engine.messages import Abort, Stats, Step, Submit
from orcaserve.serve.frames import Beat
from orcaserve.serve.supervisor import Supervisor

LONE_CRASHES = 2  # a single one may have been somebody's kill -9
RETRY_SECONDS = (1.0, 120.0)

CRASHED = "this request makes the engine crash"
OTHER_PROFILE = "the engine came back with another numerics profile, so this response cannot go on"
FAILED = "the engine failed and could not be started again"
CLOSED = "the server is shutting down"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may wait for its first iteration, in choices and in their prompt tokens.

    Past either a request is refused, unless nothing waits at all.
    """

    max_queue_requests: int = 1024
    max_queue_tokens: int = 1 << 20


class Unavailable(Exception):
    """No request is taken now. reason: "loading", "draining" or "failed". retry_after: seconds; None: never."""

    def __init__(self, reason: str, retry_after: float | None) -> None:
        super().__init__(f"the server does not take requests: {reason}")
        self.reason = reason
        self.retry_after = retry_after


class QueueFull(Exception):
    """Too much is waiting. retry_after: seconds until the backlog should have been worked off."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("too many requests are waiting")
        self.retry_after = retry_after


class ContextLengthError(ValueError):
    """The request cannot fit. num_prompt, max_tokens: what it asks for; max_model_len: what there is, in tokens."""

    def __init__(self, num_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
        wish = "at least one output token" if max_tokens is None else f"max_tokens {max_tokens}"
        super().__init__(
            f"a prompt of {num_prompt} tokens and {wish} exceed the context length of {max_model_len} tokens"
        )
        self.num_prompt = num_prompt
        self.max_tokens = max_tokens
        self.max_model_len = max_model_len


class EngineFailed(Exception):
    """There is no engine and will be none; the message is one clear line for the operator."""


class Update(msgspec.Struct, frozen=True, kw_only=True):
    """What one choice gained since its last update.

    num_cached: prompt tokens that the prefix cache spared; 0 after the choice's first update.
    queue_seconds: from its arrival to its first iteration; None after the choice's first update.
    prompt_logprobs: all at once, of the prompt positions 1 … num_prompt-1.
    finish_reason: set in the choice's last update. error: why it is "error", in words fit for a client.
    """

    choice: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached: int = 0
    queue_seconds: float | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    def then(self, later: Update) -> Update:
        """Both in one, for a consumer that is slower than the engine."""
        return Update(
            choice=self.choice,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            prompt_logprobs=self.prompt_logprobs + later.prompt_logprobs,
            num_cached=self.num_cached + later.num_cached,
            queue_seconds=later.queue_seconds if self.queue_seconds is None else self.queue_seconds,
            finish_reason=later.finish_reason,
            error=later.error,
        )


class _Choice:
    """One choice on its way: the resume record, and what the pool knows of its luck. Owned by the Pool."""

    __slots__ = (
        "arrival",
        "arrived",
        "crashes",
        "engine_id",
        "generated",
        "has_prompt_logprobs",
        "is_waiting",
        "lone_crashes",
        "queue_seconds",
        "request",
        "stream",
    )

    def __init__(self, arrival: int, request: NewRequest) -> None:
        self.arrival = arrival
        self.arrived = time.monotonic()
        self.queue_seconds: float | None = None  # known from its first iteration until its stream has been told
        self.request = request  # as it arrived; its id means nothing
        self.stream: weakref.ref[Stream] | None = None
        self.generated: list[int] = []
        self.has_prompt_logprobs = False
        self.engine_id: int | None = None  # None while the engine does not have it
        self.is_waiting = True  # for its first iteration; a resubmission does not wait in this sense
        self.crashes = 0  # in a row with it on board, without any progress of its own
        self.lone_crashes = 0  # those of them with nobody else on board

    def submission(self, id: int) -> NewRequest:
        """The request as an engine needs it now."""
        request = self.request
        params = request.params
        if self.has_prompt_logprobs:
            params = msgspec.structs.replace(params, prompt_logprobs=None)
        token_ids = (*request.token_ids, *self.generated)
        return msgspec.structs.replace(request, id=id, token_ids=token_ids, params=params)


class Stream:
    """The updates of one request's choices, as they come. For one consumer.

    Slow consumers get fewer, larger updates; what is buffered is bounded by the request's own max_tokens. Leaving early
    aborts what is unfinished: `aclose`, the end of `async with`, a cancelled wait, or dropping the stream.
    """

    def __init__(self, pool: Pool, choices: list[_Choice]) -> None:
        self._pool = pool
        self._open = {choice.request.choice: choice for choice in choices}
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
        return self._buffered.pop(next(iter(self._buffered)))

    def abort(self, choice: int | None = None) -> None:
        """Ends a choice, or all of them; no further update of it follows. Ended and unknown ones are ignored."""
        for index in list(self._open) if choice is None else [choice]:
            if index in self._open:
                self._pool._abort(self._open.pop(index))
        for index in list(self._buffered) if choice is None else [choice]:
            self._buffered.pop(index, None)
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
        for choice in self._open.values():
            self._pool._abort(choice)

    def _push(self, update: Update) -> None:
        if update.choice not in self._open:
            return
        before = self._buffered.get(update.choice)
        self._buffered[update.choice] = update if before is None else before.then(update)
        if update.finish_reason is not None:
            del self._open[update.choice]
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Pool:
    """Owner of all unfinished choices, and of the supervisor that keeps an engine behind them.

    command: argv of the engine process, to which two file descriptors are appended; None: ours.
    on_progress: told (stage, done, total) while an engine loads. on_step: told every iteration's Step, for metrics.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        limits: Limits | None = None,
        command: Sequence[str] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.info: EngineInfo | None = None
        self.stats = Stats()
        self.failure: str | None = None  # the line for the operator, once the state is "failed"
        self._on_progress = on_progress
        self._on_step = on_step
        self._supervisor = Supervisor(options, self, command)
        self._is_draining = False
        self._changed = asyncio.Event()  # set and replaced at every change that ready() or drain() waits for
        self._live: dict[int, _Choice] = {}  # by arrival, hence in order of arrival
        self._submitted: dict[int, _Choice] = {}  # by engine id: those that the engine has
        self._suspects: list[_Choice] = []  # after a crash; the first is on trial, and who is not submitted is held
        self._arrivals = itertools.count()
        self._engine_ids = itertools.count(1)
        self._tokens_per_second: float | None = None
        self.num_waiting = 0  # choices that wait for their first iteration, and their prompt tokens
        self.num_waiting_tokens = 0

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "loading", "ready", "restarting" (requests are still taken), "draining" or "failed" (both for good)."""
        if self._is_draining and self._supervisor.state != "failed":
            return "draining"
        return self._supervisor.state

    @property
    def engine_pid(self) -> int | None:
        return self._supervisor.pid

    @property
    def step_age(self) -> float:
        """Health: seconds since an iteration ended, while the engine has work; else 0."""
        return self._supervisor.step_age

    @property
    def num_restarts(self) -> int:
        """Engines that got ready after the first one."""
        return max(0, self._supervisor.num_starts - 1)

    @property
    def num_unfinished(self) -> int:
        """Choices that have arrived and not ended."""
        return len(self._live)

    async def start(self) -> None:
        """Begins to load an engine; `ready` waits for it."""
        self._supervisor.start()

    async def ready(self) -> EngineInfo:
        """Waits for an engine. Raises EngineFailed if there will be none."""
        while self._supervisor.state != "ready" or self.info is None:
            if self.failure is not None:
                raise EngineFailed(self.failure)
            await self._changed.wait()
        return self.info

    async def drain(self, timeout: float | None) -> bool:
        """Takes no more requests, lets what runs end for at most `timeout` seconds, then closes. True if all ended."""
        self._is_draining = True
        try:
            async with asyncio.timeout(timeout):
                while self._live:
                    await self._changed.wait()
        except TimeoutError:
            pass
        has_ended = not self._live
        await self.close()
        return has_ended

    async def close(self) -> None:
        """Ends everything now: streams that still run get an error, the engine process is gone at the return."""
        self._is_draining = True
        try:
            await self._supervisor.stop()
        finally:
            self._end_all(CLOSED)
            self._has_changed()

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        end_token_ids: Sequence[int] = (),
        cache_salt: str = "",
    ) -> Stream:
        """Takes a request in. `params.n` choices share the prompt and the seed, which is drawn here if none is given.

        end_token_ids: all tokens that end a choice: the model's unless ignored, and the stop tokens.
        Raises Unavailable, ContextLengthError, QueueFull; ValueError for an empty prompt.
        """
        info = self._available()
        num_prompt = len(prompt_ids)
        if num_prompt == 0:
            raise ValueError("an empty prompt: there is nothing to go on from")
        max_tokens = info.max_model_len - num_prompt if params.max_tokens is None else params.max_tokens
        if num_prompt + max_tokens > info.max_model_len or (params.max_tokens is None and max_tokens < 1):
            raise ContextLengthError(num_prompt, params.max_tokens, info.max_model_len)
        self._check_room(params.n, params.n * num_prompt)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        choices = [
            _Choice(
                next(self._arrivals),
                NewRequest(
                    id=0,
                    token_ids=tuple(prompt_ids),
                    num_prompt=num_prompt,
                    max_tokens=max_tokens,
                    params=params,
                    seed=seed,
                    choice=index,
                    end_token_ids=tuple(end_token_ids),
                    cache_salt=cache_salt,
                ),
            )
            for index in range(params.n)
        ]
        stream = Stream(self, choices)
        for choice in choices:
            choice.stream = weakref.ref(stream)
            self._live[choice.arrival] = choice
            self.num_waiting += 1
            self.num_waiting_tokens += num_prompt
            if self._supervisor.state == "ready" and not self._suspects:
                self._hand_in(choice)
        return stream

    def _available(self) -> EngineInfo:
        if self.state == "failed":
            raise Unavailable("failed", None)
        if self.state == "draining":
            raise Unavailable("draining", RETRY_SECONDS[0])
        if self.info is None:
            raise Unavailable("loading", 2 * RETRY_SECONDS[0])
        return self.info

    def _check_room(self, num_choices: int, num_tokens: int) -> None:
        if self.num_waiting == 0:
            return
        requests, tokens = self.num_waiting + num_choices, self.num_waiting_tokens + num_tokens
        if requests > self.limits.max_queue_requests or tokens > self.limits.max_queue_tokens:
            least, most = RETRY_SECONDS
            rate = self._tokens_per_second or most
            raise QueueFull(min(most, max(least, self.num_waiting_tokens / rate)))

    def _hand_in(self, choice: _Choice) -> None:
        choice.engine_id = next(self._engine_ids)
        self._submitted[choice.engine_id] = choice
        self._supervisor.send(Submit(choice.submission(choice.engine_id)))

    def _abort(self, choice: _Choice) -> None:
        if choice.arrival in self._live:
            if choice.engine_id is not None:
                self._supervisor.send(Abort(choice.engine_id))
            self._forget(choice)

    def _push(self, choice: _Choice, update: Update) -> None:
        stream = choice.stream() if choice.stream is not None else None
        if stream is not None:
            stream._push(update)

    def _end(self, choice: _Choice, error: str) -> None:
        self._push(choice, Update(choice=choice.request.choice, finish_reason="error", error=error))
        self._abort(choice)

    def _end_all(self, error: str) -> None:
        self._suspects.clear()
        for choice in list(self._live.values()):
            self._end(choice, error)

    def _forget(self, choice: _Choice) -> None:
        del self._live[choice.arrival]
        if choice.engine_id is not None:
            del self._submitted[choice.engine_id]
        self._has_started(choice)
        self._clear(choice)
        if not self._live:
            self._has_changed()

    def _has_started(self, choice: _Choice) -> None:
        if choice.is_waiting:
            choice.is_waiting = False
            self.num_waiting -= 1
            self.num_waiting_tokens -= choice.request.num_prompt

    def _has_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- after a crash -------------------------------------------------------------------------------------------

    def _clear(self, choice: _Choice) -> None:
        """A suspect got through its trial, or is gone: the next one joins."""
        if choice in self._suspects:
            self._suspects.remove(choice)
            self._resume()

    def _resume(self) -> None:
        """Hands in the suspect whose turn it is; when there is none left, everyone who is held, in order of arrival."""
        if self._supervisor.state != "ready":
            return
        for choice in self._suspects[:1] or list(self._live.values()):
            if choice.engine_id is None:
                self._hand_in(choice)

    def _blame(self, in_flight: tuple[int, ...]) -> bool:
        """Finds the suspects of a crash. True if one of them has been convicted, and ended.

        They run one by one, each joined by the next after its first output. Who has crashed most often without getting
        anywhere goes first, so that he is alone soon.
        """
        recorded = set(in_flight)
        on_board = [choice for id, choice in self._submitted.items() if id in recorded]
        suspects = on_board or list(self._submitted.values())  # nobody ran: then it was somebody's arrival
        for choice in self._submitted.values():
            choice.engine_id = None
        self._submitted.clear()
        for choice in suspects:
            choice.crashes += 1
        if len(suspects) == 1:
            suspects[0].lone_crashes += 1
        everyone = {choice.arrival: choice for choice in (*self._suspects, *suspects)}
        self._suspects = sorted(everyone.values(), key=lambda choice: (-choice.crashes, choice.arrival))
        convicts = [choice for choice in suspects if choice.lone_crashes == LONE_CRASHES]
        for choice in convicts:
            self._end(choice, CRASHED)
        return bool(convicts)

    # -- what the supervisor tells -------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        return bool(self._submitted)

    def on_loading(self, stage: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(stage, done, total)

    def on_ready(self, info: EngineInfo) -> None:
        if self.info is not None and self.info.profile != info.profile:
            for choice in list(self._live.values()):
                if choice.generated or choice.has_prompt_logprobs:
                    self._end(choice, OTHER_PROFILE)
        self.info = info
        self._resume()
        self._has_changed()

    def on_beat(self, beat: Beat) -> None:
        if beat.stats is not None:
            self.stats = beat.stats

    def on_step(self, step: Step) -> None:
        self.stats = step.stats
        if step.seconds > 0 and step.num_tokens > 0:
            latest, known = step.num_tokens / step.seconds, self._tokens_per_second
            self._tokens_per_second = latest if known is None else known + 0.05 * (latest - known)
        for id in step.started:
            if id in self._submitted:
                choice = self._submitted[id]
                if choice.is_waiting:
                    choice.queue_seconds = max(0.0, time.monotonic() - choice.arrived - step.seconds)
                self._has_started(choice)
        for output in step.outputs:
            if output.id in self._submitted:  # else it was aborted, or comes from an engine that is gone
                self._deliver(self._submitted[output.id], output)
        if self._on_step is not None:
            self._on_step(step)

    def _deliver(self, choice: _Choice, output: Output) -> None:
        self._push(
            choice,
            Update(
                choice=choice.request.choice,
                token_ids=output.token_ids,
                logprobs=output.logprobs,
                prompt_logprobs=output.prompt_logprobs,
                num_cached=0 if choice.generated else output.num_cached,  # later, it is about a resubmission
                queue_seconds=choice.queue_seconds,
                finish_reason=output.finish_reason,
                error=output.error,
            ),
        )
        choice.queue_seconds = None
        choice.generated += output.token_ids
        choice.has_prompt_logprobs = choice.has_prompt_logprobs or bool(output.prompt_logprobs)
        choice.crashes = choice.lone_crashes = 0
        if output.finish_reason is not None:
            self._forget(choice)
        else:
            self._clear(choice)

    def on_death(self, reason: str, in_flight: tuple[int, ...]) -> bool:
        self.stats = Stats()
        return self._blame(in_flight)

    def on_failed(self, message: str) -> None:
        self.failure = message
        self._end_all(FAILED)
        self._has_changed()
