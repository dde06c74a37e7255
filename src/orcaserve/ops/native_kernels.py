"""`NativeKernels`: our own kernels, compiled for several instruction sets; which of them runs is chosen here.

They read raw addresses: this file answers for shapes, dtypes and lifetimes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from orcaserve.core.config import KVDtype, Quantization
from orcaserve.ops.draw import Draw
from orcaserve.ops.kernels import Part
from orcaserve.ops.layout import Layout
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.vocabulary import Logprobs

try:
    from orcaserve.ops import _native
except ImportError:  # installed without a compiler
    _native = None

Format = Literal["plain", "int8", "int4", "int6"]

GROUP = 32  # values of a column that share a scale, in 4 bits
VERSION = 5  # changes whenever the bits of a kernel do
_CUT = 8  # segments of K where tensor parallelism may cut it
_SHORTEST = 256  # values of a row that share a scale, where activations are brought to 8 bits
_QUERIES = 48  # query rows of a kv head that a tile of attention should have
_LARGEST_HEAD = 1024
_WIDE_ROWS = 16  # that room is made for at a time, in float32
_ALIGNED = 64  # bytes
_ACTIVATIONS = {
    None: 0, "silu": 1, "swish": 1, "gelu": 2, "gelu_new": 3, "gelu_fast": 3, "gelu_pytorch_tanh": 3, "quick_gelu": 4,
    "relu": 5, "relu2": 6, "tanh": 7, "sigmoid": 8,
}  # fmt: skip
# as kernels.hpp has it
_DRAW = np.dtype(
    [("row", "i8"), ("first", "i8"), ("count", "i8"), ("top_k", "i8"), ("key", "u8"), ("top_p", "f8"),
     ("temperature", "f4"), ("least", "f4"), ("allowed", "u8")]
)  # fmt: skip


def instruction_sets() -> list[str]:
    """Those that were compiled and that this machine runs, best first; none without the extension."""
    return [] if _native is None else _native.instruction_sets()


def _segments(k: int, multiple: int, cut: bool, quantised: bool) -> int:
    """Into how many parts K is summed apart, each of a multiple of so many values.

    Where activations are brought to 8 bits, each has scales of its own.
    """
    wanted = _CUT if cut else max(1, k // _SHORTEST) if quantised else 1
    return next((n for n in (8, 4, 2) if n <= wanted and k % (n * multiple) == 0), 1)


def _dtype(dtype: torch.dtype) -> Any:
    return _native.Dtype.bf16 if dtype == torch.bfloat16 else _native.Dtype.f32


def _pair(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


@dataclass(frozen=True, eq=False, slots=True)
class NativeCache:
    """Two buffers in the kernels' own layout, in which the slots of a block stand together; see kernels.hpp."""

    native: Any
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    num_blocks: int
    block_size: int
    is_scaled: bool

    def block_bytes(self) -> list[Tensor]:
        size, scale, pair = (1, 4, 2) if self.is_scaled else (self.dtype.itemsize, 0, _pair(self.dtype))
        widths = (-(-self.head_dim // pair) * pair, -(-self.head_dim // 16) * 16)  # of a key, of a value
        tensors = []
        for (address, _), width in zip(self.native.buffers, widths, strict=True):  # which are longer, by whole pages
            nbytes = self.block_size * self.num_kv_heads * (width * size + scale)
            raw = (ctypes.c_char * (self.num_blocks * nbytes)).from_address(address)
            tensors.append(torch.frombuffer(raw, dtype=torch.uint8).view(self.num_blocks, nbytes))
        return tensors


class _Weights:
    """A packed matrix; of two, if gated. The tensors it was made of are not kept.

    parts: (weight [N_i, K], bias or None, 0 for columns side by side, 1 and 2 for the two of a gated pair).
    part_of: into how many parts like this one the whole matrix is cut along K. Raises ValueError where none of its
    segments may be cut so often.
    """

    def __init__(
        self,
        engine: Any,
        parts: Sequence[tuple[Tensor, Tensor | None, int]],
        cut: bool,
        format: Format,
        part_of: int = 1,
    ) -> None:
        first, _, half = parts[0]
        k, width = first.shape[1], 32 if half else 64
        if any(weight.shape[1] != k for weight, _, _ in parts):
            raise ValueError(f"weights of other widths beside weights of {k} columns")
        self.dtype, self.k = first.dtype, k
        self.n = first.shape[0] if half else sum(weight.shape[0] for weight, _, _ in parts)
        multiple = {"plain": _pair(self.dtype), "int8": 4, "int4": GROUP, "int6": 8}[format]
        segments = _segments(k * part_of, multiple, cut, format != "plain")
        if segments % part_of:
            raise ValueError(f"{k * part_of} values are summed in {segments} parts, which {part_of} cannot share")
        self.matrix = _native.Matrix(
            dtype=_dtype(self.dtype),
            format=getattr(_native.Format, format),
            n=self.n,
            k=k,
            gated=bool(half),
            group=GROUP,
            segments=segments // part_of,
        )
        bias = torch.zeros((2 if half else 1, -(-self.n // width) * width))
        at = 0
        for weight, own, half in parts:
            rows = weight.shape[0]
            engine.pack(self.matrix, weight.data_ptr(), rows, weight.stride(0), weight.stride(1), at, half)
            if own is not None:
                bias[max(0, half - 1), at : at + rows] = own.float()
            at += 0 if half else rows
        engine.compress(self.matrix)
        # in the order of packed columns
        bias = bias.view(bias.shape[0], -1, width).transpose(0, 1).contiguous()
        self._bias = bias if any(own is not None for _, own, _ in parts) else None
        self.bias_address = 0 if self._bias is None else self._bias.data_ptr()


class NativeLinear:
    def __init__(self, engine: Any, weights: _Weights, activation: str | None, wide: bool) -> None:
        self._engine = engine
        self._weights = weights  # keeps the bias alive
        self._is_wide = wide
        self.n, self.out_dtype = weights.n, torch.float32 if wide else weights.dtype
        self.native = _native.Linear(weights.matrix, weights.bias_address, _ACTIVATIONS[activation], wide)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        m = x.shape[0]
        out = _wide(m, self.n) if self._is_wide else torch.empty((m, self.n), dtype=self.out_dtype)
        self._engine.linear(self.native, x.data_ptr(), m, _address(residual), out.data_ptr())
        return out

    def rows(self, ids: Tensor) -> Tensor:
        out = torch.empty((ids.shape[0], self._weights.k), dtype=self._weights.dtype)
        self._engine.gather(self._weights.matrix, ids.data_ptr(), ids.shape[0], out.data_ptr())
        return out


class NativeNorm:
    """weight, bias: [H] of the model's dtype."""

    def __init__(self, engine: Any, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: Any) -> None:
        self._engine = engine
        self._weight, self._bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
        self.native = _native.Norm(
            dtype=dtype, h=weight.shape[0], weight=_address(self._weight), bias=_address(self._bias), eps=eps,
            centred=centred,
        )  # fmt: skip

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """With a residual [M, H] their sum, rounded once."""
        out = torch.empty_like(x)
        self._engine.norm(self.native, x.data_ptr(), x.shape[0], _address(residual), out.data_ptr())
        return out


class NativeHeads:
    """q_norm, k_norm: float32 [d] or None."""

    def __init__(
        self,
        engine: Any,
        heads: tuple[int, int, int],
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        rotary: Rotary | None,
    ) -> None:
        """heads: of queries, of keys, and their dimensions."""
        self._engine, self._rotary = engine, rotary
        self._norms = q_norm, k_norm
        turned, interleaved = (0, False) if rotary is None else (rotary.rotary_dim, rotary.interleaved)
        self.native = _native.Heads(*heads, _address(q_norm), _address(k_norm), eps, turned, interleaved)
        self.num_heads, self.num_kv_heads, self.head_dim = heads

    def __call__(self, qkv: Tensor, layout: Layout, cache: NativeCache) -> Tensor:
        q = torch.empty((qkv.shape[0], self.num_heads * self.head_dim), dtype=qkv.dtype)
        rows = _rows(layout, self.num_heads, self.num_kv_heads)
        self._engine.heads(self.native, rows.native, cache.native, qkv.data_ptr(), self.angles(layout), q.data_ptr())
        return q

    def angles(self, layout: Layout) -> int:
        """Where the table of cosines and sines lies that reaches to the iteration's last position."""
        return 0 if self._rotary is None else self._rotary.angles(layout.last_position).data_ptr()


class NativeAttention:
    """`AttentionHalf` in one call."""

    def __init__(
        self,
        engine: Any,
        norm: NativeNorm | None,
        qkv: NativeLinear,
        heads: NativeHeads,
        out: NativeLinear,
        out_norm: NativeNorm | None,
        view: Any,
        slopes: Tensor | None,
    ) -> None:
        self._engine, self._heads, self._out = engine, heads, out
        self._parts = norm, qkv, heads, out, out_norm, slopes  # whose tensors the native half reads
        self._native = _native.AttentionHalf(_part(norm), qkv.native, heads.native, view, out.native, _part(out_norm))

    def __call__(self, x: Tensor, layout: Layout, cache: NativeCache, residual: Tensor | None) -> Tensor:
        result = torch.empty((x.shape[0], self._out.n), dtype=self._out.out_dtype)
        heads = self._heads
        rows = _rows(layout, heads.num_heads, heads.num_kv_heads)
        self._engine.attention_half(
            self._native, rows.native, cache.native, x.data_ptr(), _address(residual), heads.angles(layout),
            result.data_ptr(),
        )  # fmt: skip
        return result


class NativeMLP:
    """`MLPHalf` in one call."""

    def __init__(
        self, engine: Any, norm: NativeNorm | None, inner: NativeLinear, down: NativeLinear, out_norm: NativeNorm | None
    ) -> None:
        self._engine, self._down = engine, down
        self._parts = norm, inner, down, out_norm  # whose tensors the native half reads
        self._native = _native.MLPHalf(_part(norm), inner.native, down.native, _part(out_norm))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        result = torch.empty((x.shape[0], self._down.n), dtype=self._down.out_dtype)
        self._engine.mlp_half(self._native, x.data_ptr(), x.shape[0], _address(residual), result.data_ptr())
        return result


@dataclass(frozen=True, eq=False, slots=True)
class _Rows:
    """The native description of an iteration, and the tensors and arrays that it points into.

    tiles: int32 [n, 4] of first row, positions, start, place in `tables`; tables: int32, block tables in a row.
    """

    native: Any
    layout: Layout
    tiles: np.ndarray
    tables: np.ndarray


def _rows(layout: Layout, heads: int, kv_heads: int) -> _Rows:
    positions = max(1, _QUERIES * kv_heads // heads)
    rows: _Rows = layout.derived(("native", positions), lambda: _make_rows(layout, positions))
    return rows


def _make_rows(layout: Layout, positions: int) -> _Rows:
    """The queries of an iteration in tiles of `positions`, the longest work first."""
    tiles: list[tuple[int, int, int, int]] = []
    place = 0
    for row in layout.rows:
        for at in range(0, row.num_tokens, positions):
            tiles.append((row.first + at, min(positions, row.num_tokens - at), row.start + at, place))
        place += row.blocks.shape[0]
    tiles.sort(key=lambda tile: -tile[1] * (tile[2] + tile[1]))
    tables = np.concatenate([row.blocks for row in layout.rows] or [np.empty(0)]).astype(np.int32)
    array = np.array(tiles, dtype=np.int32)
    native = _native.Rows(
        m=layout.num_tokens, positions=layout.positions.data_ptr(), slots=layout.slots.data_ptr(),
        tiles=array.ctypes.data, num_tiles=len(tiles), tables=tables.ctypes.data, block_size=layout.block_size,
    )  # fmt: skip
    return _Rows(native, layout, array, tables)


def _wide(m: int, n: int) -> Tensor:
    """float32 [m, n], on a boundary of 64 bytes.

    Logits are as large as all else together. torch takes its memory on such boundaries, and glibc looks for more than
    that then: the place that the last logits left is never enough, and wherever something small has come to lie behind
    it the heap grows. What numpy takes fits there, as long as it is of one size whatever the rows.
    """
    raw = np.empty(-(-m // _WIDE_ROWS) * _WIDE_ROWS * n + _ALIGNED // 4, np.float32)
    first = -raw.ctypes.data % _ALIGNED // 4
    return torch.from_numpy(raw[first : first + m * n]).view(m, n)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _part(norm: NativeNorm | None) -> Any:
    return None if norm is None else norm.native


class NativeKernels:
    """`Kernels` of one instruction set on a pool of its own threads.

    isa: one of `instruction_sets()`. Raises ValueError for another.
    quantization: "int8" keeps weights in 8 bits, with a scale for each column and segment of K; "int4" in 4 bits, with
        a scale for every GROUP values of a column, but the output matrix in 6, with scales as of 8. Activations are
        brought to 8 bits row by row where they meet such weights; everything else stays as it is.
    kv_dtype: "int8" keeps keys and values in 8 bits, with a scale for each token and head.
    """

    block_multiple = 16
    device = torch.device("cpu")
    deterministic = True

    def __init__(
        self, threads: int, isa: str | None = None, *, quantization: Quantization = "none", kv_dtype: KVDtype = "auto"
    ) -> None:
        known = instruction_sets()
        if not known or (isa is not None and isa not in known):
            raise ValueError(f"there are no native kernels for {isa or 'this machine'}")
        self._engine = _native.Engine(isa or known[0], threads)
        self._quantization = quantization
        self.matrix_bytes = 0
        self.kv_dtype = kv_dtype
        self.is_quantised = quantization != "none"
        self.name = f"native-{VERSION}-{self._engine.isa}" + ("" if quantization == "none" else f"-{quantization}")
        self.name += "" if kv_dtype == "auto" else f"-kv-{kv_dtype}"

    def linear(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        activation: str | None = None,
        cut: bool = False,
        wide: bool = False,
        exact: bool = False,
    ) -> NativeLinear:
        parts = [(weight, bias, 0) for weight, bias in zip(weights, biases, strict=True)]
        return NativeLinear(self._engine, self._pack(parts, cut, self._format(wide, exact)), activation, wide)

    def partial(self, weight: Tensor, part_of: int) -> NativeLinear:
        packed = self._pack([(weight, None, 0)], True, self._format(), part_of)
        return NativeLinear(self._engine, packed, None, wide=True)

    def join(self, parts: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        count, m, n = parts.shape
        out = torch.empty((m, n), dtype=dtype)
        self._engine.join(
            _dtype(dtype), parts.data_ptr(), count, m, n, _address(bias), _address(residual), out.data_ptr()
        )
        return out

    def gated(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
    ) -> Part:
        parts = [(gate, gate_bias, 1), (up, up_bias, 2)]
        return NativeLinear(self._engine, self._pack(parts, False, self._format()), activation, wide=False)

    def rms_norm(self, weight: Tensor, eps: float, *, plus_one: bool) -> Part:
        factor = _factor(weight, plus_one)
        return NativeNorm(self._engine, factor, None, eps, centred=False, dtype=_dtype(weight.dtype))

    def layer_norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> Part:
        return NativeNorm(self._engine, weight, bias, eps, centred=True, dtype=_dtype(weight.dtype))

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
        return NativeHeads(self._engine, (num_heads, num_kv_heads, head_dim), *norms, eps, rotary)

    def attention(
        self,
        q: Tensor,
        cache: NativeCache,
        layout: Layout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        d, kv_heads = cache.head_dim, cache.num_kv_heads
        heads = q.shape[1] // d
        out = torch.empty_like(q)
        shape = _native.Heads(heads, kv_heads, d, 0, 0, 0.0, 0, False)
        rows = _rows(layout, heads, kv_heads)
        view = _view(scale, window, softcap, slopes)
        self._engine.attention(shape, view, rows.native, cache.native, q.data_ptr(), out.data_ptr())
        return out

    def attention_half(
        self,
        norm: NativeNorm | None,
        qkv: NativeLinear,
        heads: NativeHeads,
        out: NativeLinear,
        out_norm: NativeNorm | None,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
    ) -> NativeAttention:
        view = _view(scale, window, softcap, slopes)
        return NativeAttention(self._engine, norm, qkv, heads, out, out_norm, view, slopes)

    def mlp_half(
        self, norm: NativeNorm | None, inner: NativeLinear, down: NativeLinear, out_norm: NativeNorm | None
    ) -> NativeMLP:
        return NativeMLP(self._engine, norm, inner, down, out_norm)

    def experts(self, *_: object, **__: object) -> None:
        return None

    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> NativeCache:
        if block_size % self.block_multiple:
            raise ValueError(f"blocks of {block_size} tokens are not multiples of {self.block_multiple}")
        is_scaled = self.kv_dtype == "int8"
        native = _native.Cache(_dtype(dtype), is_scaled, num_blocks * block_size, num_kv_heads, head_dim)
        return NativeCache(native, num_kv_heads, head_dim, dtype, num_blocks, block_size, is_scaled)

    def _pack(
        self, parts: Sequence[tuple[Tensor, Tensor | None, int]], cut: bool, format: Format, part_of: int = 1
    ) -> _Weights:
        weights = _Weights(self._engine, parts, cut, format, part_of)
        self.matrix_bytes += weights.matrix.nbytes
        return weights

    def _format(self, wide: bool = False, exact: bool = False) -> Format:
        if exact or self._quantization == "none":
            return "plain"
        return "int6" if wide and self._quantization == "int4" else self._quantization

    def kv_bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        values = head_dim + -(-head_dim // 16) * 16
        return num_kv_heads * (values + 8 if self.kv_dtype == "int8" else values * dtype.itemsize)

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, vocab = logits.shape
        logits = logits.contiguous()
        greatest, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._engine.peaks(logits.data_ptr(), rows, vocab, greatest.data_ptr(), ids.data_ptr())
        return greatest, ids

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Sequence[int | None]:
        """Raises IndexError for a changed score outside of the vocabulary, or too few bits for it."""
        if not draws:
            return []
        logits, vocab = logits.contiguous(), logits.shape[1]
        table = np.empty(len(draws), dtype=_DRAW)
        at = 0
        for i, one in enumerate(draws):
            count = one.ids.shape[0]
            if count and not 0 <= one.ids[0] <= one.ids[-1] < vocab:
                raise IndexError(f"a changed score outside of a vocabulary of {vocab}")
            if one.allowed is not None and one.allowed.nbytes * 8 < vocab:
                raise IndexError(f"{one.allowed.nbytes * 8} bits for a vocabulary of {vocab}")
            least = math.log(one.min_p) if one.min_p > 0.0 else -math.inf
            allowed = 0 if one.allowed is None else one.allowed.ctypes.data
            table[i] = (one.row, at, count, one.top_k, one.key, one.top_p, one.temperature, least, allowed)
            at += count
        ids = np.concatenate([one.ids for one in draws])
        scores = np.concatenate([one.scores for one in draws])
        tokens = np.empty(len(draws), dtype=np.int64)
        self._engine.draw(
            logits.data_ptr(), vocab, table.ctypes.data, len(draws), ids.ctypes.data, scores.ctypes.data,
            tokens.ctypes.data,
        )  # fmt: skip
        return [None if token < 0 else token for token in tokens.tolist()]

    def logprobs(self, logits: Tensor, peaks: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> Logprobs:
        """Raises IndexError for a token outside of the vocabulary."""
        logits, vocab, n = logits.contiguous(), logits.shape[1], len(rows)
        if n and not 0 <= min(tokens) <= max(tokens) < vocab:
            raise IndexError(f"a token outside of a vocabulary of {vocab}")
        top = min(top, vocab)
        peaks = peaks.contiguous()
        which, chosen = torch.tensor(rows, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64)
        found = Logprobs(
            torch.empty(n), torch.empty(n, dtype=torch.int64), torch.empty((n, top), dtype=torch.int64),
            torch.empty((n, top)),
        )  # fmt: skip
        self._engine.logprobs(
            logits.data_ptr(), vocab, which.data_ptr(), peaks.data_ptr(), chosen.data_ptr(), n, top,
            *(tensor.data_ptr() for tensor in found),
        )  # fmt: skip
        return found


def _view(scale: float, window: int | None, softcap: float | None, slopes: Tensor | None) -> Any:
    """slopes: float32; whoever calls keeps them."""
    return _native.View(scale, window or 0, softcap or 0.0, _address(slopes))


def _factor(weight: Tensor, plus_one: bool) -> Tensor:
    """What a norm multiplies with, float32."""
    return weight.float() + 1.0 if plus_one else weight.float().contiguous()
