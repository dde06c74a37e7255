"""`LocalExecutor`: the worker of this process's CPU; an iteration runs while it is submitted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.executors.checks import check_files
from orcaserve.executors.loading import load_part
from orcaserve.executors.measure import measure
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.machine import available_memory, usable_cpus
from orcaserve.worker.worker import Worker

Progress = Callable[[str, int, int], None]


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


def build_local(options: EngineOptions, progress: Progress | None = None) -> tuple[LocalExecutor, EngineInfo]:
    """Loads the whole model onto this process's CPU. Raises ModelError, in one line, if it cannot be served.

    Sets torch's number of threads.
    """
    available = available_memory(most=options.memory)
    check_files(options, available)
    threads = options.threads or usable_cpus()
    started = time.monotonic()
    part = load_part(
        options,
        available=available,
        threads=threads,
        progress=None if progress is None else lambda done, total: progress("weights", done, total),
    )
    loaded = time.monotonic()
    model, budget = part.model, part.budget
    grammars = Grammars(Path(options.model), model.config.vocab_size)
    read = time.monotonic()
    worker = Worker(
        model,
        num_blocks=budget.num_blocks,
        block_size=options.block_size,
        num_slots=budget.num_slots,
        swap_dir=options.swap_dir,
        grammars=grammars,
    )
    executor = LocalExecutor(worker)
    info = EngineInfo(
        architecture=model.config.architecture,
        dtype=part.dtype,
        vocab_size=model.config.vocab_size,
        max_model_len=budget.max_model_len,
        block_size=options.block_size,
        num_blocks=budget.num_blocks,
        profile=part.profile,
        deterministic=model.deterministic,
        swap=measure(
            executor,
            num_slots=budget.num_slots,
            num_blocks=budget.num_blocks,
            block_size=options.block_size,
            max_model_len=budget.max_model_len,
        ),
        threads=threads,
        budget=budget.lines,
        timings=(
            ("load weights", loaded - started),
            ("read vocabulary", read - loaded),
            ("make KV cache", time.monotonic() - read),
        ),
    )
    return executor, info
