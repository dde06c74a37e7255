"""`stories`: what became of every request of a step log, when, and why it had to wait.

The times are the log's: those at which requests came, the loop submitted iterations and had them back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Literal

import msgspec

from orcaserve.core.decisions import Preempted, Reason, Waits
from orcaserve.engine.step_log import Arrived, Decided, Left, Log, Returned, Submitted

Kind = Literal["queue", "prefill", "decode", "lost", "burned"]
Cause = Reason | Literal["iteration", "unknown"]
End = Literal["stop", "length", "error", "abort"]


class Span(msgspec.Struct, frozen=True):
    """A phase, as `core.timing.Timing` has them. "burned": it had ended, and a static batch went on computing it."""

    kind: Kind
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of waiting for one reason.

    why: as `core.decisions.Waits` has it; "iteration": until the next one was put together; "unknown": an old log.
    blocks, holders, by: at its beginning, as in `Waits`.
    others: who stood before it, first in the queue, one after the other; for so many seconds (`behind`).
    is_left_out: it was not in the queue; it had KV, and iterations went without it.
    """

    begin: float
    end: float
    why: Cause
    others: tuple[int, ...] = ()
    behind: float = 0.0
    blocks: int = 0
    holders: tuple[tuple[int, int], ...] = ()
    by: int | None = None
    is_left_out: bool = False

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A preemption. by: for whom, where the log says so. tokens: whose K and V were lost.

    resumed: when it ran again; None also if it was preempted before it did. caught_up: when it had computed as much as
    before.
    """

    at: float
    tokens: int
    by: int | None = None
    resumed: float | None = None
    caught_up: float | None = None


class Stretch(msgspec.Struct, frozen=True):
    """Iterations of one phase. mates: others in them, added up; most_mates: in one of them."""

    iterations: int = 0
    mates: int = 0
    most_mates: int = 0

    @property
    def mean_mates(self) -> float:
        return self.mates / self.iterations if self.iterations else 0.0

    def __add__(self, later: Stretch) -> Stretch:
        return Stretch(
            self.iterations + later.iterations, self.mates + later.mates, max(self.most_mates, later.most_mates)
        )


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """One request. Tokens: done before a crash, cached by the prefix cache, generated here, computed once more.

    end: None if the log ends first; `ended` is then when it does.
    """

    id: int
    name: str
    prompt: int
    max_tokens: int
    done: int
    arrived: float
    began: float | None
    first_token: float | None
    ended: float
    end: End | None
    cached: int
    generated: int
    recomputed: int
    spans: tuple[Span, ...]
    waits: tuple[Wait, ...]
    losses: tuple[Loss, ...]
    stretches: dict[Kind, Stretch]

    def seconds(self, kind: Kind) -> float:
        """Of all spans of a kind."""
        return sum(span.seconds for span in self.spans if span.kind == kind)

    @property
    def waited(self) -> float:
        """Seconds in the queue, first and again."""
        return sum(wait.seconds for wait in self.waits if not wait.is_left_out)

    @property
    def together(self) -> Stretch:
        """All iterations that it took part in until it had ended."""
        return sum((found for kind, found in self.stretches.items() if kind != "burned"), Stretch())


def stories(log: Log) -> list[Story]:
    """In order of arrival."""
    teller = _Teller(log)
    for event in log.events:
        teller.take(event)
    return teller.told()


class _Life:
    """What is known of one request so far. Owned by the _Teller."""

    def __init__(self, event: Arrived) -> None:
        self.event = event
        self.spans: list[Span] = []
        self.arrived = event.at - event.waited
        self.waits: list[Wait] = []
        if event.waited > 0:
            self.waits.append(Wait(begin=self.arrived, end=event.at, why="iteration"))
        self.losses: list[Loss] = []
        self.stretches: dict[Kind, Stretch] = {}
        self.kind: Kind = "lost" if event.done else "queue"
        self.since = self.arrived
        self.waits_since: float | None = event.at
        self.waits_from_head = 0  # the place in the list of heads from which on they are of interest
        self.left_out: tuple[float, Waits] | None = None
        self.sent = 0  # tokens computed, those in flight included
        self.reached = event.prompt + event.done - 1 if event.done else 0
        self.cached = self.generated = self.recomputed = 0
        self.began: float | None = None
        self.first_token: float | None = None
        self.latest = event.at  # when it last came back
        self.ended: float | None = None
        self.burned_until: float | None = None
        self.end: End | None = None

    def enter(self, kind: Kind, at: float) -> None:
        if at > self.since:
            self.spans.append(Span(self.kind, self.since, at))
        self.kind, self.since = kind, at

    def finish(self, end: End, at: float) -> None:
        self.enter(self.kind, at)
        self.end, self.ended = end, at


class _Teller:
    """Owner of what is known while a log is read."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lives: dict[int, _Life] = {}
        self._flying: deque[Submitted] = deque()
        self._heads: list[tuple[float, Waits | None]] = []  # who stood first in the queue, from when on
        self._now = 0.0

    def take(self, event: object) -> None:
        match event:
            case Arrived():
                self._now = event.at
                self._lives[event.id] = life = _Life(event)
                life.waits_from_head = len(self._heads)
            case Left():
                self._now = event.at
                self._left(event)
            case Decided():
                self._now = event.at
                for decision in event.decisions:
                    if isinstance(decision, Preempted):
                        self._preempted(self._lives.get(decision.id), decision.tokens, event.at, decision.by)
                    elif decision.runs:
                        self._left_out(decision, event.at)
                    else:
                        self._heads.append((event.at, decision))
            case Submitted():
                self._now = event.at
                self._submitted(event)
            case Returned():
                self._now = event.at
                if self._flying:
                    self._returned(self._flying.popleft(), event)

    def told(self) -> list[Story]:
        return [self._tell(life) for life in self._lives.values()]

    # -- what happens --------------------------------------------------------------------------------------------

    def _left(self, event: Left) -> None:
        life = self._lives.get(event.id)
        if life is None or life.end is not None:
            return
        self._ends_waiting(life, event.at)
        self._is_taken_in(life, event.at)
        life.finish("abort", event.at)
        if self._head is not None and self._head.id == event.id:
            self._heads.append((event.at, None))

    def _preempted(self, life: _Life | None, num_tokens: int, at: float, by: int | None) -> None:
        if life is None or life.end is not None or life.kind == "queue":  # let in, it never ran: it goes on waiting
            return
        self._is_taken_in(life, at)
        life.losses.append(Loss(at=at, by=by, tokens=num_tokens))
        life.reached = max(life.reached, num_tokens)
        life.sent = 0
        life.enter("lost", at)
        if life.waits_since is None:  # else it was let in for a moment, never ran, and goes on waiting
            life.waits_since, life.waits_from_head = at, len(self._heads)

    def _left_out(self, decision: Waits, at: float) -> None:
        life = self._lives.get(decision.id)
        if life is not None and life.end is None:
            self._is_taken_in(life, at)
            life.left_out = (at, decision)

    def _submitted(self, event: Submitted) -> None:
        self._flying.append(event)
        mates = Stretch(1, len(event.rows) - 1, len(event.rows) - 1)
        for id, start, count, _ in event.rows:
            life = self._lives.get(id)
            if life is None:
                continue
            if life.end is not None:
                life.stretches["burned"] = life.stretches.get("burned", Stretch()) + mates
                continue
            if start < life.sent:  # a log that does not tell of preemptions
                self._preempted(life, life.sent, life.latest, None)
            self._ends_waiting(life, event.at)
            self._is_taken_in(life, event.at)
            if life.began is None:
                life.began, life.cached = event.at, start if not life.event.done else 0
            if life.kind == "queue":
                life.enter("prefill", event.at)
            if life.losses and life.losses[-1].resumed is None:
                life.losses[-1] = msgspec.structs.replace(life.losses[-1], resumed=event.at)
            life.stretches[life.kind] = life.stretches.get(life.kind, Stretch()) + mates
            life.sent = start + count
        head = self._head
        if head is not None and any(row[0] == head.id for row in event.rows):
            self._heads.append((event.at, None))

    def _returned(self, batch: Submitted, event: Returned) -> None:
        stopped, failed = set(event.stopped), set(event.failed)
        for id, start, count, samples in batch.rows:
            life = self._lives.get(id)
            if life is None:
                continue
            if life.end is not None:
                if life.end in ("stop", "length"):
                    life.burned_until = event.at
                continue
            if id in failed:
                life.finish("error", event.at)
                continue
            life.generated += samples
            life.latest = event.at
            self._is_computed(life, start, start + count, event.at)
            if samples and life.first_token is None:
                life.first_token = event.at
            total = life.event.done + life.generated
            if id in stopped:
                life.finish("stop", event.at)
            elif total >= life.event.max_tokens and start + count >= life.event.prompt:
                life.finish("length", event.at)

    def _is_computed(self, life: _Life, start: int, end: int, at: float) -> None:
        has_token = life.generated + life.event.done > 0
        if life.kind == "lost":
            life.recomputed += max(0, min(end, life.reached) - start)
            if end <= life.reached:
                return
            if life.losses and life.losses[-1].caught_up is None:
                life.losses[-1] = msgspec.structs.replace(life.losses[-1], caught_up=at)
        if has_token and life.kind != "decode":
            life.enter("decode", at)
        elif life.kind == "lost":
            life.enter("prefill", at)

    # -- waiting -------------------------------------------------------------------------------------------------

    @property
    def _head(self) -> Waits | None:
        return self._heads[-1][1] if self._heads else None

    def _ends_waiting(self, life: _Life, at: float) -> None:
        """It is let in, or leaves."""
        if life.waits_since is not None:
            life.waits += self._cut(life, life.waits_since, at)
            life.waits_since = None

    def _is_taken_in(self, life: _Life, at: float) -> None:
        """Iterations go without it no longer."""
        if life.left_out is not None:
            begin, said = life.left_out
            life.left_out = None
            life.waits.append(
                Wait(begin=begin, end=at, why=said.why, blocks=said.blocks, holders=said.holders, is_left_out=True)
            )

    def _cut(self, life: _Life, begin: float, end: float) -> Iterator[Wait]:
        """A time in the queue, by what held up who stood first in it."""
        before = self._heads[life.waits_from_head - 1][1] if life.waits_from_head else None
        marks = [(begin, before), *self._heads[life.waits_from_head :], (end, None)]
        stretches = ((at, until, said) for (at, said), (until, _) in pairwise(marks) if until > at)
        nothing: Cause = "iteration" if self._log.header.version > 1 else "unknown"
        for why, group in groupby(stretches, lambda stretch: nothing if stretch[2] is None else stretch[2].why):
            of_one = list(group)
            first = of_one[0][2]
            before_it = [(until - at, said.id) for at, until, said in of_one if said and said.id != life.event.id]
            yield Wait(
                begin=of_one[0][0],
                end=of_one[-1][1],
                why=why,
                others=tuple(dict.fromkeys(id for _, id in before_it)),
                behind=sum(seconds for seconds, _ in before_it),
                blocks=first.blocks if first else 0,
                holders=first.holders if first else (),
                by=first.by if first else None,
            )

    # -- the end -------------------------------------------------------------------------------------------------

    def _tell(self, life: _Life) -> Story:
        event = life.event
        if life.end is None:  # the log ends first
            self._ends_waiting(life, self._now)
            self._is_taken_in(life, self._now)
            life.enter(life.kind, self._now)
        elif life.burned_until is not None and life.ended is not None:
            life.spans.append(Span("burned", life.ended, life.burned_until))
        return Story(
            id=event.id,
            name=event.name,
            prompt=event.prompt,
            max_tokens=event.max_tokens,
            done=event.done,
            arrived=life.arrived,
            began=life.began,
            first_token=life.first_token,
            ended=self._now if life.ended is None else life.ended,
            end=life.end,
            cached=life.cached,
            generated=life.generated,
            recomputed=life.recomputed,
            spans=tuple(life.spans),
            waits=tuple(life.waits),
            losses=tuple(life.losses),
            stretches=life.stretches,
        )
