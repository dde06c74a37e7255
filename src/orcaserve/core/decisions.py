"""`Decisions`: what a scheduler decides against requests, and why, for whoever listens. Only changes are told."""

from __future__ import annotations

from typing import Literal

import msgspec

Reason = Literal["rows", "tokens", "blocks", "memory", "preemption", "closed", "shape", "prefix", "yields"]


class Waits(msgspec.Struct, frozen=True, kw_only=True, tag="waits", omit_defaults=True):
    """A request is not in the iteration that is being made, and was not for this reason in the one before.

    why: "rows": as many requests as may are. "tokens": the iteration's tokens are given out.
        "blocks": KV blocks lack, so many (`blocks`); of those that run `holders` have most, as (request, blocks).
        "memory": the request `by`, which runs, lacks blocks itself, and nobody is let in before it has them.
        "preemption": blocks have just been taken away, for the request `by` and not for one that waits.
        "closed": a request-level batch goes on until its last member ends.
        "shape": it cannot be stacked with the batch's first row.
        "prefix": one that runs is computing the beginning of its prompt, which it will find in the cache.
        "yields": it does not go ahead, so that the request `by` can have its KV when it is in no batch.
    runs: it has KV and was left out of this one iteration. Else it is the first in the queue, and whoever waits behind
        it waits for the same reason.
    """

    id: int
    why: Reason
    runs: bool = False
    blocks: int = 0
    holders: tuple[tuple[int, int], ...] = ()
    by: int | None = None


class Preempted(msgspec.Struct, frozen=True, kw_only=True, tag="preempted"):
    """A request's KV was taken away for the sake of the request `by`. tokens: whose K and V are lost."""

    id: int
    by: int
    tokens: int


Decision = Waits | Preempted


class Decisions:
    """A scheduler's decisions since they were last taken. Owner of what has been told, so that it is told once.

    Within one `Scheduler.schedule` it is told of all that happens; `seal` ends that. lacking: the running request for
    which this call found no memory, and for whom it last preempted another.
    """

    def __init__(self) -> None:
        self.lacking: int | None = None
        self.preempted_for: int | None = None
        self._told: dict[int, Reason] = {}  # who was left out by the call before
        self._left_out: dict[int, Reason] = {}  # and who is by this one
        self._new: list[Decision] = []

    def preempted(self, id: int, by: int, num_tokens: int) -> None:
        self.preempted_for = by
        self._new.append(Preempted(id=id, by=by, tokens=num_tokens))

    def waits(self, decision: Waits) -> None:
        self._left_out[decision.id] = decision.why
        if self._told.get(decision.id) != decision.why:
            self._new.append(decision)

    def lacks(self, id: int, num_blocks: int) -> None:
        """A running request gets no memory now."""
        self.lacking = id
        self.waits(Waits(id=id, why="blocks", runs=True, blocks=num_blocks))

    def is_left_out(self, id: int) -> bool:
        """Whether this call has said so already."""
        return id in self._left_out

    def seal(self) -> None:
        """The iteration is made."""
        self._told, self._left_out = self._left_out, {}
        self.lacking = self.preempted_for = None

    def take(self) -> tuple[Decision, ...]:
        """All since the last call, in order."""
        if not self._new:
            return ()
        taken = tuple(self._new)
        self._new.clear()
        return taken
