"""Ranks of one process: a `Group` whose members are threads. What they compute is what ranks of their own would."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from orcaserve.parallel.split import Split

Got = TypeVar("Got")


class ThreadGroup:
    def __init__(self, rank: int, slots: list[Tensor], barrier: threading.Barrier) -> None:
        self.split = Split(rank, len(slots))
        self._slots, self._barrier = slots, barrier

    def all_gather(self, x: Tensor) -> Tensor:
        self._slots[self.split.rank] = x
        self._barrier.wait(60)
        out = torch.stack(self._slots)
        self._barrier.wait(60)
        return out

    def gather(self, x: Tensor) -> Tensor | None:
        out = self.all_gather(x)
        return None if self.split.rank else out


def on_every_rank(size: int, run: Callable[[ThreadGroup], Got]) -> list[Got]:
    """What `run` gives on each of `size` ranks; the first error of one of them is raised."""
    slots, barrier = [torch.empty(0)] * size, threading.Barrier(size)

    def guarded(rank: int) -> Got:
        try:
            return run(ThreadGroup(rank, slots, barrier))
        except BaseException:
            barrier.abort()  # nobody waits for this one
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (real or errors)[0]
        return [future.result() for future in futures]
