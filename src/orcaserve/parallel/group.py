"""`Group`: the ranks that share a stage's layers, and what they tell each other. Tensors of one shape on all ranks."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from orcaserve.parallel.split import Split

try:
    from orcaserve.ops import _native
except ImportError:  # installed without a compiler
    _native = None

_TURN_BYTES = 256 << 10  # that a rank passes at a time through shared memory: two turns of all ranks fit into a cache


class Group(Protocol):
    """Every rank makes the same calls in the same order. split: which of them this rank is."""

    @property
    def split(self) -> Split: ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[…] of each rank -> [size, …] on every rank."""
        ...

    def gather(self, x: Tensor) -> Tensor | None:
        """[…] of each rank -> [size, …] on rank 0, None on the others."""
        ...


class Alone:
    """A group of one."""

    split = Split()

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]

    def gather(self, x: Tensor) -> Tensor | None:
        return x[None]


class TorchGroup:
    """A process group of torch.distributed. It moves bytes, so that every dtype will do."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.split = Split(group.rank(), group.size())

    def all_gather(self, x: Tensor) -> Tensor:
        out = torch.empty((self.split.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.all_gather([_bytes(part) for part in out], _bytes(x), group=self._group)
        return out

    def gather(self, x: Tensor) -> Tensor | None:
        if self.split.rank:
            dist.gather(_bytes(x), None, group=self._group, group_dst=0)
            return None
        out = torch.empty((self.split.size, *x.shape), dtype=x.dtype, device=x.device)
        dist.gather(_bytes(x), [_bytes(part) for part in out], group=self._group, group_dst=0)
        return out


class SharedGroup:
    """Ranks of one host, on a CPU: they exchange bytes through memory that they share, by the threads that compute.

    Whoever is first looks for the others for some fifty microseconds, and sleeps then.
    """

    def __init__(self, file: int, rank: int, size: int) -> None:
        """file: as in `World`; raises OSError if there is no memory."""
        self._exchange = _native.Exchange(file, rank, size, _TURN_BYTES)
        self.split = Split(rank, size)

    def all_gather(self, x: Tensor) -> Tensor:
        out = torch.empty((self.split.size, *x.shape), dtype=x.dtype)
        self._pass(x, out)
        return out

    def gather(self, x: Tensor) -> Tensor | None:
        if self.split.rank:
            return self._pass(x, None)
        return self.all_gather(x)

    def _pass(self, x: Tensor, out: Tensor | None) -> None:
        mine = x.contiguous()
        self._exchange.gather(mine.data_ptr(), mine.nbytes, 0 if out is None else out.data_ptr())


def can_share() -> bool:
    """Whether there is a SharedGroup here: it is part of the compiled extension."""
    return _native is not None


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
