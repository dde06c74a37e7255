"""`Pool`: the request pool in the frontend, source of truth of every request; engines come and go behind it.

For every unfinished choice it keeps what is needed to go on: prompt, drawn seed, and all tokens so far. When an engine
dies, its unfinished choices are handed to another one, or to the next one, with what they have, and their streams go on
with no lost and no repeated token. In the same way a choice is taken from its engine while its client does not read
what there is, so that slow clients take neither the engine's memory nor ours. Runs in one event loop, and everything
here is called from it.
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
from orcaserve.core.request import FinishReason, NewRequest, Output, SamplingParams
from orcaserve.core.router import ROUTERS
from orcaserve.engine.messages import Stats, Step
from orcaserve.serve.admission import RETRY_SECONDS, Admission, Claim, Limits
from orcaserve.serve.replica import Replica
from orcaserve.serve.replicas import Replicas, shares
from orcaserve.serve.resume import Choice
from orcaserve.serve.stream import Expired, Stream, Update
from orcaserve.serve.supervisor import Death
from orcaserve.serve.suspects import Suspects
from orcaserve.serve.terms import Terms
from orcaserve.serve.timeline import Timeline

log = logging.getLogger(__name__)

CRASHED = "this request makes the engine crash"
OTHER_PROFILE = "the engine came back with another numerics profile, so this response cannot go on"
FAILED = "the engine failed and could not be started again"
CLOSED = "the server is shutting down"
EXPIRED: dict[Expired, str] = {
    "deadline_passed": "the deadline passed before the request's first iteration",
    "timeout": "the request's time was up before its end",
    "cancelled": "the request was cancelled",
}


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
    timeline: keeps what happens, for those who look on; None: nobody does.
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
        timeline: Timeline | None = None,
    ) -> None:
        wished = replication or Replication()
        self.admission = Admission(limits or Limits(), options.max_batch_size, options.max_batch_tokens)
        self.failure: str | None = None  # the line for the operator, once the state is "failed"
        self._on_progress = on_progress
        self._on_step = on_step
        self._timeline = timeline
        self._is_watched = False
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

    @property
    def num_waiting(self) -> int:
        """Choices that wait for their first iteration."""
        return self.admission.waiting.requests

    @property
    def num_waiting_tokens(self) -> int:
        """Their prompt tokens."""
        return self.admission.waiting.tokens

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
        for choice in list(self._live.values()):  # what is late is buffered now: nobody else will need the memory
            self._go_on(choice)
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

    def check(self, claim: Claim) -> None:
        """Raises Unavailable or Refused if a request that asks for so much, or more, would not be taken in now."""
        self._available()
        self.admission.check(claim, time.monotonic())

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        end_token_ids: Sequence[int] = (),
        cache_salt: str = "",
        terms: Terms | None = None,
        name: str = "",
        timed: bool = False,
    ) -> Stream:
        """`submit_all` for a single prompt."""
        asked = [(prompt_ids, params)]
        [stream] = self.submit_all(asked, end_token_ids, cache_salt, terms or Terms(), name=name, timed=timed)
        return stream

    def submit_all(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        end_token_ids: Sequence[int],
        cache_salt: str,
        terms: Terms,
        *,
        name: str = "",
        timed: bool = False,
    ) -> list[Stream]:
        """Takes a request of one or more prompts in, all of it or nothing; one stream for each prompt.

        `params.n` choices share the prompt and the seed, which is drawn here if none is given.
        end_token_ids: all tokens that end a choice: the model's unless ignored, and the stop tokens.
        name: what the client knows the request by, for step logs. timed: every update says where the time went.
        Raises Unavailable, ContextLengthError, Refused; ValueError for an empty prompt.
        """
        info = self._available()
        resolved = [(ids, _resolved(len(ids), params, info.max_model_len)) for ids, params in prompts]
        self.admission.admit(terms, resolved, time.monotonic())
        return [self._begin(ids, params, end_token_ids, cache_salt, terms, name, timed) for ids, params in resolved]

    def _begin(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        end_token_ids: Sequence[int],
        cache_salt: str,
        terms: Terms,
        name: str,
        timed: bool,
    ) -> Stream:
        seed = secrets.randbits(63) if params.seed is None else params.seed
        salt = terms.salt(cache_salt)
        keys = self._router.keys(prompt_ids, salt)
        choices = [
            Choice(
                next(self._arrivals),
                NewRequest(
                    id=0,
                    token_ids=tuple(prompt_ids),
                    num_prompt=len(prompt_ids),
                    max_tokens=params.max_tokens or 0,
                    params=params,
                    seed=seed,
                    choice=index,
                    end_token_ids=tuple(end_token_ids),
                    cache_salt=salt,
                    tenant=terms.tenant,
                    priority=terms.priority,
                    name=name,
                    timed=timed,
                ),
                keys,
                terms,
            )
            for index in range(params.n)
        ]
        stream = Stream(
            range(params.n), lambda index: self._abort(choices[index]), lambda index: self._go_on(choices[index])
        )
        for choice in choices:
            choice.stream = weakref.ref(stream)
            self._live[choice.arrival] = choice
            self.admission.arrive(choice)
            if self._timeline is not None:
                self._timeline.arrived(choice)
            self._set_alarm(choice)
            self._hand_in(choice, self._open())
        return stream

    def cancel(self, arrival: int) -> bool:
        """Ends a choice with an error, as an operator wishes. False if there is none.

        arrival: its ordinal, which the timeline names.
        """
        choice = self._live.get(arrival)
        if choice is None:
            return False
        self._end(choice, EXPIRED["cancelled"], "cancelled")
        return True

    def watch(self, on: bool) -> None:
        """Whether engines are to say why requests wait, which they do for those who look on alone."""
        self._is_watched = on
        for replica in self.replicas:
            replica.watch(on)

    def _available(self) -> EngineInfo:
        if self.state == "failed":
            raise Unavailable("failed", None)
        if self.state == "draining":
            raise Unavailable("draining", RETRY_SECONDS[0])
        if self.info is None:
            raise Unavailable("loading", 2 * RETRY_SECONDS[0])
        return self.info

    def _set_alarm(self, choice: Choice) -> None:
        """For its first iteration, and then for its end."""
        by = choice.terms.start_by if choice.is_waiting else choice.terms.end_by
        if choice.alarm is not None:
            choice.alarm.cancel()
            choice.alarm = None
        if by is not None:
            loop = asyncio.get_running_loop()
            choice.alarm = loop.call_later(by - time.monotonic(), self._expire, choice)

    def _expire(self, choice: Choice) -> None:
        if choice.is_waiting and choice.replica is not None and self.replicas[choice.replica].has_begun(choice):
            choice.queue_seconds = time.monotonic() - choice.arrived
            self._has_started(choice)
            return self._set_alarm(choice)
        expired: Expired = "deadline_passed" if choice.is_waiting else "timeout"
        self._end(choice, EXPIRED[expired], expired)

    def _pause_if_full(self, choice: Choice) -> None:
        """Takes it from its engine while its client is late: what it has is enough to go on from later."""
        stream = choice.stream() if choice.stream is not None else None
        if stream is None or self._is_draining or choice.replica is None or not stream.is_full(choice.request.choice):
            return
        choice.is_paused = True
        self.replicas[choice.replica].take_back(choice)

    def _go_on(self, choice: Choice) -> None:
        """Its client reads again, or need not any more."""
        if choice.is_paused and choice.arrival in self._live:
            choice.is_paused = False
            self._hand_in(choice, self._open())

    def _abort(self, choice: Choice, how: FinishReason = "abort") -> None:
        if choice.arrival in self._live:
            self._forget(choice, how, has_ended=False)

    def _push(self, choice: Choice, update: Update) -> None:
        stream = choice.stream() if choice.stream is not None else None
        if stream is not None:
            stream.push(update)

    def _end(self, choice: Choice, error: str, expired: Expired | None = None) -> None:
        self._push(choice, Update(choice=choice.request.choice, finish_reason="error", error=error, expired=expired))
        self._abort(choice, "abort" if expired == "cancelled" else "error")

    def _end_all(self, error: str) -> None:
        self._suspects.clear()
        for choice in list(self._live.values()):
            self._end(choice, error)

    def _forget(self, choice: Choice, how: FinishReason, *, has_ended: bool) -> None:
        """has_ended: so that its engine need not be told."""
        del self._live[choice.arrival]
        if self._timeline is not None:
            self._timeline.ended(choice, how)
        if choice.replica is not None:
            replica = self.replicas[choice.replica]
            if has_ended:
                replica.release(choice)
            else:
                replica.take_back(choice)
        self._has_started(choice)
        if choice.alarm is not None:
            choice.alarm.cancel()
        self.admission.leave(choice)
        self._acquit(choice)
        if not self._live:
            self._has_changed()

    def _has_started(self, choice: Choice) -> None:
        if choice.is_waiting:
            choice.is_waiting = False
            self.admission.start(choice)

    def _count_engines(self) -> None:
        engines = self.replicas.in_force
        infos = [engine.info for engine in engines if engine.info is not None]
        self.admission.has_engines(len(engines), sum(info.num_blocks * info.block_size for info in infos))

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
            if self._timeline is not None:
                self._timeline.handed_in(choice)

    def _resume(self) -> None:
        """Hands in the suspect whose turn it is, and everyone else who is held, in order of arrival."""
        self._try_suspect()
        if among := self._open():
            for choice in list(self._live.values()):
                if choice.engine_id is None and not choice.is_paused and choice not in self._suspects:
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
        if self._is_watched:
            replica.watch(True)
        if self.info is not None and self.info.profile != info.profile:
            if self.replicas.in_force:
                log.warning("replica %d has another numerics profile (%s): it is not used", replica.index, info.profile)
                return
            for choice in list(self._live.values()):
                if choice.has_begun:
                    self._end(choice, OTHER_PROFILE)
        self.replicas.adopt(info)
        self._count_engines()
        self._resume()
        if replica is not self._suspects.court:
            self._relieve(replica)
        self._has_changed()

    def on_step(self, replica: Replica, step: Step) -> None:
        if self._timeline is not None:
            self._timeline.iterated(replica.index, step)
        for id in step.started:
            if id in replica.submitted:
                choice = replica.submitted[id]
                if choice.is_waiting:
                    choice.queue_seconds = max(0.0, time.monotonic() - choice.arrived - step.seconds)
                    self._has_started(choice)
                    self._set_alarm(choice)
        num_decode = 0
        for output in step.outputs:
            if output.id in replica.submitted:  # else it was aborted, or comes from an engine that is gone
                choice = replica.submitted[output.id]
                num_decode += len(output.token_ids) if choice.has_output else 0
                self._deliver(choice, output)
        if step.num_tokens:
            self.admission.iterated(max(0, step.num_tokens - num_decode), num_decode, step.seconds)
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
                pooled=output.pooled,
                num_cached=0 if choice.generated else output.num_cached,  # later, it is about a resubmission
                queue_seconds=choice.queue_seconds,
                finish_reason=output.finish_reason,
                error=output.error,
                timing=choice.add_up(output.timing),
            ),
        )
        choice.queue_seconds = None
        self.admission.generated(choice, len(output.token_ids), output.num_cached, time.monotonic())
        choice.generated += output.token_ids
        choice.has_prompt_logprobs = choice.has_prompt_logprobs or bool(output.prompt_logprobs)
        choice.crashes = choice.lone_crashes = 0
        if output.finish_reason is not None:
            self._forget(choice, output.finish_reason, has_ended=True)
        else:
            self._pause_if_full(choice)
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
        self._count_engines()
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
        self._count_engines()
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


def _resolved(num_prompt: int, params: SamplingParams, max_model_len: int) -> SamplingParams:
    """The parameters with max_tokens known. Raises ContextLengthError; ValueError for an empty prompt."""
    if num_prompt == 0:
        raise ValueError("an empty prompt: there is nothing to go on from")
    max_tokens = max_model_len - num_prompt if params.max_tokens is None else params.max_tokens
    if num_prompt + max_tokens > max_model_len or (params.max_tokens is None and max_tokens < 1):
        raise ContextLengthError(num_prompt, params.max_tokens, max_model_len)
    return msgspec.structs.replace(params, max_tokens=max_tokens)
