"""`LocalExecutor`: the worker of one device inside the calling process; an iteration runs while it is submitted."""

from __future__ import annotations

from dataclasses import dataclass

from orcaserve.core.batch import Batch, StepResult
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Finished:
    """A `Pending` that has nothing to wait for."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


class LocalExecutor:
    """Owner of one Worker."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def grammars(self) -> Grammars | None:
        return self._worker.grammars

    def submit(self, batch: Batch) -> Finished:
        return Finished(self._worker.run(batch))

    def forget_all(self) -> None:
        """Makes ready for a new scheduler over the same model and KV tensors."""
        self._worker.forget_all()
