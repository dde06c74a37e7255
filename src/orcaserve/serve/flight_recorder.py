"""`FlightRecorder`: a few bytes of memory that outlive the engine process and say which requests it was running.

The frontend makes the recorder and the engine process inherits it. The engine writes before it acts, so that whoever
brings it down has been written down first, and nobody of whom it had not even heard is blamed for it.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterable

import msgspec

from orcaserve.core.batch import Batch, StepResult
from orcaserve.engine.executor import Executor, Pending

_NUMBER = 8  # bytes


class Record(msgspec.Struct, frozen=True):
    """What an engine had been doing. Engine ids rise in the order of submission.

    heard: the highest id of a request that had arrived, 0 if there was none. in_flight: requests of its last batches.
    """

    heard: int = 0
    in_flight: tuple[int, ...] = ()


class FlightRecorder:
    """A record in a shared file without a name. Owns its file descriptor.

    Each write is one system call into a place of its own, so that threads may write both, and a death leaves the old
    record or the new one.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> FlightRecorder:
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("orcaserve-flight-recorder"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def hear(self, id: int) -> None:
        """A request has arrived; before the first, 0: from here on nothing is done without being recorded."""
        os.pwrite(self.fd, _bytes(id), 0)

    def fly(self, ids: Iterable[int]) -> None:
        """These are in the batches in flight. They replace those that were."""
        numbers = [_bytes(id) for id in ids]
        os.pwrite(self.fd, b"".join([_bytes(len(numbers)), *numbers]), _NUMBER)

    def read(self) -> Record | None:
        """None: nobody has kept a record, so that nothing is known."""
        data = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        numbers = [int.from_bytes(data[at : at + _NUMBER], "little") for at in range(0, len(data), _NUMBER)]
        if len(numbers) < 2:
            return Record(numbers[0]) if numbers else None
        heard, count, *ids = numbers
        return Record(heard, tuple(ids[:count]))

    def close(self) -> None:
        os.close(self.fd)


class RecordingExecutor:
    """An executor that writes every batch down before the executor behind it runs it.

    The record is not wiped when a batch comes back: who brings the loop down right after an iteration is a suspect too.
    """

    def __init__(self, executor: Executor, recorder: FlightRecorder) -> None:
        self._executor = executor
        self._recorder = recorder
        self._in_flight: deque[Batch] = deque()
        self.num_tokens = 0  # tokens of the batches in flight; the heart-beat thread reads it

    def submit(self, batch: Batch) -> Pending:
        self._in_flight.append(batch)
        self._recorder.fly(row.id for flying in self._in_flight for row in flying.rows)
        self.num_tokens += batch.num_tokens
        return _Landing(self, self._executor.submit(batch))

    def landed(self) -> None:
        self.num_tokens -= self._in_flight.popleft().num_tokens


class _Landing:
    """A batch under way, which tells the recording executor when it comes back."""

    def __init__(self, owner: RecordingExecutor, pending: Pending) -> None:
        self._owner = owner
        self._pending = pending

    def result(self) -> StepResult:
        result = self._pending.result()
        self._owner.landed()
        return result


def _bytes(number: int) -> bytes:
    return number.to_bytes(_NUMBER, "little")
