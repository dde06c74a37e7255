"""`drive_in_turn`: a workload under several setups at once, an iteration here and an iteration there.

Each goes by a clock that stands still while it is another's turn. A machine whose pace changes from minute to minute
does so to all of them alike, and their ratios stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from orcaserve.bench.client import BenchError
from orcaserve.bench.paper.drive import Run, Trial, drive
from orcaserve.bench.paper.engine import Engine, Setup
from orcaserve.bench.workloads import Work
from orcaserve.core.batch import Batch, StepResult
from orcaserve.engine.executor import Executor, Pending


def drive_in_turn(
    engine: Engine, work: Work, setups: Sequence[Setup], on_end: Callable[[], None] = lambda: None
) -> list[Trial]:
    """Runs a workload once under each setup, in turn: whose requests have got the least of their tokens goes next.

    Each has KV memory of its own. Where an iteration may still run while the next is scheduled, or KV is swapped, one
    goes after the other: nobody's time could be told from another's. Raises BenchError as `drive`, and where the
    memory is too small for all.
    """
    if engine.overlap or any(setup.swap or setup.depth > 1 for setup in setups):
        return [drive(engine, work, setup, on_end) for setup in setups]
    configs = [setup.config(engine) for setup in setups]
    if (total := sum(config.num_blocks for config in configs)) > engine.num_blocks:
        raise BenchError(
            f"{', '.join(setup.name for setup in setups)} are to use KV memory for {total * engine.block_size} tokens "
            f"together, but the machine has room for {engine.num_slots} beside this model: take a smaller one"
        )
    engine.device.forget_all()
    runs, first = list[Run](), 0
    for setup, config in zip(setups, configs, strict=True):
        share = _Share(engine.device, first, len(runs), len(setups))
        runs.append(Run(engine, work, setup, config, share, on_end))
        first += config.num_blocks
    while still := [run for run in runs if run.is_open]:
        min(still, key=lambda run: run.progress).step()
    return [run.trial() for run in runs]


class _Share:
    """One run's part of a device that others use too: blocks from `first` on, and every `of`-th id."""

    def __init__(self, device: Executor, first: int, place: int, of: int) -> None:
        self._device = device
        self._first, self._place, self._of = first, place, of

    def submit(self, batch: Batch) -> Pending:
        return _Shared(self, self._device.submit(self._theirs(batch)))

    def _theirs(self, batch: Batch) -> Batch:
        replace = msgspec.structs.replace
        return replace(
            batch,
            rows=tuple(
                replace(row, id=self._id(row.id), new_blocks=tuple([self._first + block for block in row.new_blocks]))
                for row in batch.rows
            ),
            new=tuple(replace(new, id=self._id(new.id)) for new in batch.new),
            freed=tuple(map(self._id, batch.freed)),
        )

    def _id(self, own: int) -> int:
        return own * self._of + self._place

    def ours(self, result: StepResult) -> StepResult:
        return StepResult(tuple(msgspec.structs.replace(row, id=row.id // self._of) for row in result.rows))


class _Shared:
    def __init__(self, share: _Share, pending: Pending) -> None:
        self._share, self._pending = share, pending

    def result(self) -> StepResult:
        return self._share.ours(self._pending.result())
