"""`build`: from an operator's options to an executor that is ready to run, and what there is to say about it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.executors.distributed import DistributedExecutor, start_workers
from orcaserve.executors.loading import check_files, load_part, policy_of
from orcaserve.executors.local import LocalExecutor
from orcaserve.executors.measure import measure
from orcaserve.executors.placement import find_device
from orcaserve.worker.grammars import Grammars
from orcaserve.worker.machine import available_memory, usable_cpus
from orcaserve.worker.worker import Worker

if TYPE_CHECKING:
    from orcaserve.executors.device import DeviceExecutor

Progress = Callable[[str, int, int], None]
Lost = Callable[[str], None]


def build(
    options: EngineOptions, progress: Progress | None = None, on_lost: Lost | None = None
) -> tuple[LocalExecutor | DistributedExecutor | DeviceExecutor, EngineInfo]:
    """Loads the model and makes the KV cache, in this process or in a worker process for each rank.

    Sets torch's number of threads. progress: called with (what is being done, bytes done, bytes in all).
    on_lost: called from another thread, with the reason, once a worker is gone and nothing can come of the executor.
    Raises ModelError, in one line, if the model cannot be served; WorkerLost if a worker is gone before all are ready.
    """
    policy_of(options)
    device = find_device(options)
    is_shared = options.tensor_parallel * options.pipeline_parallel * options.nnodes > 1
    if device.type == "cuda":
        from orcaserve.executors.device import build_device  # Triton comes with it, an extra
        from orcaserve.executors.device_part import device_block

        options = msgspec.structs.replace(options, device="cuda", block_size=device_block(options.block_size))
        return start_workers(options, progress, on_lost) if is_shared else build_device(options, device, progress)
    available = available_memory(most=options.memory)
    if options.nnodes == 1:
        check_files(options, available)
    if is_shared:
        return start_workers(msgspec.structs.replace(options, device="cpu"), progress, on_lost)

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
