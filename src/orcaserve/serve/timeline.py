"""`Timeline`: what happened lately, iteration by iteration, in a ring that is bounded in bytes.

It is always kept, so that whoever opens the page sees what has been; every event is encoded once, as it is sent. It
holds lengths, times and names, never a text or a token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from orcaserve.core.decisions import Reason, Waits
from orcaserve.core.request import FinishReason
from orcaserve.engine.messages import Step
from orcaserve.serve.resume import Choice

MOST_BYTES = 8 << 20
TAIL_BYTES = 256 << 10  # of events that one who comes is given
_OVERHEAD = 48  # bytes that an event costs beside its own
_LONGEST_NAME = 160

Chunk = tuple[int, int, int]  # request, first position, tokens


class Arrived(msgspec.Struct, frozen=True, kw_only=True, tag="arrived", omit_defaults=True):
    """A request came. at: seconds of the timeline's clock, as everywhere. id: ordinal, for as long as the server lives.

    prompt, max_tokens: in tokens. name: the id of the response that it belongs to.
    """

    at: float
    id: int
    prompt: int
    max_tokens: int
    name: str = ""
    tenant: str = ""


class Iterated(msgspec.Struct, frozen=True, kw_only=True, tag="iterated", omit_defaults=True):
    """An iteration came back. seconds: how long it took. engine: whose it was. tokens: that it computed.

    Its rows, each in one of these: decode: requests that went on by a token. prefill: chunks of prompts. again: chunks
        that were computed before, until a preemption or a crash. idle: ended members of a static batch.
    cached: (request, tokens) that the prefix cache spared it in its first iteration, which this is.
    first: requests whose first token came out with it. generated: tokens that came out; samples: rows that sampled.
    preempted: requests whose KV was taken away before it. blocks: KV blocks that requests got, as (request, blocks).
    context: tokens whose K and V the rows in `decode` and `idle` read.
    running, waiting, held: requests, and KV blocks, of this engine after it. why: what the first in its queue waits
        for, if that is known.
    """

    at: float
    seconds: float
    tokens: int
    engine: int = 0
    decode: tuple[int, ...] = ()
    prefill: tuple[Chunk, ...] = ()
    again: tuple[Chunk, ...] = ()
    idle: tuple[int, ...] = ()
    cached: tuple[tuple[int, int], ...] = ()
    first: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    blocks: tuple[tuple[int, tuple[int, ...]], ...] = ()
    generated: int = 0
    samples: int = 0
    context: int = 0
    running: int = 0
    waiting: int = 0
    held: int = 0
    why: Reason | None = None


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended", omit_defaults=True):
    """A request left, and all about it. began: its first iteration's end; first: when its first token came out."""

    at: float
    id: int
    how: FinishReason
    arrived: float
    prompt: int
    generated: int = 0
    cached: int = 0
    began: float | None = None
    first: float | None = None
    name: str = ""
    tenant: str = ""


Event = Arrived | Iterated | Ended
_decode = msgspec.json.Decoder(Event).decode


def events_of(lines: Iterable[bytes]) -> list[Event]:
    return [_decode(line) for line in lines]


