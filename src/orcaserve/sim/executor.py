"""`SimExecutor`: iterations that take the time a cost model says, on a virtual clock, so that hours run in seconds."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.sim.cost import Seconds


class VirtualClock:
    """Seconds that pass only when somebody waits. `now` is moved by SimExecutor and by whoever waits for arrivals."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance_to(self, time: float) -> None:
        if time > self.now:
            self.now = time


class LinearCost(msgspec.Struct, frozen=True):
    """Seconds of an iteration: a constant (every weight is read once), and so much per token and per token attended.

    An iteration of few tokens is bound by reading the weights, one of many tokens by its operations; the sum bounds
    both from above and keeps the shape that decides between policies.
    """

    per_iteration: float
    per_token: float
    per_context: float = 0.0

    def __call__(self, batch: Batch) -> Seconds:
        context = sum(row.num_tokens * (row.start + row.num_tokens) for row in batch.rows)
        return (self.per_iteration + self.per_token * batch.num_tokens + self.per_context * context,)


class SimPending:
    """A simulated iteration. spans: when it is in each stage, on the virtual clock."""

    def __init__(self, executor: SimExecutor, batch: Batch, spans: tuple[tuple[float, float], ...]) -> None:
        self._executor = executor
        self._batch = batch
        self.spans = spans

    def result(self) -> StepResult:
        self._executor.clock.advance_to(self.spans[-1][1])
        sample = self._executor.sample
        return StepResult(
            tuple(
                [
                    RowResult(id=row.id, token_id=sample(row.id, row.start + row.num_tokens) if row.samples else None)
                    for row in self._batch.rows
                ]
            )
        )


class SimExecutor:
    """Stages, each of which runs one iteration after the other. Owner of when they are free again.

    cost: seconds of a batch in every stage; always as many stages. host: seconds that pass before a batch is submitted.
    sample: the token at a position of a request. copy_seconds: of a KV block that is swapped out or in, shared out over
    the stages, each of which copies its own layers before it computes.
    """

    def __init__(
        self,
        cost: Callable[[Batch], Seconds],
        clock: VirtualClock,
        host: Callable[[Batch], float] | None = None,
        sample: Callable[[int, int], int] = lambda id, position: 0,
        copy_seconds: float = 0.0,
    ) -> None:
        self.clock = clock
        self.sample = sample
        self._copy_seconds = copy_seconds
        self._cost = cost
        self._host = host
        self._free_at: list[float] = []

    def submit(self, batch: Batch) -> SimPending:
        clock = self.clock
        if self._host is not None:
            clock.now += self._host(batch)
        seconds = self._cost(batch)
        free_at = self._free_at
        if not free_at:
            free_at.extend([0.0] * len(seconds))
        copying = self._copy_seconds * sum([len(swap.blocks) for swap in batch.swaps]) / len(seconds)
        end = clock.now
        spans = []
        for stage, length in enumerate(seconds):
            start = free_at[stage]
            if start < end:
                start = end
            end = free_at[stage] = start + copying + length
            spans.append((start, end))
        return SimPending(self, batch, tuple(spans))
