"""`SimExecutor`: iterations that take the time a cost model says, on a virtual clock, so that hours run in seconds."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from orcaserve.core.batch import Batch, RowResult, StepResult


class VirtualClock:
    """Seconds that pass only when somebody waits. `now` is moved by SimExecutor and by whoever waits for arrivals."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, time: float) -> None:
        self.now = max(self.now, time)


class LinearCost(msgspec.Struct, frozen=True):
    """Seconds of an iteration: a constant (every weight is read once), and so much per token and per token attended.

    An iteration of few tokens is bound by reading the weights, one of many tokens by its operations; the sum bounds
    both from above and keeps the shape that decides between policies.
    """

    per_iteration: float
    per_token: float
    per_context: float = 0.0

    def __call__(self, batch: Batch) -> float:
        context = sum(row.num_tokens * (row.start + row.num_tokens) for row in batch.rows)
        return self.per_iteration + self.per_token * batch.num_tokens + self.per_context * context


class SimPending:
    """A simulated iteration that ends at `end` on the virtual clock."""

    def __init__(self, batch: Batch, end: float, clock: VirtualClock) -> None:
        self._batch = batch
        self._end = end
        self._clock = clock

    def result(self) -> StepResult:
        self._clock.advance_to(self._end)
        return StepResult(tuple(RowResult(id=row.id, token_id=0 if row.samples else None) for row in self._batch.rows))


class SimExecutor:
    """A device that runs one iteration after the other; every sampled token is 0. Owner of when it is free again."""

    def __init__(self, cost: Callable[[Batch], float], clock: VirtualClock) -> None:
        self._cost = cost
        self._clock = clock
        self._free_at = 0.0

    def submit(self, batch: Batch) -> SimPending:
        self._free_at = max(self._free_at, self._clock.now) + self._cost(batch)
        return SimPending(batch, self._free_at, self._clock)
