"""`Pool`: the request pool in the frontend, source of truth of every request; engines come and go behind it.

For every unfinished choice it keeps what is needed to go on: prompt, drawn seed, and all tokens so far. When an engine
dies, its unfinished choices are handed to another one, or to the next one, with what they have, and their streams go on
with no lost and no repeated token; who gets whom is the `Dispatcher`'s. In the same way a choice is taken from its
engine while its client does not read what there is, so that slow clients take neither the engine's memory nor ours.
Runs in one event loop, and everything here is called from it.
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
from orcaserve.serve.admission import RETRY_SECONDS, Admission, Claim, Limits, Unavailable, resolved
from orcaserve.serve.dispatcher import Dispatcher
from orcaserve.serve.replica import Crash, Replica
from orcaserve.serve.replicas import Replicas, Replication
from orcaserve.serve.resume import Choice
from orcaserve.serve.stream import CutOff, Stream, Update
from orcaserve.serve.terms import Terms
from orcaserve.serve.timeline import Timeline

log = logging.getLogger(__name__)

CRASHED = "this request makes the engine crash"
CUT_OFF: dict[CutOff, str] = {
    "deadline_passed": "the deadline passed before the request's first iteration",
    "timeout": "the request's time was up before its end",
    "cancelled": "the request was cancelled",
    "draining": "the server is shutting down",
    "failed": "the engine failed and could not be started again",
    "other_profile": "the engine came back with another numerics profile, so this response cannot go on",
}


class EngineFailed(Exception):
    """There is no engine and will be none; the message is one clear line for the operator."""


class Pool:
    """Owner of all unfinished choices, from arrival to end, and of the replicas that keep an engine each behind them.

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
        replication = replication or Replication()
        self.admission = Admission(limits or Limits(), options.max_batch_size, options.max_batch_tokens)
        self.replicas = Replicas(options, replication, command, self)
        self.failure: str | None = None  # the line for the operator, once the state is "failed"
        self._on_progress = on_progress
        self._on_step = on_step
        self._timeline = timeline
        self._is_draining = False
        self._changed = asyncio.Event()  # set and replaced at every change that ready() or drain() waits for
        self._live: dict[int, Choice] = {}  # by arrival, hence in order of arrival
        self._arrivals = itertools.count()
        # There is nothing to know about prompts where there is nothing to choose.
        router = ROUTERS[replication.router if replication.replicas > 1 else "round-robin"](options.block_size)
        self._dispatcher = Dispatcher(self.replicas, router, self._live, timeline)

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
        """Of all replicas together; who is held until there is an engine waits, too. Counters never go down."""
        stats = self.replicas.stats
        held = sum(choice.engine_id is None and not choice.is_paused for choice in self._live.values())
        return msgspec.structs.replace(stats, num_waiting=stats.num_waiting + held)

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
            self._end_all("draining")
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
        fitted = [(tuple(ids), resolved(len(ids), params, info.max_model_len)) for ids, params in prompts]
        self.admission.admit(terms, fitted, time.monotonic())
        return [
            self._begin(
                NewRequest(
                    id=0,
                    token_ids=ids,
                    num_prompt=len(ids),
                    max_tokens=params.max_tokens or 0,
                    params=params,
                    seed=secrets.randbits(63) if params.seed is None else params.seed,
                    end_token_ids=tuple(end_token_ids),
                    cache_salt=terms.salt(cache_salt),
                    tenant=terms.tenant,
                    priority=terms.priority,
                    name=name,
                    timed=timed,
                ),
                terms,
            )
            for ids, params in fitted
        ]

    def _begin(self, request: NewRequest, terms: Terms) -> Stream:
        """request: of each choice."""
        keys = self._dispatcher.router.keys(request.token_ids, request.cache_salt)
        indexes = range(request.params.n)
        choices = [
            Choice(next(self._arrivals), msgspec.structs.replace(request, choice=index), keys, terms)
            for index in indexes
        ]
        stream = Stream(
            indexes, lambda index: self._forget(choices[index], "abort"), lambda index: self._go_on(choices[index])
        )
        for choice in choices:
            choice.stream = weakref.ref(stream)
            self._live[choice.arrival] = choice
            self.admission.arrive(choice)
            if self._timeline is not None:
                self._timeline.arrived(choice)
            self._set_alarm(choice)
            self._dispatcher.hand_in(choice)
        return stream

    def cancel(self, arrival: int) -> bool:
        """Ends a choice with an error, as an operator wishes. False if there is none.

        arrival: its ordinal, which the timeline names.
        """
        choice = self._live.get(arrival)
        if choice is None:
            return False
        self._cut_off(choice, "cancelled")
        return True

    def watch(self, on: bool) -> None:
        """Whether engines are to say why requests wait, which they do for those who look on alone."""
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
        if choice.alarm is not None:
            choice.alarm.cancel()
        by = choice.terms.start_by if choice.is_waiting else choice.terms.end_by
        loop = asyncio.get_running_loop()
        choice.alarm = None if by is None else loop.call_later(by - time.monotonic(), self._expire, choice)

    def _expire(self, choice: Choice) -> None:
        if choice.is_waiting and choice.replica is not None and self.replicas[choice.replica].has_begun(choice):
            return self._has_started(choice)
        self._cut_off(choice, "deadline_passed" if choice.is_waiting else "timeout")

    def _has_started(self, choice: Choice, seconds: float = 0.0) -> None:
        """Its first iteration, so many seconds ago."""
        choice.queue_seconds = max(0.0, time.monotonic() - choice.arrived - seconds)
        self._leave_queue(choice)
        self._set_alarm(choice)

    def _leave_queue(self, choice: Choice) -> None:
        if choice.is_waiting:
            choice.is_waiting = False
            self.admission.start(choice)

    def _go_on(self, choice: Choice) -> None:
        """Its client reads again, or need not any more."""
        if choice.is_paused and choice.arrival in self._live:
            choice.is_paused = False
            self._dispatcher.hand_in(choice)

    def _cut_off(self, choice: Choice, why: CutOff) -> None:
        self._end(choice, CUT_OFF[why], why)

    def _end(self, choice: Choice, error: str, cut_off: CutOff | None = None) -> None:
        choice.push(Update(choice=choice.request.choice, finish_reason="error", error=error, cut_off=cut_off))
        self._forget(choice, "abort" if cut_off == "cancelled" else "error")

    def _end_all(self, why: CutOff) -> None:
        self._dispatcher.suspects.clear()
        for choice in list(self._live.values()):
            self._cut_off(choice, why)

    def _forget(self, choice: Choice, how: FinishReason) -> None:
        if self._live.pop(choice.arrival, None) is None:
            return
        if self._timeline is not None:
            self._timeline.ended(choice, how)
        if choice.replica is not None:
            self.replicas[choice.replica].take_back(choice)
        self._leave_queue(choice)
        if choice.alarm is not None:
            choice.alarm.cancel()
        self.admission.leave(choice, time.monotonic())
        self._dispatcher.acquit(choice)
        if not self._live:
            self._has_changed()

    def _count_engines(self) -> None:
        engines = self.replicas.in_force
        infos = [engine.info for engine in engines if engine.info is not None]
        self.admission.has_engines(len(engines), sum(info.num_blocks * info.block_size for info in infos))

    def _has_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # -- what the replicas tell ----------------------------------------------------------------------------------

    def on_loading(self, replica: Replica, stage: str, done: int, total: int) -> None:
        if self._on_progress is not None:
            name = stage if len(self.replicas) == 1 else f"{stage} of replica {replica.index}"
            self._on_progress(name, done, total)

    def on_ready(self, replica: Replica) -> None:
        info = replica.info
        if info is None:
            return
        self._dispatcher.router.begin(replica.index, info.num_blocks)
        if self.info is not None and self.info.profile != info.profile:
            if self.replicas.in_force:
                log.warning("replica %d has another numerics profile (%s): it is not used", replica.index, info.profile)
                return
            for choice in list(self._live.values()):
                if choice.has_begun:
                    self._cut_off(choice, "other_profile")
        self.replicas.adopt(info)
        self._count_engines()
        self._dispatcher.resume()
        self._dispatcher.relieve(replica)
        self._has_changed()

    def on_step(self, replica: Replica, step: Step) -> None:
        if self._timeline is not None:
            self._timeline.iterated(replica.index, step)
        for id in step.started:
            if id in replica.submitted and replica.submitted[id].is_waiting:
                self._has_started(replica.submitted[id], step.seconds)
        num_decode = 0
        for output in step.outputs:
            if output.id in replica.submitted:  # else it was aborted, or comes from an engine that is gone
                choice = replica.submitted[output.id]
                num_decode += len(output.token_ids) if choice.has_output else 0
                self._deliver(replica, choice, output)
        if step.num_tokens:
            self.admission.iterated(max(0, step.num_tokens - num_decode), num_decode, step.seconds)
        if self._on_step is not None:
            self._on_step(step)

    def _deliver(self, replica: Replica, choice: Choice, output: Output) -> None:
        self.admission.generated(choice, len(output.token_ids), output.num_cached, time.monotonic())
        choice.push(choice.take(output))
        if output.finish_reason is not None:
            replica.release(choice)
            self._forget(choice, output.finish_reason)
            return
        if choice.is_late and not self._is_draining:  # what it has is enough to go on from later
            choice.is_paused = True
            replica.take_back(choice)
        self._dispatcher.acquit(choice)

    def on_death(self, replica: Replica, crash: Crash) -> bool:
        """Everyone goes on elsewhere, suspects by turns. True if one has been convicted, and ended."""
        self._count_engines()
        convicts = self._dispatcher.blame(replica, crash)
        for choice in convicts:
            self._end(choice, CRASHED)
        self._dispatcher.resume()
        return bool(convicts)

    def on_failed(self, replica: Replica, message: str) -> None:
        self._count_engines()
        if self.replicas.state == "failed":
            self.failure = message
            self._end_all("failed")
        else:
            log.error("replica %d is given up: %s", replica.index, message)
            left = [other for other in self.replicas if other.state == "ready"]
            if left and not self.replicas.in_force and not self.replicas.is_any_coming:
                self.on_ready(left[0])  # its profile, which is another one, is all that is left
            self._dispatcher.resume()
        self._has_changed()
