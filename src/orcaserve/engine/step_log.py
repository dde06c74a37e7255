"""The step log: what an EngineLoop was told and what each iteration took, as JSON lines, so that it can be replayed.

A log has lengths and times, never a token: where a prefix cache may find something, full blocks have names. Equal names
are equal beginnings up to and including that block, and a name says nothing else: it is a hash with a key that nobody
keeps.

Lines stand in the order in which the loop did things. That order, not the times, makes a replay exact. Why somebody had
to wait stands beside that: it follows from the rest, and a replay passes over it.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b

import msgspec

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.decisions import Decision
from orcaserve.core.request import NewRequest, Pooling
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.messages import Abort, Command, Submit
from orcaserve.sim.shape import ModelShape

VERSION = 3  # 2 has no overlap; of 1 nobody knows why who waited, or what it was called
_NAME_BITS = 52  # a name is a whole number that every reader of JSON keeps exact

Row = tuple[int, int, int, bool]  # request, start, tokens, samples


class Header(msgspec.Struct, frozen=True, kw_only=True, tag="engine", omit_defaults=True):
    """The first line of an engine's life; after a crash the next engine writes one, too. machine: in words.

    version: goes up when there are lines that older readers do not know; a reader knows all below its own, too.
    """

    config: SchedulerConfig
    model: ModelShape | None = None
    machine: str = ""
    threads: int = 1
    version: int = 1


class Arrived(msgspec.Struct, frozen=True, kw_only=True, tag="arrival", omit_defaults=True):
    """The loop took a request in. at: seconds since the log began, as everywhere.

    prompt, max_tokens: in tokens. done: tokens that it had generated before (it comes back from a crash).
    scores: it wants the prompt's log-probabilities; pools: the prompt as one vector, and how. plain: as SamplingParams
        has it. blocks: names of the full blocks of its tokens.
    tenant, priority, deadline, name: as in NewRequest. waited: seconds that it lay in the loop's inbox before that.
    """

    at: float
    id: int
    prompt: int
    max_tokens: int
    done: int = 0
    scores: bool = False
    pools: Pooling | None = None
    plain: bool = True
    blocks: tuple[int, ...] = ()
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    name: str = ""
    waited: float = 0.0


class Left(msgspec.Struct, frozen=True, tag="abort"):
    """The loop was told to forget a request."""

    at: float
    id: int


class Decided(msgspec.Struct, frozen=True, tag="decided"):
    """Who is left out of the iteration that is submitted next, or preempted for it; only what has changed."""

    at: float
    decisions: tuple[Decision, ...]


class Submitted(msgspec.Struct, frozen=True, tag="batch", omit_defaults=True):
    """An iteration was given to the executor. swaps: the copies that came before it, as (out, number of blocks)."""

    at: float
    rows: tuple[Row, ...]
    swaps: tuple[tuple[bool, int], ...] = ()


class Returned(msgspec.Struct, frozen=True, kw_only=True, tag="result", omit_defaults=True):
    """The oldest iteration's results came back. seconds: since it was submitted, or since the one before came back.

    stopped: requests that an end token ended. failed: requests whose row had an error.
    blocks: (request, name) of the blocks that generated tokens have filled.
    """

    at: float
    seconds: float
    stopped: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()


Event = Arrived | Left | Decided | Submitted | Returned
_decode = msgspec.json.Decoder(Header | Event).decode


class Log(msgspec.Struct, frozen=True):
    """One engine's life: its header, and what happened, in order."""

    header: Header
    events: tuple[Event, ...]


