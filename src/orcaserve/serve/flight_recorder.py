"""`FlightRecorder`: a few bytes of memory that outlive the engine process and say which requests it was running.

The frontend makes the recorder and the engine process inherits it. The engine writes before it runs, so that whoever
brings it down has been written down first.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Iterable

from orcaserve.core.batch import Batch, StepResult
from orcaserve.engine.executor import Executor, Pending


class FlightRecorder:
    """Request ids in a shared file without a name. Owns its file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> FlightRecorder:
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("orcaserve-flight-recorder"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def write(self, ids: Iterable[int]) -> None:
        """Replaces what was written. One system call, so that a death leaves the old record or the new one."""
        ids = tuple(ids)
        os.pwrite(self.fd, b"".join(number.to_bytes(8, "little") for number in (len(ids), *ids)), 0)

    def read(self) -> tuple[int, ...]:
        data = os.pread(self.fd, os.fstat(self.fd).st_size, 0)
        numbers = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
        return tuple(numbers[1 : 1 + numbers[0]]) if numbers else ()

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
        self._recorder.write(row.id for flying in self._in_flight for row in flying.rows)
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
