"""`TorchKernels`: the slow twin of the native kernels, of torch's operators; for tests and for want of a compiler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orcaserve.core.config import KVDtype
from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.attention import Cache, ScaledBytes, attention, store_kv
from orcaserve.ops.draw import Draw, draw
from orcaserve.ops.halves import ComposedAttention, ComposedMLP
from orcaserve.ops.kernels import Heads, Linear, Norm, Part
from orcaserve.ops.layout import Layout
from orcaserve.ops.linear import TileLinear, embedding
from orcaserve.ops.norm import layer_norm, rms_norm
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.tree import join
from orcaserve.ops.vocabulary import Logprobs, logprobs, peaks


@dataclass(frozen=True, eq=False, slots=True)
class TorchCache:
    """k, v: [num_blocks, block_size, kv heads, d]."""

    k: Cache
    v: Cache

    def block_bytes(self) -> list[Tensor]:
        tensors = []
        for cache in (self.k, self.v):
            tensors += [cache.values, cache.scales] if isinstance(cache, ScaledBytes) else [cache]
        return [tensor.flatten(1).view(torch.uint8) for tensor in tensors]


@dataclass(frozen=True, eq=False, slots=True)
class TorchLinear:
    parts: tuple[TileLinear, ...]
    activation: Part | None
    wide: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.parts[0](x) if len(self.parts) == 1 else torch.cat([part(x) for part in self.parts], dim=1)
        if self.activation is not None:
            out = self.activation(out)
        if residual is not None:
            out = out + residual
        return out.float() if self.wide else out

    def rows(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.parts[0].weight)


@dataclass(frozen=True, eq=False, slots=True)
class TorchHeads:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: Part | None
    k_norm: Part | None
    rotary: Rotary | None

    def __call__(self, qkv: Tensor, layout: Layout, cache: TorchCache) -> Tensor:
        rows = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = rows.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = self._place(q, self.q_norm, layout), self._place(k, self.k_norm, layout)
        store_kv(k, v, cache.k, cache.v, layout.slots)
        return q.flatten(1)

    def _place(self, x: Tensor, norm: Part | None, layout: Layout) -> Tensor:
        if norm is not None:
            x = norm(x.flatten(0, 1)).view(x.shape)
        return x if self.rotary is None else self.rotary.rotate(x, layout.positions)


class TorchKernels:
    """`Kernels` of torch's operators on tiles of fixed shapes. kv_dtype: "int8" keeps keys and values in 8 bits."""

    block_multiple = 1
    is_quantised = False
    device = torch.device("cpu")
    deterministic = True

    def __init__(self, *, kv_dtype: KVDtype = "auto") -> None:
        self.matrix_bytes = 0
        self.kv_dtype = kv_dtype
        self.name = "torch-2" + ("" if kv_dtype == "auto" else f"-kv-{kv_dtype}")

    def linear(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        activation: str | None = None,
        cut: bool = False,
        wide: bool = False,
        exact: bool = False,
    ) -> TorchLinear:
        parts = tuple(self._tiles(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return TorchLinear(parts, None if activation is None else ACTIVATIONS[activation], wide)

    def partial(self, weight: Tensor, part_of: int) -> TorchLinear:
        raise ValueError("torch's operators sum K in one piece, which cannot be cut; this needs the native kernels")

    def join(self, parts: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        return join(parts, bias, residual, dtype)

    def gated(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
    ) -> Part:
        first, second = self._tiles(gate, gate_bias), self._tiles(up, up_bias)
        act = ACTIVATIONS[activation]
        return lambda x: act(first(x)) * second(x)

    def rms_norm(self, weight: Tensor, eps: float, *, plus_one: bool) -> Norm:
        return lambda x, residual=None: _sum(rms_norm(x, weight, eps, plus_one=plus_one), residual)

    def layer_norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> Norm:
        return lambda x, residual=None: _sum(layer_norm(x, weight, bias, eps), residual)

    def heads(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        plus_one: bool,
        rotary: Rotary | None,
    ) -> TorchHeads:
        norms = [None if w is None else self.rms_norm(w, eps, plus_one=plus_one) for w in (q_norm, k_norm)]
        return TorchHeads(num_heads, num_kv_heads, head_dim, *norms, rotary)

    def attention(
        self,
        q: Tensor,
        cache: TorchCache,
        layout: Layout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        by_head = q.unflatten(-1, (-1, cache.k.shape[3]))
        out = attention(by_head, cache.k, cache.v, layout, scale=scale, window=window, softcap=softcap, slopes=slopes)
        return out.flatten(1)

    def attention_half(
        self,
        norm: Part | None,
        qkv: Linear,
        heads: Heads,
        out: Linear,
        out_norm: Norm | None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
    ) -> ComposedAttention:
        return ComposedAttention(self, norm, qkv, heads, out, out_norm, scale, window, softcap, slopes)

    def mlp_half(self, norm: Part | None, inner: Part, down: Linear, out_norm: Norm | None) -> ComposedMLP:
        return ComposedMLP(norm, inner, down, out_norm)

    def experts(self, *_: object, **__: object) -> None:
        return None

    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> TorchCache:
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        # left as it comes: nothing reads a slot before its own request has written it
        if self.kv_dtype == "int8":
            return TorchCache(ScaledBytes.empty(*shape), ScaledBytes.empty(*shape))
        return TorchCache(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))

    def kv_bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_kv_heads * (head_dim + 4 if self.kv_dtype == "int8" else head_dim * dtype.itemsize)

    def _tiles(self, weight: Tensor, bias: Tensor | None) -> TileLinear:
        self.matrix_bytes += weight.numel() * weight.itemsize
        return TileLinear(weight, bias)

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return peaks(logits)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Sequence[int | None]:
        return draw(logits, draws)

    def logprobs(self, logits: Tensor, peaks: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> Logprobs:
        return logprobs(logits, peaks, rows, tokens, top)


def _sum(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else residual + x
