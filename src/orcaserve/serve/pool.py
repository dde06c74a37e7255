"""`Pool`: the request pool in the frontend, source of truth of every request; engines come and go behind it.

For every unfinished choice it keeps what is needed to go on: prompt, drawn seed, and all tokens so far. When an engine
dies, its unfinished choices are handed to another one, or to the next one, with what they have, and their streams go on
with no lost and no repeated token. Runs in one event loop, and everything here is called from it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
import weakref
from collections.abc import Callable, Sequence

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.core.request import NewRequest, Output, SamplingParams
from orcaserve.core.router import ROUTERS
from orcaserve.engine.messages import Stats, Step
from orcaserve.serve.replica import Replica
from orcaserve.serve.replicas import Replicas, shares
from orcaserve.serve.resume import Choice
from orcaserve.serve.stream import Stream, Update
from orcaserve.serve.supervisor import Death
from orcaserve.serve.suspects import Suspects

log = logging.getLogger(__name__)

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


class Replication(msgspec.Struct, frozen=True, kw_only=True):
    """How many engines there are, and by what a request is given to one of them: a key of `ROUTERS`.

    commands: argv of what stands in for each one's process, if they run on other hosts. None: they share this one.
    """

    replicas: int = 1
    router: str = "prefix"
    commands: tuple[tuple[str, ...], ...] | None = None


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


class Pool:
    """Owner of all unfinished choices, and of the replicas that keep an engine each behind them.

    options: of every engine; the replicas share threads and memory evenly.
    command: argv of the engine process, to which two file descriptors are appended; None: ours.
    on_progress: told (stage, done, total) while an engine loads. on_step: told every iteration's Step, for metrics.
    """

    def __init__(
        self,
        options: EngineOptions,
        *,
        replication: Replication | None = None,
        limits: Limits | None = None,
        command: Sequence[str] | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        wished = replication or Replication()
        self.limits = limits or Limits()
        self.failure: str | None = None  # the line for the operator, once the state is "failed"
        self._on_progress = on_progress
        self._on_step = on_step
        if wished.commands is not None:
            self.replicas = Replicas([options] * wished.replicas, self, wished.commands)
        else:
            self.replicas = Replicas(shares(options, wished.replicas), self, [command] * wished.replicas)
        # There is nothing to know about prompts where there is nothing to choose.
        self._router = ROUTERS[wished.router if wished.replicas > 1 else "round-robin"](options.block_size)
        self._is_draining = False
        self._changed = asyncio.Event()  # set and replaced at every change that ready() or drain() waits for
        self._live: dict[int, Choice] = {}  # by arrival, hence in order of arrival
        self._suspects = Suspects()  # after a crash; the first is on trial, and who is not submitted is held
        self._arrivals = itertools.count()
        self._engine_ids = itertools.count(1)
        self.num_waiting = 0  # choices that wait for their first iteration, and their prompt tokens
        self.num_waiting_tokens = 0

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """ "loading", "ready", "restarting" (requests are still taken), "draining" or "failed" (both for good).

        Ready as soon as one replica is.
        """
        state = self.replicas.state
        return "draining" if self._is_draining and state != "failed" else state

    @property
    def info(self) -> EngineInfo | None:
        """What the engines can do; None before the first one is ready."""
        return self.replicas.info

    @property
    def engine_pid(self) -> int | None:
        """Of the first replica's engine."""
        return self.replicas[0].pid

    @property
    def step_age(self) -> float:
        """Health: seconds since an iteration ended, while the engines have work; else 0. The best replica's."""
        return self.replicas.step_age

    @property
    def stats(self) -> Stats:
        """Of all replicas together. Counters never go down."""
        return self.replicas.stats

    @property
    def num_restarts(self) -> int:
        """Engines that got ready after each replica's first one."""
        return sum(replica.num_restarts for replica in self.replicas)

    @property
    def num_unfinished(self) -> int:
        """Choices that have arrived and not ended."""
        return len(self._live)

    async def start(self) -> None:
        """Begins to load the engines; `ready` waits for one."""
        for replica in self.replicas:
            replica.start()

    async def ready(self) -> EngineInfo:
        """Waits for an engine. Raises EngineFailed if there will be none."""
        while self.replicas.state != "ready" or self.info is None:
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
        """Ends everything now: streams that still run get an error, the engine processes are gone at the return."""
        self._is_draining = True
        try:
            await asyncio.gather(*(replica.stop() for replica in self.replicas))
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
        keys = self._router.keys(prompt_ids, cache_salt)
        choices = [
            Choice(
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
                keys,
            )
            for index in range(params.n)
        ]
        stream = Stream(range(params.n), lambda index: self._abort(choices[index]))
        for choice in choices:
            choice.stream = weakref.ref(stream)
            self._live[choice.arrival] = choice
            self.num_waiting += 1
            self.num_waiting_tokens += num_prompt
            self._hand_in(choice, self._open())
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
            rate = self.replicas.tokens_per_second or most
            raise QueueFull(min(most, max(least, self.num_waiting_tokens / rate)))

    def _abort(self, choice: Choice) -> None:
        if choice.arrival in self._live:
            self._forget(choice, has_ended=False)

    def _push(self, choice: Choice, update: Update) -> None:
        stream = choice.stream() if choice.stream is not None else None
        if stream is not None:
            stream.push(update)

    def _end(self, choice: Choice, error: str) -> None:
        self._push(choice, Update(choice=choice.request.choice, finish_reason="error", error=error))
        self._abort(choice)

    def _end_all(self, error: str) -> None:
        self._suspects.clear()
        for choice in list(self._live.values()):
            self._end(choice, error)

    def _forget(self, choice: Choice, *, has_ended: bool) -> None:
        """has_ended: so that its engine need not be told."""
        del self._live[choice.arrival]
        if choice.replica is not None:
            replica = self.replicas[choice.replica]
            if has_ended:
                replica.release(choice)
            else:
                replica.take_back(choice)
        self._has_started(choice)
        self._acquit(choice)
        if not self._live:
            self._has_changed()

    def _has_started(self, choice: Choice) -> None:
        if choice.is_waiting:
            choice.is_waiting = False
            self.num_waiting -= 1
            self.num_waiting_tokens -= choice.request.num_prompt

    def _has_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- who gets what -------------------------------------------------------------------------------------------

    def _open(self) -> list[Replica]:
        """The replicas that take whoever comes."""
        return [replica for replica in self.replicas.in_force if replica is not self._suspects.court]

    def _hand_in(self, choice: Choice, among: Sequence[Replica]) -> None:
        """To the replica that the router chooses. If there is none the choice is held."""
        if among:
            index = self._router.choose(choice.keys, {replica.index: replica.load for replica in among})
            self._router.sent(choice.keys, index)
            self.replicas[index].submit(choice, next(self._engine_ids))

    def _resume(self) -> None:
        """Hands in the suspect whose turn it is, and everyone else who is held, in order of arrival."""
        self._try_suspect()
        if among := self._open():
            for choice in list(self._live.values()):
                if choice.engine_id is None and choice not in self._suspects:
                    self._hand_in(choice, among)

    def _try_suspect(self) -> None:
        if (turn := self._suspects.turn(self.replicas)) is not None:
            suspect, court = turn
            self._hand_in(suspect, [court])

    def _acquit(self, choice: Choice) -> None:
        """A choice has got somewhere, or is gone: if it was a suspect, the next one joins."""
        if choice in self._suspects:
            court = self._suspects.court
            self._suspects.acquit(choice)
            self._resume()
            if court is not None and self._suspects.court is None:
                self._relieve(court)
        else:
            self._try_suspect()  # the court may have become free

    def _relieve(self, replica: Replica) -> None:
        """Gives a replica that has just been opened its part of what waits elsewhere, the youngest first."""
        for busy in sorted(self._open(), key=lambda other: -other.load):
            for choice in reversed(list(busy.unstarted.values())):
                if busy.load <= replica.load + 1:
                    break
                busy.take_back(choice)
                self._hand_in(choice, [replica])

    # -- what the replicas tell ----------------------------------------------------------------------------------

    def on_loading(self, replica: Replica, stage: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            name = stage if len(self.replicas) == 1 else f"{stage} of replica {replica.index}"
            self._on_progress(name, done, total)

    def on_ready(self, replica: Replica) -> None:
        info = replica.info
        if info is None:
            return
        self._router.begin(replica.index, info.num_blocks)
        if self.info is not None and self.info.profile != info.profile:
            if self.replicas.in_force:
                log.warning("replica %d has another numerics profile (%s): it is not used", replica.index, info.profile)
                return
            for choice in list(self._live.values()):
                if choice.has_begun:
                    self._end(choice, OTHER_PROFILE)
        self.replicas.adopt(info)
        self._resume()
        if replica is not self._suspects.court:
            self._relieve(replica)
        self._has_changed()

    def on_step(self, replica: Replica, step: Step) -> None:
        for id in step.started:
            if id in replica.submitted:
                choice = replica.submitted[id]
                if choice.is_waiting:
                    choice.queue_seconds = max(0.0, time.monotonic() - choice.arrived - step.seconds)
                self._has_started(choice)
        for output in step.outputs:
            if output.id in replica.submitted:  # else it was aborted, or comes from an engine that is gone
                self._deliver(replica.submitted[output.id], output)
        if self._on_step is not None:
            self._on_step(step)

    def _deliver(self, choice: Choice, output: Output) -> None:
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
            self._forget(choice, has_ended=True)
        else:
            self._acquit(choice)

    def on_death(self, replica: Replica, death: Death) -> bool:
        """Finds the suspects, and has everyone else go on elsewhere. True if a suspect has been convicted, and ended.

        A kill from outside is no evidence, unless it is the second one without progress in between: where there is
        another replica, its victims go on there at once, among others.
        """
        had = dict(replica.submitted)
        recorded = set(death.in_flight)
        on_board = [choice for id, choice in had.items() if id in recorded]
        for choice in had.values():
            replica.release(choice)
        self._suspects.leave(replica)
        is_excusable = death.from_outside and bool(self.replicas.in_force)
        # If nobody ran, then it was somebody's arrival.
        convicts = self._suspects.blame(on_board or list(had.values()), is_excusable)
        for choice in convicts:
            self._end(choice, CRASHED)
        self._resume()
        return bool(convicts)

    def on_failed(self, replica: Replica, message: str) -> None:
        for choice in list(replica.submitted.values()):
            replica.release(choice)
        if self.replicas.state == "failed":
            self.failure = message
            self._end_all(FAILED)
        else:
            log.error("replica %d is given up: %s", replica.index, message)
            left = [other for other in self.replicas if other.state == "ready"]
            if left and not self.replicas.in_force and not self.replicas.is_any_coming:
                self.on_ready(left[0])  # its profile, which is another one, is all that is left
            self._resume()
        self._has_changed()
