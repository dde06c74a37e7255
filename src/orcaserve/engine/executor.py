"""`Executor`: whoever can run one iteration. One method, so that a fake is a page long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.request import NewRequest


class WorkerLost(RuntimeError):
    """A worker of an executor died or froze, and with it whatever was in flight."""


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


class Preparing(Protocol):
    """Whoever compiles grammars beside the iterations, so that no iteration has to. Any thread may call."""

    def prepare(self, request: NewRequest, ready: Callable[[], None]) -> None:
        """Compiles a request's grammar, and keeps it until `release`; then calls `ready`, in any thread.

        If it cannot be compiled the request is ready, too: its row says what is wrong.
        """
        ...

    def release(self, id: int) -> None:
        """The request has ended, or is not wanted any more: `ready` may be called or not. Other ids are ignored."""
        ...


@runtime_checkable
class Guided(Protocol):
    """An executor whose requests may follow grammars. A request that is not prepared holds up its first iteration."""

    @property
    def grammars(self) -> Preparing | None:
        """None: no request can follow any."""
        ...


class Executor(Protocol):
    """Runs batches in the order in which they are submitted."""

    def submit(self, batch: Batch) -> Pending:
        """Starts one iteration. Must not raise for what a single row does wrong: that is `RowResult.error`."""
        ...
