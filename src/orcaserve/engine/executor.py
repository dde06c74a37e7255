"""`Executor`: whoever can run one iteration. One method, so that a fake is a page long."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from orcaserve.core.batch import Batch, StepResult


class Pending(Protocol):
    """An iteration under way."""

    def result(self) -> StepResult:
        """Waits for the iteration to end and gives its results; called once."""
        ...


@runtime_checkable
class Timekeeping(Protocol):
    """An executor that knows how long each of its ranks has worked."""

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Of each rank, so far, stage by stage; not in waiting for another. Any thread may ask."""
        ...


class Executor(Protocol):
    """Runs batches in the order in which they are submitted."""

    def submit(self, batch: Batch) -> Pending:
        """Starts one iteration. Must not raise for what a single row does wrong: that is `RowResult.error`."""
        ...
