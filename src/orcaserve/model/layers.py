"""The parts that decoder layers are made of: each a frozen value with its weights, called with activations [M, H].

M is the number of tokens of an iteration; no row's result depends on the other rows, attention's on its own request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orcaserve.ops.kernels import AttentionHalf, KVCache, Linear, MLPHalf, Part
from orcaserve.ops.layout import Layout
from orcaserve.parallel.group import Group

Tensor = torch.Tensor


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a row, normed, goes through its `per_token` likeliest experts (ties to the lower index).

    Their results are summed in float32 in the order of the experts, whatever their weights, so that a row's bits
    depend on nothing but the row. Each rank of the group has some of the experts whole.

    experts: of this rank, by number. owner: the rank of each of all experts.
    """

    norm: Part | None
    router: Linear
    experts: dict[int, MLPHalf]
    owner: tuple[int, ...]
    per_token: int
    normalise: bool
    group: Group

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        shares, chosen = self.route(x)
        own = x.new_zeros((x.shape[0], self.per_token, x.shape[1]))
        for e in torch.unique(chosen).tolist():
            if e in self.experts:
                rows, place = torch.where(chosen == e)
                own[rows, place] = self.experts[e](x[rows])
        rows = torch.arange(x.shape[0], device=x.device)
        owner = torch.tensor(self.owner, device=x.device)[chosen]
        every = self.group.all_gather(own)
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for place in chosen.argsort(dim=1).unbind(1):
            mixed += shares[rows, place, None] * every[owner[rows, place], rows, place].float()
        return (mixed if residual is None else mixed + residual).to(x.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shares float32[M, per_token] and indices int64[M, per_token] of each normed row's experts, best first."""
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
    """One layer of two halves, each with its own norms.

    parallel: both halves read the layer's input. after_attention, after_mlp: norms of the sum with the residual.
    """

    parallel: bool
    attention: AttentionHalf
    mlp: MLPHalf
    after_attention: Part | None
    after_mlp: Part | None

    def __call__(self, x: Tensor, layout: Layout, cache: KVCache) -> Tensor:
        mixed = self.attention(x, layout, cache, x)
        if self.parallel:
            return self.mlp(x, mixed)
        if self.after_attention is not None:
            mixed = self.after_attention(mixed)
        out = self.mlp(mixed, mixed)
        return out if self.after_mlp is None else self.after_mlp(out)
