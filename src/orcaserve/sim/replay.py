"""`replay`: a recorded engine's life once more, through the real scheduler and loop, batch for batch.

Commands are handed in where the log has them, iterations return when they did, requests end as they did. Nothing else
is given: who takes part in which iteration, with how many tokens, is the scheduler's work, and is compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress

from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Abort, Command, Step, Stop, Submit
from orcaserve.engine.step_log import Arrived, Decided, Event, Left, Log, Returned, Row, Submitted, swaps_of
from orcaserve.sim.executor import VirtualClock

_END = -(1 << 62)  # the token that ends whoever an end token ended; no block has it for a name


class ReplayError(Exception):
    """The scheduler does something else than it did; the message names the first batch that differs."""


class _LogEnds(Exception):
    """The log has no further line: its engine was stopped or killed here."""


def rows_of(batch: Batch) -> tuple[Row, ...]:
    """A batch as a log has it."""
    return tuple((row.id, row.start, row.num_tokens, row.samples) for row in batch.rows)


def block_names(log: Log) -> dict[int, list[int]]:
    """The names of all blocks that each request has filled, those of its prompt first."""
    names: dict[int, list[int]] = defaultdict(list)
    for event in log.events:
        if isinstance(event, Arrived):
            names[event.id] = list(event.blocks)
        elif isinstance(event, Returned):
            for id, name in event.blocks:
                names[id].append(name)
    return names


def tokens_of(names: Iterable[int], id: int, block_size: int, count: int) -> tuple[int, ...]:
    """`count` tokens for a request whose blocks have these names: a full block is equal to another if its name is.

    Blocks without a name, which never got full, are like no other.
    """
    tokens = [name for name in names for _ in range(block_size)]
    return tuple(tokens[:count]) + (-1 - id,) * max(0, count - len(tokens))


class _Tape:
    """Inbox, executor and outbox of a replayed engine. Owner of the place in the log."""

    def __init__(self, log: Log, clock: VirtualClock) -> None:
        self._block_size = log.header.config.block_size
        self._events = [event for event in log.events if not isinstance(event, Decided)]  # they follow from the rest
        self._clock = clock
        self._names = block_names(log)
        self._scored = {event.id for event in log.events if isinstance(event, Arrived) and event.scores}
        self._at = 0
        self.batches: list[tuple[Row, ...]] = []

    def take(self, block: bool) -> list[Command]:
        commands: list[Command] = []
        while self._at < len(self._events):
            event = self._events[self._at]
            if isinstance(event, Arrived):
                commands.append(Submit(self._request(event)))
            elif isinstance(event, Left):
                commands.append(Abort(event.id))
            else:
                break
            self._pass(event.at)
        if block and not commands:
            if self._at == len(self._events):
                return [Stop()]
            raise ReplayError(f"batch {len(self.batches) + 1} differs: nothing is left to do, but the log has one")
        return commands

    def submit(self, batch: Batch) -> _TapePending:
        event = self._next()
        rows = rows_of(batch)
        if not isinstance(event, Submitted):
            raise ReplayError(f"batch {len(self.batches) + 1} differs: the log has none here, now it is {_said(rows)}")
        if rows != event.rows:
            raise ReplayError(
                f"batch {len(self.batches) + 1} differs: the log has {_said(event.rows)}, now it is {_said(rows)}"
            )
        if (swaps := swaps_of(batch)) != event.swaps:
            raise ReplayError(
                f"batch {len(self.batches) + 1} differs: the log has swaps {event.swaps}, now they are {swaps}"
            )
        self.batches.append(rows)
        self._pass(event.at)
        return _TapePending(self, batch)

    def returned(self, batch: Batch) -> StepResult:
        event = self._next()
        if not isinstance(event, Returned):
            raise ReplayError(f"batch {len(self.batches) + 1} differs: the log has another one, now there is none")
        self._pass(event.at)
        stopped, failed = set(event.stopped), set(event.failed)
        return StepResult(tuple(self._result(batch, i, stopped, failed) for i in range(len(batch.rows))))

    def put(self, step: Step) -> None:
        """Outputs go nowhere."""

    def _result(self, batch: Batch, i: int, stopped: set[int], failed: set[int]) -> RowResult:
        row = batch.rows[i]
        if row.id in failed:
            return RowResult(id=row.id, error="as recorded")
        if not row.samples:
            return RowResult(id=row.id)
        if row.id in stopped:
            return RowResult(id=row.id, token_id=_END)
        block, names = (row.start + row.num_tokens) // self._block_size, self._names[row.id]
        return RowResult(id=row.id, token_id=names[block] if block < len(names) else -1 - row.id)

    def _request(self, event: Arrived) -> NewRequest:
        return NewRequest(
            id=event.id,
            token_ids=tokens_of(self._names[event.id], event.id, self._block_size, event.prompt + event.done),
            num_prompt=event.prompt,
            max_tokens=event.max_tokens,
            params=SamplingParams(
                logprobs=None if event.plain else 0,
                prompt_logprobs=0 if event.scores else None,
                pooling=event.pools,
            ),
            end_token_ids=(_END,),
            tenant=event.tenant,
            priority=event.priority,
            deadline=event.deadline,
        )

    def _next(self) -> Event:
        if self._at == len(self._events):
            raise _LogEnds
        return self._events[self._at]

    def _pass(self, time: float) -> None:
        self._at += 1
        self._clock.advance_to(time)


class _TapePending:
    """An iteration that returns where the log has its return."""

    def __init__(self, tape: _Tape, batch: Batch) -> None:
        self._tape = tape
        self._batch = batch

    def result(self) -> StepResult:
        return self._tape.returned(self._batch)


def replay(log: Log, scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler) -> list[tuple[Row, ...]]:
    """The batches that the scheduler makes of what the log says came in: those of the log, or ReplayError."""
    clock = VirtualClock()
    tape = _Tape(log, clock)
    loop = EngineLoop(scheduler(log.header.config), tape, tape, tape, clock)
    with suppress(_LogEnds):
        loop.run()
    return tape.batches


def _said(rows: tuple[Row, ...]) -> str:
    """Rows for a message: the first few."""
    shown = ", ".join(f"request {id} from {start} + {count}" for id, start, count, _ in rows[:4])
    return f"{len(rows)} rows ({shown}{', …' if len(rows) > 4 else ''})"
