"""`EndsAt`: requests end after so many tokens without the scheduler knowing it before, as with a real end token."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult
from orcaserve.engine.executor import Executor, Pending

END, ANOTHER = 0, 1  # ids that every vocabulary has


class EndsAt:
    """An executor that computes all that another does, but says END at a request's last token and only there.

    The other is told what it sampled itself. Owner of how many tokens each request has been given, and of those that
    the other has not been told. lengths: tokens to generate, by request. Such a request names END as its end token and
    a max_tokens that is no less.
    """

    def __init__(self, executor: Executor, lengths: Mapping[int, int]) -> None:
        self._executor = executor
        self._left = dict(lengths)
        self._untold: dict[int, list[int]] = {}

    def submit(self, batch: Batch) -> Pending:
        for new in batch.new:
            self._untold[new.id] = []
        rows = tuple(self._tell(row) if row.token_ids else row for row in batch.rows)
        return _Ending(self, self._executor.submit(msgspec.structs.replace(batch, rows=rows)))

    def _tell(self, row: ScheduledRequest) -> ScheduledRequest:
        untold, count = self._untold[row.id], len(row.token_ids)
        self._untold[row.id] = untold[count:]
        return msgspec.structs.replace(row, token_ids=tuple(untold[:count]))

    def end(self, row: RowResult) -> RowResult:
        """A row's result with the token that it is to have."""
        if row.token_id is None:
            return row
        self._untold.setdefault(row.id, []).append(row.token_id)
        self._left[row.id] -= 1
        if self._left[row.id] == 0:
            return msgspec.structs.replace(row, token_id=END)
        return msgspec.structs.replace(row, token_id=ANOTHER) if row.token_id == END else row


class _Ending:
    def __init__(self, ends: EndsAt, pending: Pending) -> None:
        self._ends, self._pending = ends, pending

    def result(self) -> StepResult:
        return StepResult(tuple(map(self._ends.end, self._pending.result().rows)))
