"""The parts that decoder layers are made of: each a frozen value with its weights, called with activations [M, H].

M is the number of tokens of an iteration; no row's result depends on the other rows, attention's on its own request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from orcaserve.model.architectures import Block
from orcaserve.ops.kernels import Heads, Kernels, KVCache, Linear, Part
from orcaserve.ops.layout import Layout

Tensor = torch.Tensor
Inner = Callable[[Tensor], Tensor]
MLP = Callable[[Tensor, Tensor | None], Tensor]  # (x, residual) -> their sum, if there is a residual


@dataclass(frozen=True)
class Attention:
    """Writes this iteration's keys and values to the cache, attends over what the cache then holds."""

    kernels: Kernels
    qkv: Linear
    heads: Heads
    out: Linear
    scale: float
    window: int | None
    softcap: float | None

    def __call__(self, x: Tensor, layout: Layout, cache: KVCache, residual: Tensor | None = None) -> Tensor:
        q = self.heads(self.qkv(x), layout, cache)
        mixed = self.kernels.attention(q, cache, layout, scale=self.scale, window=self.window, softcap=self.softcap)
        return self.out(mixed, residual)


@dataclass(frozen=True)
class DenseMLP:
    """inner: activation(up(x)), or activation(gate(x)) * up(x)."""

    inner: Inner
    down: Linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.down(self.inner(x), residual)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each row goes through its `per_token` likeliest experts (ties to the lower index).

    Their results are summed in float32 in the order of the experts, whatever their weights, so that a row's bits
    depend on nothing but the row.
    """

    router: Linear
    experts: tuple[DenseMLP, ...]
    per_token: int
    normalise: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        shares, chosen = self.route(x)
        mixed = torch.zeros(x.shape, dtype=torch.float32)
        for e in torch.unique(chosen).tolist():
            rows, place = torch.where(chosen == e)
            mixed[rows] += shares[rows, place, None] * self.experts[e](x[rows]).float()
        return (mixed if residual is None else mixed + residual).to(x.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares float32[M, per_token] and indices int64[M, per_token] of each row's experts, likeliest first."""
        likely = torch.softmax(self.router(x).float(), dim=-1)
        ordered, experts = torch.sort(likely, dim=-1, descending=True, stable=True)
        shares, chosen = ordered[:, : self.per_token], experts[:, : self.per_token]
        if self.normalise:
            total = shares[:, 0]
            for j in range(1, self.per_token):  # a fixed order, which a sum over the dimension would not promise
                total = total + shares[:, j]
            shares = shares / total[:, None]
        # Rounded as the model was trained.
        return shares.to(x.dtype).float(), chosen


@dataclass(frozen=True)
class Layer:
    """One layer, as its architecture's row shapes it; a norm that the row lacks is None."""

    block: Block
    attention: Attention
    mlp: MLP
    attention_norm: Part
    mlp_norm: Part
    attention_out_norm: Part | None
    mlp_out_norm: Part | None

    def __call__(self, x: Tensor, layout: Layout, cache: KVCache) -> Tensor:
        if self.block == "post":
            x = self.attention_norm(self.attention(x, layout, cache, x))
            return self.mlp_norm(self.mlp(x, x))
        normed = self.attention_norm(x)
        if self.block == "parallel":
            return self.mlp(self.mlp_norm(x), self.attention(normed, layout, cache, x))
        if self.attention_out_norm is None:
            x = self.attention(normed, layout, cache, x)
        else:
            x = x + self.attention_out_norm(self.attention(normed, layout, cache))
        normed = self.mlp_norm(x)
        if self.mlp_out_norm is None:
            return self.mlp(normed, x)
        return x + self.mlp_out_norm(self.mlp(normed, None))
