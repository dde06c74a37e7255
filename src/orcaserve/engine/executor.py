"""`Executor`: whoever can run one iteration. One method, so that a fake is a page long."""

from __future__ import annotations

from typing import Protocol

from orcaserve.core.batch import Batch, StepResult


class Pending(Protocol):
    """An iteration under way."""

    def result(self) -> StepResult:
        """Waits for the iteration to end and gives its results; called once."""
        ...


class Executor(Protocol):
    """Runs batches in the order in which they are submitted."""

    def submit(self, batch: Batch) -> Pending:
        """Starts one iteration. Must not raise for what a single row does wrong: that is `RowResult.error`."""
        ...
