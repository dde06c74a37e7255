"""`NativeKernels`: our own kernels, compiled for several instruction sets; which of them runs is chosen here.

They read raw addresses: this file answers for shapes, dtypes and lifetimes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orcaserve.ops.kernels import Part
from orcaserve.ops.layout import Layout
from orcaserve.ops.rotary import Rotary

try:
    from orcaserve.ops import _native
except ImportError:  # installed without a compiler
    _native = None

VERSION = 1  # changes whenever the bits of a kernel do
_CUT = 8  # segments of K where tensor parallelism may cut it
_QUERIES = 48  # query rows of a kv head that a tile of attention should have
_LARGEST_HEAD = 1024
_ACTIVATIONS = {
    None: 0, "silu": 1, "swish": 1, "gelu": 2, "gelu_new": 3, "gelu_fast": 3, "gelu_pytorch_tanh": 3, "quick_gelu": 4,
    "relu": 5, "relu2": 6, "tanh": 7, "sigmoid": 8,
}  # fmt: skip


def instruction_sets() -> list[str]:
    """Those that were compiled and that this machine runs, best first; none without the extension."""
    return [] if _native is None else _native.instruction_sets()


def _dtype(dtype: torch.dtype) -> Any:
    return _native.Dtype.bf16 if dtype == torch.bfloat16 else _native.Dtype.f32


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


@dataclass(frozen=True, eq=False, slots=True)
class NativeCache:
    """Two buffers in the kernels' own layout; see kernels.hpp."""

    k: Any
    v: Any
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class NativeLinear:
    """Weights [N_i, K], packed once; the tensors they came from are not kept."""

    def __init__(
        self,
        engine: Any,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activation: str | None,
        cut: bool,
        wide: bool,
    ) -> None:
        k, n = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        self._engine = engine
        self._dtype = weights[0].dtype
        self._out_dtype = torch.float32 if wide else self._dtype
        self._wide = wide
        self._n = n
        self._matrix = _native.Matrix(_dtype(self._dtype), n, k, False)
        first = 0
        for weight in weights:
            _pack(engine, self._matrix, weight, first, 0)
            first += weight.shape[0]
        self._bias = None
        if any(bias is not None for bias in biases):
            self._bias = torch.zeros(-(-n // 64) * 64)
            parts = [torch.zeros(w.shape[0]) if b is None else b.float() for w, b in zip(weights, biases, strict=True)]
            self._bias[:n] = torch.cat(parts)
        self._bias_address = 0 if self._bias is None else self._bias.data_ptr()
        self._segments = _CUT if cut and k % (_CUT * _pair(self._dtype)) == 0 else 1
        self._activation = _ACTIVATIONS[activation]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        m = x.shape[0]
        out = torch.empty((m, self._n), dtype=self._out_dtype)
        if x.stride(1) != 1:
            x = x.contiguous()
        self._engine.gemm(
            self._matrix, x.data_ptr(), m, x.stride(0), self._bias_address,
            0 if residual is None else residual.data_ptr(), out.data_ptr(), self._n, self._segments, self._activation,
            self._wide,
        )  # fmt: skip
        return out

    def rows(self, ids: Tensor) -> Tensor:
        out = torch.empty((ids.shape[0], self._matrix.k), dtype=self._dtype)
        self._engine.gather(self._matrix, ids.data_ptr(), ids.shape[0], out.data_ptr())
        return out


def _pack(engine: Any, matrix: Any, weight: Tensor, first: int, half: int) -> None:
    rows, k = weight.shape
    if k != matrix.k:
        raise ValueError(f"weights of {k} columns beside weights of {matrix.k}")
    engine.pack(matrix, weight.data_ptr(), rows, weight.stride(0), weight.stride(1), first, half)


class NativeGated:
    def __init__(
        self,
        engine: Any,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: str,
    ) -> None:
        self._engine = engine
        self._n, k = gate.shape
        self._dtype = gate.dtype
        self._matrix = _native.Matrix(_dtype(gate.dtype), self._n, k, True)
        _pack(engine, self._matrix, gate, 0, 1)
        _pack(engine, self._matrix, up, 0, 2)
        self._bias = None
        if gate_bias is not None or up_bias is not None:
            halves = torch.zeros((2, -(-self._n // 32) * 32))
            for half, bias in zip(halves, (gate_bias, up_bias), strict=True):
                if bias is not None:
                    half[: self._n] = bias.float()
            self._bias = halves.view(2, -1, 32).transpose(0, 1).contiguous()
        self._bias_address = 0 if self._bias is None else self._bias.data_ptr()
        self._activation = _ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], self._n), dtype=self._dtype)
        self._engine.gemm(
            self._matrix, x.data_ptr(), x.shape[0], x.stride(0), self._bias_address, 0, out.data_ptr(), self._n, 1,
            self._activation, False,
        )  # fmt: skip
        return out


class NativeNorm:
    """weight, bias: float32 [H]."""

    def __init__(self, engine: Any, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> None:
        self._engine, self._eps, self._centred = engine, eps, centred
        self._weight, self._bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        self._engine.norm(
            _dtype(x.dtype), x.data_ptr(), x.shape[0], x.shape[1], x.stride(0), self._weight.data_ptr(),
            0 if self._bias is None else self._bias.data_ptr(), self._eps, self._centred, out.data_ptr(),
        )  # fmt: skip
        return out


@dataclass(frozen=True, eq=False, slots=True)
class NativeHeads:
    """q_norm, k_norm: float32 [d] or None."""

    engine: Any
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    rotary: Rotary | None

    def __call__(self, qkv: Tensor, layout: Layout, cache: NativeCache) -> Tensor:
        q = torch.empty((qkv.shape[0], self.num_heads * self.head_dim), dtype=qkv.dtype)
        rotary = self.rotary
        angles = None if rotary is None else rotary.angles(layout.last_position)
        self.engine.heads(
            _dtype(qkv.dtype), qkv.data_ptr(), qkv.shape[0], self.num_heads, self.num_kv_heads, self.head_dim,
            0 if self.q_norm is None else self.q_norm.data_ptr(), 0 if self.k_norm is None else self.k_norm.data_ptr(),
            self.eps, 0 if angles is None else angles.data_ptr(), 0 if rotary is None else rotary.rotary_dim,
            rotary is not None and rotary.interleaved, layout.positions.data_ptr(), layout.slots.data_ptr(),
            q.data_ptr(), cache.k.address, cache.v.address,
        )  # fmt: skip
        return q


@dataclass(frozen=True, eq=False, slots=True)
class _Tiles:
    """tiles: int32 [n, 4] of first row, positions, start, place in `tables`; tables: int32, block tables in a row."""

    tiles: Tensor
    tables: Tensor


def _tiles(layout: Layout, positions: int) -> _Tiles:
    """The queries of an iteration in tiles of `positions`, the longest work first."""
    tiles: list[tuple[int, int, int, int]] = []
    place = 0
    for row in layout.rows:
        for at in range(0, row.num_tokens, positions):
            tiles.append((row.first + at, min(positions, row.num_tokens - at), row.start + at, place))
        place += row.blocks.shape[0]
    tiles.sort(key=lambda tile: -tile[1] * (tile[2] + tile[1]))
    tables = torch.cat([row.blocks for row in layout.rows]) if layout.rows else torch.empty(0, dtype=torch.int64)
    return _Tiles(torch.tensor(tiles, dtype=torch.int32).view(-1, 4), tables.to(torch.int32))


class NativeKernels:
    """`Kernels` of one instruction set on a pool of its own threads.

    isa: one of `instruction_sets()`. Raises ValueError for another.
    """

    block_multiple = 16

    def __init__(self, threads: int, isa: str | None = None) -> None:
        known = instruction_sets()
        if not known or (isa is not None and isa not in known):
            raise ValueError(f"there are no native kernels for {isa or 'this machine'}")
        self._engine = _native.Engine(isa or known[0], threads)
        self.name = f"native-{VERSION}-{self._engine.isa}"

    def linear(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        activation: str | None = None,
        cut: bool = False,
        wide: bool = False,
    ) -> NativeLinear:
        return NativeLinear(self._engine, weights, biases, activation, cut, wide)

    def gated(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
    ) -> Part:
        return NativeGated(self._engine, gate, up, gate_bias, up_bias, activation)

    def rms_norm(self, weight: Tensor, eps: float, *, plus_one: bool) -> Part:
        return NativeNorm(self._engine, _factor(weight, plus_one), None, eps, centred=False)

    def layer_norm(self, weight: Tensor, bias: Tensor, eps: float) -> Part:
        return NativeNorm(self._engine, weight, bias, eps, centred=True)

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
    ) -> NativeHeads:
        if head_dim > _LARGEST_HEAD or head_dim % 2:
            raise ValueError(f"heads of {head_dim} dimensions are not supported")
        norms = [None if w is None else _factor(w, plus_one) for w in (q_norm, k_norm)]
        return NativeHeads(self._engine, num_heads, num_kv_heads, head_dim, *norms, eps, rotary)

    def attention(
        self,
        q: Tensor,
        cache: NativeCache,
        layout: Layout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        d, kv_heads = cache.head_dim, cache.num_kv_heads
        heads = q.shape[1] // d
        positions = max(1, _QUERIES * kv_heads // heads)
        plan = layout.derived(("native", positions), lambda: _tiles(layout, positions))
        out = torch.empty(q.shape, dtype=q.dtype)
        self._engine.attention(
            _dtype(q.dtype), q.data_ptr(), cache.k.address, cache.v.address, plan.tiles.data_ptr(),
            plan.tiles.shape[0], plan.tables.data_ptr(), layout.block_size, heads, kv_heads, d, scale, window or 0,
            softcap or 0.0, out.data_ptr(),
        )  # fmt: skip
        return out

    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> NativeCache:
        if block_size % self.block_multiple:
            raise ValueError(f"blocks of {block_size} tokens are not multiples of {self.block_multiple}")
        slots = num_blocks * block_size * num_kv_heads * dtype.itemsize
        padded = -(-head_dim // 16) * 16
        return NativeCache(
            _native.Buffer(slots * head_dim), _native.Buffer(slots * padded), num_kv_heads, head_dim, dtype
        )

    def kv_bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_kv_heads * (head_dim + -(-head_dim // 16) * 16) * dtype.itemsize

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, vocab = logits.shape
        logits = logits.contiguous()
        greatest, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._engine.peaks(logits.data_ptr(), rows, vocab, greatest.data_ptr(), ids.data_ptr())
        return greatest, ids

    def masses(self, logits: Tensor, peaks: Tensor) -> Tensor:
        rows, vocab = logits.shape
        logits, peaks = logits.contiguous(), peaks.contiguous()
        out = torch.empty(rows, dtype=torch.float64)
        self._engine.masses(logits.data_ptr(), rows, vocab, peaks.data_ptr(), out.data_ptr())
        return out


def _factor(weight: Tensor, plus_one: bool) -> Tensor:
    """What a norm multiplies with, float32."""
    return weight.float() + 1.0 if plus_one else weight.float().contiguous()
