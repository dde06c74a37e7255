"""`Group`: the ranks that share a stage's layers, and what they tell each other. Tensors of one shape on all ranks."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from orcaserve.parallel.split import Split


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


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