def read(data: bytes) -> list[Log]:
    """The lives that a file holds. A last line that is cut off (the engine was killed) is left out.

    ValueError says in one line what is wrong, and where.
    """
    logs: list[tuple[Header, list[Event]]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line and number == len(lines):
            break
        try:
            found = _decode(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} is none of a step log: {error}") from None
        if isinstance(found, Header):
            if not 1 <= found.version <= VERSION:
                raise ValueError(f"line {number}: a step log of version {found.version}; this reads 1 to {VERSION}")
            logs.append((found, []))
        elif not logs:
            raise ValueError("the first line of a step log names the engine; record one with --step-log")
        else:
            last = logs[-1][1]
            if found.at < (last[-1].at if last else 0.0):
                raise ValueError(f"line {number}: time runs backwards, to {found.at} s")
            last.append(found)
    if not logs:
        raise ValueError("a step log without a line; record one with --step-log")
    return [Log(header, tuple(events)) for header, events in logs]


def log_clock(clock: Callable[[], float]) -> Callable[[], float]:
    """A clock that begins now and shows whole microseconds: what a log can say, so that a replay has the same times."""
    began = clock()
    return lambda: round(clock() - began, 6)


def swaps_of(batch: Batch) -> tuple[tuple[bool, int], ...]:
    """A batch's copies, as a log has them."""
    return tuple([(swap.out, len(swap.blocks)) for swap in batch.swaps])


class _Open:
    """What a log must know of a request that runs: what ends it, and the block that is being filled."""

    __slots__ = ("ends", "left", "parent", "tail", "total")

    def __init__(self, new: NewRequest) -> None:
        self.ends = frozenset(new.end_token_ids)
        self.total = len(new.token_ids)
        self.left = new.num_prompt + new.max_tokens - self.total
        self.parent = new.cache_salt.encode()
        self.tail = list(new.token_ids)


class StepLog:
    """A loop's witness. Owner of what it knows of open requests.

    write: takes bytes (whole lines) and never raises or waits. key: secret bytes, at most 64, for the names of blocks;
    forget them. Times are written as the loop has them: give it `log_clock`.
    """

    def __init__(self, header: Header, write: Callable[[bytes], None], key: bytes = b"") -> None:
        self._write = write
        self._key = key
        self._block_size = header.config.block_size
        self._names_blocks = header.config.policy.prefix_cache
        self._encode = msgspec.json.Encoder().encode
        self._open: dict[int, _Open] = {}
        self._submitted: deque[float] = deque()  # when those in flight were
        self._last = 0.0
        self._line(msgspec.structs.replace(header, version=VERSION))

    def took(self, now: float, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Submit):
                self._arrived(now, command.request, command.waited)
            elif isinstance(command, Abort):
                self._open.pop(command.id, None)
                self._line(Left(now, command.id))

    def decided(self, now: float, decisions: Sequence[Decision]) -> None:
        self._line(Decided(now, tuple(decisions)))

    def submitted(self, now: float, batch: Batch) -> None:
        rows = tuple([(row.id, row.start, row.num_tokens, row.samples) for row in batch.rows])
        self._line(Submitted(now, rows, swaps_of(batch)))
        self._submitted.append(now)

    def returned(self, now: float, batch: Batch, result: StepResult) -> None:
        stopped: list[int] = []
        failed: list[int] = []
        blocks: list[tuple[int, int]] = []
        for row, got in zip(batch.rows, result.rows, strict=True):
            known = self._open.get(row.id)
            if known is None:  # aborted, or it has ended and was ahead, or in a static batch
                continue
            if got.error is not None or (row.samples and got.token_id is None):
                failed.append(row.id)
                del self._open[row.id]
            elif got.token_id is not None:
                known.left -= 1
                if got.token_id in known.ends:
                    stopped.append(row.id)
                    del self._open[row.id]
                elif known.left == 0:
                    del self._open[row.id]
                elif self._names_blocks:
                    known.tail.append(got.token_id)
                    blocks += [(row.id, name) for name in self._names(known)]
            elif known.left == 0 and row.start + row.num_tokens == known.total:  # it only scored its prompt
                del self._open[row.id]
        self._line(
            Returned(
                at=now,
                seconds=round(now - max(self._submitted.popleft(), self._last), 6),
                stopped=tuple(stopped),
                failed=tuple(failed),
                blocks=tuple(blocks),
            )
        )
        self._last = now

    def _arrived(self, now: float, new: NewRequest, waited: float) -> None:
        known = self._open[new.id] = _Open(new)
        names = tuple(self._names(known)) if self._names_blocks else ()
        self._line(
            Arrived(
                at=now,
                id=new.id,
                prompt=new.num_prompt,
                max_tokens=new.max_tokens,
                done=len(new.token_ids) - new.num_prompt,
                scores=new.params.prompt_logprobs is not None,
                pools=new.params.pooling,
                plain=new.params.is_plain,
                blocks=names,
                tenant=new.tenant,
                priority=new.priority,
                deadline=new.deadline,
                name=new.name,
                waited=round(waited, 6),
            )
        )

    def _names(self, known: _Open) -> list[int]:
        """Names of the blocks that are full by now. A name covers all before it, as the prefix cache's keys do."""
        names = []
        size = self._block_size
        start = 0
        while start + size <= len(known.tail):
            block = array("q", known.tail[start : start + size]).tobytes()
            known.parent = blake2b(known.parent + block, key=self._key, digest_size=16).digest()
            names.append(int.from_bytes(known.parent[:8], "little") >> (64 - _NAME_BITS))
            start += size
        del known.tail[:start]
        return names

    def _line(self, line: Header | Event) -> None:
        self._write(self._encode(line) + b"\n")
