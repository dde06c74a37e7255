"""`EngineLoop`: Algorithm 1 of Orca. Schedule while the pipe has room, wait for the oldest iteration, take it in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.decisions import Decision
from orcaserve.core.request import Output
from orcaserve.core.scheduler import RequestTooLarge, Scheduler
from orcaserve.engine.executor import Executor, Pending
from orcaserve.engine.messages import Abort, Command, Stats, Step, Stop, Submit


class Inbox(Protocol):
    """Where commands come from."""

    def take(self, block: bool) -> list[Command]:
        """All commands that are there, in order; waits for one first if `block`."""
        ...


class Outbox(Protocol):
    """Where results go. Never blocks the loop."""

    def put(self, step: Step) -> None: ...


class Witness(Protocol):
    """Who is told all that a loop does, in order. Never raises or waits. now: the loop's clock, in seconds."""

    def took(self, now: float, commands: Sequence[Command]) -> None:
        """Commands came."""
        ...

    def decided(self, now: float, decisions: Sequence[Decision]) -> None:
        """The scheduler has left requests out of the batch that it submits next, if any."""
        ...

    def submitted(self, now: float, batch: Batch) -> None:
        """A batch is about to be given to the executor."""
        ...

    def returned(self, now: float, batch: Batch, result: StepResult) -> None:
        """The oldest batch is back."""
        ...


class EngineLoop:
    """Owner of the batches in flight: at most `depth`, taken back in the order in which they were submitted.

    clock: gives seconds, real or virtual. The scheduler's time is when commands came last, or a batch came back, so
    that whoever knows these times can repeat what it does.
    is_watched: whether somebody looks on, who wants to know why requests wait: that costs something to find out.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        inbox: Inbox,
        outbox: Outbox,
        clock: Callable[[], float],
        witness: Witness | None = None,
        is_watched: Callable[[], bool] = lambda: False,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._witness = witness
        self._is_watched = is_watched
        self._decisions = None if witness is None else scheduler.listen()
        self._untold: tuple[Decision, ...] = ()  # decisions for the next message
        self._depth = scheduler.config.depth
        self._in_flight: deque[tuple[Batch, Pending]] = deque()
        self._now = self._last = clock()

    def run(self) -> None:
        """Serves until a Stop command."""
        while self.step():
            pass

    def step(self) -> bool:
        """One turn: commands in, batches out, the oldest batch back. False after a Stop command."""
        idle = not self._scheduler.requests
        if commands := self._inbox.take(block=idle):
            self._now = self._clock()
            if self._witness is not None:
                self._witness.took(self._now, commands)
        for command in commands:
            if isinstance(command, Stop):
                return False
            self._obey(command)
        if idle:
            self._last = self._now
        while len(self._in_flight) < self._depth and (batch := self._schedule()) is not None:
            if self._witness is not None:
                self._witness.submitted(self._clock(), batch)
            self._in_flight.append((batch, self._executor.submit(batch)))
        if self._in_flight:
            batch, pending = self._in_flight.popleft()
            result = pending.result()
            self._now = self._clock()
            if self._witness is not None:
                self._witness.returned(self._now, batch, result)
            outputs = self._scheduler.update(batch, result, self._now)
            self._outbox.put(self._report(batch, outputs))
        elif self._scheduler.requests:
            raise RuntimeError("the scheduler has work, but makes no batch of it")
        return True

    def _schedule(self) -> Batch | None:
        is_watched = self._is_watched()
        if self._witness is None and is_watched != (self._decisions is not None):
            self._decisions = self._scheduler.listen() if is_watched else None
            if not is_watched:
                self._scheduler.stop_telling()
        batch = self._scheduler.schedule(self._now)
        if self._decisions is not None and (decisions := self._decisions.take()):
            if is_watched:
                self._untold += decisions
            if self._witness is not None:
                self._witness.decided(self._clock(), decisions)
        return batch

    def _obey(self, command: Submit | Abort) -> None:
        if isinstance(command, Abort):
            self._scheduler.abort(command.id)
        else:
            try:
                self._scheduler.add(command.request, self._now, command.waited)
            except RequestTooLarge as error:
                refusal = Output(id=command.request.id, finish_reason="error", error=str(error))
                self._outbox.put(Step(outputs=(refusal,), stats=self.stats()))

    def _report(self, batch: Batch, outputs: tuple[Output, ...]) -> Step:
        seconds, self._last = self._now - self._last, self._now
        decisions, self._untold = self._untold, ()
        return Step(
            outputs=outputs,
            started=tuple([new.id for new in batch.new]),
            num_tokens=batch.num_tokens,
            num_rows=len(batch.rows),
            seconds=seconds,
            rows=batch.rows,
            freed=batch.freed,
            decisions=decisions,
            stats=self.stats(),
        )

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.kv.pool.num_blocks,
            num_held_blocks=scheduler.kv.pool.num_held,
            num_preemptions=scheduler.num_preemptions,
            num_swapped=0 if scheduler.kv.swap is None else scheduler.kv.swap.num_swapped,
            prefix_queries=scheduler.kv.num_queries,
            prefix_hits=scheduler.kv.num_hits,
            num_steps=scheduler.num_steps,
        )
