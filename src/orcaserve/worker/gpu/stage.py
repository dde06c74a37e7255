"""`DeviceStage`: one rank of several, each with a device of its own. Called batch by batch, as `StageWorker` is."""

from __future__ import annotations

from collections import deque

from orcaserve.core.batch import Batch, StepResult
from orcaserve.worker.gpu.worker import DevicePending, DeviceWorker


class DeviceStage:
    """Owner of a rank's DeviceWorker.

    answers: whether its results are asked for. Else it puts the next iterations on the stream while its device still
    works on this one: stages wait for each other there, not here. in_flight: as the worker has it.
    """

    def __init__(self, worker: DeviceWorker, *, answers: bool, in_flight: int) -> None:
        self._worker = worker
        self._answers = answers
        self._in_flight = in_flight
        self._pending: deque[DevicePending] = deque()

    @property
    def busy_seconds(self) -> float:
        """Of the device, waiting for the stage before included."""
        return self._worker.busy_seconds

    def take_seconds(self) -> tuple[float, ...]:
        """None: a GPU's iterations overlap."""
        return ()

    def expect(self, batch: Batch) -> None:
        """Nothing: what a GPU receives, it asks for in the order of its stream."""

    def run(self, batch: Batch) -> StepResult | None:
        """One iteration; its results, if they are asked for."""
        pending = self._worker.submit(batch)
        if self._answers:
            return pending.result()
        self._pending.append(pending)
        if len(self._pending) == self._in_flight:
            self._pending.popleft().result()
        return None
