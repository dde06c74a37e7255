"""The parts that decoder layers are made of: each a frozen value with its weights, called with activations [M, H].

M is the number of tokens of an iteration; no row's result depends on the other rows, attention's on its own request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from orcaserve.model.architectures import Block
from orcaserve.ops.attention import attention, store_kv
from orcaserve.ops.layout import Layout
from orcaserve.ops.linear import Linear
from orcaserve.ops.norm import layer_norm, rms_norm
from orcaserve.ops.rotary import Rotary

Tensor = torch.Tensor
Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RMSNorm:
    weight: Tensor
    eps: float
    plus_one: bool

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, plus_one=self.plus_one)


@dataclass(frozen=True)
class LayerNorm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Separate:
    """q, k and v by three matrices: [M, H] -> [M, heads, d], [M, kv_heads, d] twice."""

    q: Linear
    k: Linear
    v: Linear
    head_dim: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q, self.k, self.v))
        return q, k, v


@dataclass(frozen=True)
class Stacked:
    """The same by one matrix, whose rows are those of q, then k, then v."""

    qkv: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = rows.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return q, k, v


@dataclass(frozen=True)
class PerHead:
    """The same by one matrix, whose rows are those of q, k and v of head 0, then of head 1 and so on."""

    qkv: Linear
    head_dim: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim)).unbind(2)
        return q, k, v


@dataclass(frozen=True)
class Attention:
    """Writes this iteration's keys and values to the cache, attends over what the cache then holds."""

    project: Separate | Stacked | PerHead
    q_norm: Part | None
    k_norm: Part | None
    rotary: Rotary | None
    out: Linear
    scale: float
    window: int | None
    softcap: float | None

    def __call__(self, x: Tensor, layout: Layout, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = self.project(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = _each_head(self.q_norm, q), _each_head(self.k_norm, k)
        if self.rotary is not None:
            q, k = self.rotary.rotate(q, layout.positions), self.rotary.rotate(k, layout.positions)
        store_kv(k, v, k_cache, v_cache, layout.slots)
        mixed = attention(q, k_cache, v_cache, layout, scale=self.scale, window=self.window, softcap=self.softcap)
        return self.out(mixed.flatten(1))


def _each_head(norm: Part, x: Tensor) -> Tensor:
    return norm(x.flatten(0, 1)).view(x.shape)


@dataclass(frozen=True)
class PlainMLP:
    up: Linear
    down: Linear
    activation: Part

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@dataclass(frozen=True)
class GatedMLP:
    gate: Linear
    up: Linear
    down: Linear
    activation: Part

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


@dataclass(frozen=True)
class FusedGatedMLP:
    gate_up: Linear
    down: Linear
    activation: Part

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each row goes through its `per_token` likeliest experts (ties to the lower index).

    Their results are summed in float32 in the order of the experts, whatever their weights, so that a row's bits
    depend on nothing but the row.
    """

    router: Linear
    experts: tuple[GatedMLP, ...]
    per_token: int
    normalise: bool

    def __call__(self, x: Tensor) -> Tensor:
        shares, chosen = self.route(x)
        mixed = torch.zeros(x.shape, dtype=torch.float32)
        for e in torch.unique(chosen).tolist():
            rows, place = torch.where(chosen == e)
            mixed[rows] += shares[rows, place, None] * self.experts[e](x[rows]).float()
        return mixed.to(x.dtype)

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
    mlp: Part
    attention_norm: Part
    mlp_norm: Part
    attention_out_norm: Part | None
    mlp_out_norm: Part | None

    def __call__(self, x: Tensor, layout: Layout, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        if self.block == "post":
            x = self.attention_norm(x + self.attention(x, layout, k_cache, v_cache))
            return self.mlp_norm(x + self.mlp(x))
        mixed = self.attention(self.attention_norm(x), layout, k_cache, v_cache)
        if self.block == "parallel":
            return self.mlp(self.mlp_norm(x)) + mixed + x
        x = x + (mixed if self.attention_out_norm is None else self.attention_out_norm(mixed))
        changed = self.mlp(self.mlp_norm(x))
        return x + (changed if self.mlp_out_norm is None else self.mlp_out_norm(changed))
