"""`build`: from an operator's options to an executor that is ready to run, and what there is to say about it.

Only what computes in this process is imported, and torch with it: where ranks compute, this process needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.executors.checks import check_files, policy_of
from orcaserve.executors.distributed import DistributedExecutor, start_workers
from orcaserve.executors.placement import find_device
from orcaserve.worker.machine import available_memory
from orcaserve.worker.process import uncollected

if TYPE_CHECKING:
    from orcaserve.executors.device import DeviceExecutor
    from orcaserve.executors.local import LocalExecutor

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
    kind = find_device(options)
    is_shared = options.tensor_parallel * options.pipeline_parallel * options.nnodes > 1
    if kind == "cuda":
        import torch

        from orcaserve.executors.device import build_device  # Triton comes with it, an extra
        from orcaserve.executors.device_part import device_block

        options = msgspec.structs.replace(options, device="cuda", block_size=device_block(options.block_size))
        if is_shared:
            return start_workers(options, progress, on_lost)
        return build_device(options, torch.device("cuda", torch.cuda.current_device()), progress)
    if is_shared:
        if options.nnodes == 1:
            check_files(options, available_memory(most=options.memory))
        return start_workers(msgspec.structs.replace(options, device="cpu"), progress, on_lost)
    with uncollected("torch"):
        from orcaserve.executors.local import build_local

    return build_local(options, progress)
