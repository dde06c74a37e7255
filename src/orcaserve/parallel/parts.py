"""The parts of a decoder that a tensor-parallel group computes together, on CPUs with the bits of a single rank.

What is cut along its outputs needs nothing: an output's sum does not know its neighbours. What is cut along K is the
tree over K's segments (design: the promise): each rank sums its own segments to a subtree, whose roots are exchanged
in float32 and summed by everyone in the tree's order. A plain all-reduce would sum them in an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from orcaserve.ops.kernels import AttentionHalf, Kernels, KVCache, MLPHalf, Norm
from orcaserve.ops.layout import Layout
from orcaserve.parallel.group import Group


@dataclass(frozen=True, eq=False)
class Join:
    """Float32 [M, N], this rank's part of a sum -> residual + norm(sum + bias), [M, N] of dtype, on every rank."""

    kernels: Kernels
    group: Group
    dtype: torch.dtype
    bias: Tensor | None
    norm: Norm | None

    def __call__(self, part: Tensor, residual: Tensor | None) -> Tensor:
        parts = self.group.all_gather(part)
        if self.norm is None:
            return self.kernels.join(parts, self.bias, residual, self.dtype)
        return self.norm(self.kernels.join(parts, self.bias, None, self.dtype), residual)


@dataclass(frozen=True, eq=False)
class SharedAttention:
    """`AttentionHalf` of which each rank computes some heads. half: gives this rank's part of the output's sum."""

    half: AttentionHalf
    join: Join

    def __call__(self, x: Tensor, layout: Layout, cache: KVCache, residual: Tensor | None) -> Tensor:
        return self.join(self.half(x, layout, cache, None), residual)


@dataclass(frozen=True, eq=False)
class SharedMLP:
    """`MLPHalf` of which each rank computes some inner values. half: gives this rank's part of the output's sum."""

    half: MLPHalf
    join: Join

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.join(self.half(x), residual)


@dataclass(frozen=True, eq=False)
class SharedEmbedding:
    """Ids [M] -> [M, H], each row from the rank that has it.

    rows: of this rank's part of a vocabulary that lies in parts as `Split.padded` makes them.
    """

    rows: Callable[[Tensor], Tensor]
    vocab_size: int
    group: Group

    def __call__(self, ids: Tensor) -> Tensor:
        split = self.group.split
        first, last = split.padded(self.vocab_size)
        mine = (ids - first).clamp(0, max(0, last - first - 1))
        # Chosen, not summed: the zeros of the others would turn -0 into 0.
        owner = ids // split.width(self.vocab_size)
        return self.group.all_gather(self.rows(mine))[owner, torch.arange(ids.shape[0], device=ids.device)]


@dataclass(frozen=True, eq=False)
class SharedHead:
    """[R, H] -> float32 logits [R, V] on rank 0, None on the others; the vocabulary lies as in `SharedEmbedding`."""

    matrix: Callable[[Tensor], Tensor]
    vocab_size: int
    group: Group

    def __call__(self, hidden: Tensor) -> Tensor | None:
        own = self.matrix(hidden)
        width = self.group.split.width(self.vocab_size)
        parts = self.group.gather(functional.pad(own, (0, width - own.shape[1])))
        return None if parts is None else parts.transpose(0, 1).flatten(1)[:, : self.vocab_size].contiguous()