class Present(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request that is here, as far as the timeline knows. Owned by it.

    reached: tokens whose K and V it has had. generated: tokens it has; blocks: its KV blocks, in order.
    is_lost: it has yet to be computed once more up to there. has_kv: it runs, as far as is known.
    """

    id: int
    prompt: int
    max_tokens: int
    arrived: float
    engine: int = 0
    reached: int = 0
    generated: int = 0
    cached: int = 0
    began: float | None = None
    first: float | None = None
    is_lost: bool = False
    has_kv: bool = False
    blocks: list[int] = []
    name: str = ""
    tenant: str = ""


class Timeline:
    """Owner of the ring and of what is known of requests that are here. Called from the event loop.

    clock: seconds. Events are numbered from 0; `first` is the oldest that is kept, `next` the one to come.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, most_bytes: int = MOST_BYTES) -> None:
        self._clock = clock
        self._began = clock()
        self._most_bytes = most_bytes
        self._ring: deque[bytes] = deque()
        self._bytes = 0
        self.next = 0
        self._encode = msgspec.json.Encoder().encode
        self._present: dict[int, Present] = {}  # by arrival
        self._by_engine: dict[int, Present] = {}  # by the id that their engine has
        self._engine_ids: dict[int, int] = {}  # the other way round
        self._why: dict[int, Reason] = {}  # by engine
        self._cut: tuple[int, int, bytes] = (0, 0, b"[]")  # what was last cut from the ring, since all ask for the same

    @property
    def now(self) -> float:
        """Seconds since the timeline began."""
        return round(self._clock() - self._began, 4)

    @property
    def first(self) -> int:
        return self.next - len(self._ring)

    @property
    def num_bytes(self) -> int:
        """What the ring takes, about."""
        return self._bytes

    @property
    def present(self) -> list[Present]:
        """Who is here, in order of arrival."""
        return list(self._present.values())

    def since(self, number: int) -> bytes:
        """The events from this one on, which must be kept, as a JSON array."""
        if self._cut[:2] != (number, self.next):
            ring = self._ring
            self._cut = number, self.next, b"[" + b",".join([ring[i] for i in range(number - self.next, 0)]) + b"]"
        return self._cut[2]

    def tail(self, most_bytes: int = TAIL_BYTES) -> int:
        """The number of the oldest event of the last ones, which together have at most so many bytes."""
        number = self.next
        for line in reversed(self._ring):
            most_bytes -= len(line)
            if most_bytes < 0:
                break
            number -= 1
        return number

    def lines(self) -> list[bytes]:
        """All that is kept, as it is sent; `events_of` reads it, which takes a while and so is another thread's."""
        return list(self._ring)

    # -- what the pool tells -------------------------------------------------------------------------------------

    def arrived(self, choice: Choice) -> None:
        request = choice.request
        present = Present(
            id=choice.arrival,
            prompt=request.num_prompt,
            max_tokens=request.max_tokens,
            arrived=self.now,
            name=request.name[:_LONGEST_NAME],
            tenant=request.tenant,
        )
        self._present[present.id] = present
        self._put(
            Arrived(
                at=present.arrived,
                id=present.id,
                prompt=present.prompt,
                max_tokens=present.max_tokens,
                name=present.name,
                tenant=present.tenant,
            )
        )

    def handed_in(self, choice: Choice) -> None:
        """To an engine. If it was in one before, it has to be computed again."""
        present = self._present.get(choice.arrival)
        if present is None or choice.engine_id is None or choice.replica is None:
            return
        self._by_engine.pop(self._engine_ids.get(present.id, 0), None)
        self._by_engine[choice.engine_id] = present
        self._engine_ids[present.id] = choice.engine_id
        present.engine = choice.replica
        if present.began is not None:
            present.generated = len(choice.generated)
            present.reached = min(present.reached, choice.num_tokens)
            self._loses(present)

    def ended(self, choice: Choice, how: FinishReason) -> None:
        present = self._present.pop(choice.arrival, None)
        if present is None:
            return
        self._by_engine.pop(self._engine_ids.pop(present.id, 0), None)
        self._put(
            Ended(
                at=self.now,
                id=present.id,
                how=how,
                arrived=present.arrived,
                prompt=present.prompt,
                generated=present.generated,
                cached=present.cached,
                began=present.began,
                first=present.first,
                name=present.name,
                tenant=present.tenant,
            )
        )

    def iterated(self, engine: int, step: Step) -> None:
        if not step.rows:
            return
        now, known = self.now, self._by_engine
        preempted = [known[id] for id in step.freed if id in known]
        for present in preempted:
            self._loses(present)
        decode, idle = [], []
        prefill, again, cached, blocks = [], [], [], []
        context = samples = 0
        for row in step.rows:
            samples += row.samples
            present = known.get(row.id)
            if present is None:  # it was aborted
                continue
            start, count = row.start, row.num_tokens
            end = start + count
            if row.new_blocks:
                blocks.append((present.id, row.new_blocks))
                present.blocks += row.new_blocks
            is_again = present.is_lost and start < present.reached
            if is_again:
                again.append((present.id, start, count))
            elif end > present.reached and present.generated:
                decode.append(present.id)
                context += end
            elif end > present.reached:
                prefill.append((present.id, start, count))
            else:
                idle.append(present.id)
                context += end
            if present.began is None:
                present.began, present.cached = now, start
                if start:
                    cached.append((present.id, start))
            if end > present.reached:
                present.reached, present.is_lost = end, False
            present.has_kv = True
            present.generated += row.samples
        first = []
        generated = 0
        for output in step.outputs:
            generated += len(output.token_ids)
            present = known.get(output.id)
            if present is not None and present.first is None and output.token_ids:
                present.first = now
                first.append(present.id)
        for decision in step.decisions:
            if isinstance(decision, Waits) and not decision.runs:
                self._why[engine] = decision.why
        stats = step.stats
        if not stats.num_waiting:
            self._why.pop(engine, None)
        self._put(
            Iterated(
                at=now,
                seconds=round(step.seconds, 6),
                tokens=step.num_tokens,
                engine=engine,
                decode=tuple(decode),
                prefill=tuple(prefill),
                again=tuple(again),
                idle=tuple(idle),
                cached=tuple(cached),
                first=tuple(first),
                preempted=tuple([present.id for present in preempted]),
                blocks=tuple(blocks),
                generated=generated,
                samples=samples,
                context=context,
                running=stats.num_running,
                waiting=stats.num_waiting,
                held=stats.num_held_blocks,
                why=self._why.get(engine),
            )
        )

    def forget_reasons(self) -> None:
        """Nobody looks on any more, and engines no longer tell."""
        self._why.clear()

    def _loses(self, present: Present) -> None:
        """Its KV."""
        present.is_lost, present.has_kv = True, False
        present.blocks = []

    def _put(self, event: Event) -> None:
        line = self._encode(event)
        self._ring.append(line)
        self._bytes += len(line) + _OVERHEAD
        self.next += 1
        while self._bytes > self._most_bytes:
            self._bytes -= len(self._ring.popleft()) + _OVERHEAD
