"""`TritonKernels`: what a model is computed with on a GPU: our kernels in Triton, and matrix products of either kind.

numerics: "invariant": products of our own, in one order of K; a row's bits depend on that row alone. "fast": products
of torch's library (cuBLAS), which chooses its order by the shape: outside the promise; it takes no quantised weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from orcaserve.core.config import KVDtype, Numerics, Quantization
from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.draw import Draw, draw
from orcaserve.ops.gpu.activation import act_mul
from orcaserve.ops.gpu.attention import Scratch, Tuning, attention, concurrent_programs
from orcaserve.ops.gpu.experts import DeviceExperts
from orcaserve.ops.gpu.heads import heads
from orcaserve.ops.gpu.layout import DeviceLayout
from orcaserve.ops.gpu.matmul import MatmulScratch, gated, matmul
from orcaserve.ops.gpu.norm import layer_norm, rms_norm
from orcaserve.ops.gpu.pieces import Cutter
from orcaserve.ops.gpu.quantised import Code, Coded, coded
from orcaserve.ops.halves import ComposedAttention, ComposedMLP
from orcaserve.ops.kernels import Heads, Linear, Norm, Part
from orcaserve.ops.linear import embedding
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.tree import join
from orcaserve.ops.vocabulary import Logprobs, logprobs, peaks

VERSION = 1  # changes whenever bits may


@dataclass(frozen=True, eq=False, slots=True)
class PagedCache:
    """k, v: [num_blocks, kv heads, block_size, d]: a block of one head lies in one piece.

    scales: None, or float32 [num_blocks, kv heads, block_size, 2]: what a position's key and its value, int8 from -127
    to 127, are multiplied with; side by side, so that one load brings both. NaN where a value was not finite.
    """

    k: Tensor
    v: Tensor
    scales: Tensor | None = None

    def block_bytes(self) -> list[Tensor]:
        tensors = [self.k, self.v] if self.scales is None else [self.k, self.v, self.scales]
        return [tensor.flatten(1).view(torch.uint8) for tensor in tensors]


@dataclass(frozen=True, eq=False, slots=True)
class InvariantLinear:
    weight: Tensor | Coded
    bias: Tensor | None
    activation: str | None
    wide: bool
    scratch: MatmulScratch

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        how = {"scratch": self.scratch, "activation": self.activation, "wide": self.wide}
        return matmul(x, self.weight, self.bias, residual, **how)

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight.rows(ids) if isinstance(self.weight, Coded) else embedding(ids, self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class FastLinear:
    weight: Tensor
    bias: Tensor | None
    activation: str | None
    wide: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.wide:
            return _wide(x, self.weight, self.bias)
        if residual is not None and self.bias is None and self.activation is None:
            return torch.addmm(residual, x, self.weight.t())
        out = functional.linear(x, self.weight, self.bias)
        if self.activation is not None:
            out = ACTIVATIONS[self.activation](out)
        return out if residual is None else out + residual

    def rows(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class DeviceHeads:
    """table: float32 [positions, 2, rotary_dim / 2] of cosines and sines."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    plus_one: bool
    table: Tensor | None
    rotary: Rotary | None

    def __call__(self, qkv: Tensor, layout: DeviceLayout, cache: PagedCache) -> Tensor:
        return heads(
            qkv,
            layout,
            cache.k,
            cache.v,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.eps,
            plus_one=self.plus_one,
            table=self.table,
            interleaved=self.rotary is not None and self.rotary.interleaved,
            rotary_dim=0 if self.rotary is None else self.rotary.rotary_dim,
            scales=cache.scales,
        )


class TritonKernels:
    """`Kernels` of one device: a GPU, or the CPU under Triton's interpreter.

    Owner of the memory that its kernels work in, one iteration at a time; `reserve` makes room for attention.
    quantization: "int8" keeps weights in 8 bits, with a scale for each output; "int4" in 4 bits, with a scale for every
        32 values of an output, but the output matrix in 8. Activations stay as they are.
    max_positions: longest context in tokens. kv_dtype: "int8" keeps keys and values in 8 bits, with a scale for each
    token and head. ranks: that share every layer; parts of a sum over K have an order of their own in each, so that
    bits depend on how many they are. Raises ValueError for quantised weights with numerics "fast".
    """

    block_multiple = 64

    def __init__(
        self,
        device: torch.device,
        numerics: Numerics = "invariant",
        *,
        quantization: Quantization = "none",
        max_positions: int,
        kv_dtype: KVDtype = "auto",
        ranks: int = 1,
    ) -> None:
        if numerics == "fast" and quantization != "none":
            raise ValueError("the vendor's library multiplies by no quantised weights")
        self.device = device
        self._quantization: Quantization = quantization
        self.is_quantised = quantization != "none"
        self.numerics = numerics
        self.deterministic = numerics == "invariant"
        self.matrix_bytes = 0
        self.kv_dtype = kv_dtype
        self.name = f"triton-{VERSION}-{numerics}" + (f"-{quantization}" if self.is_quantised else "")
        self.name += "" if kv_dtype == "auto" else f"-kv-{kv_dtype}"
        self.name += "" if ranks == 1 else f"-{ranks}-ranks"
        self._max_positions = max_positions
        self._products = MatmulScratch(device)
        self._partials: Scratch | None = None
        self._tables: dict[Rotary, Tensor] = {}

    def cutter(self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> Cutter:
        """What cuts the attention of such heads into tiles."""
        group = num_heads // num_kv_heads
        tokens = Tuning.of(head_dim, group, dtype, scaled=self.kv_dtype == "int8").tile_tokens(group)
        return Cutter(tokens, num_kv_heads, concurrent_programs(self.device))

    def reserve(self, max_states: int, num_heads: int, head_dim: int) -> None:
        """Makes room for the states of so many spans that are dealt out."""
        self._partials = Scratch.empty(max_states, num_heads, head_dim, self.device)

    def linear(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *,
        activation: str | None = None,
        cut: bool = False,
        wide: bool = False,
        exact: bool = False,
    ) -> Linear:
        kept = self._keep(weights, self._code(wide, exact))
        return self._linear(kept, _stack_biases(weights, biases), activation, wide)

    def partial(self, weight: Tensor, part_of: int) -> Linear:
        return self._linear(self._keep([weight], self._code()), None, None, True)

    def join(self, parts: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        return join(parts, bias, residual, dtype)

    def gated(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
    ) -> Part:
        if self.numerics == "fast":
            both = self.linear([gate, up], [gate_bias, up_bias])
            return lambda x: act_mul(both(x), activation)
        both = [self._keep([weight], self._code()) for weight in (gate, up)]
        return lambda x: gated(x, *both, gate_bias, up_bias, activation, scratch=self._products)

    def rms_norm(self, weight: Tensor, eps: float, *, plus_one: bool) -> Norm:
        return lambda x, residual=None: rms_norm(x, weight, eps, plus_one=plus_one, residual=residual)

    def layer_norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> Norm:
        return lambda x, residual=None: layer_norm(x, weight, bias, eps, residual=residual)

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
    ) -> Heads:
        table = None if rotary is None else self._table(rotary)
        return DeviceHeads(num_heads, num_kv_heads, head_dim, q_norm, k_norm, eps, plus_one, table, rotary)

    def attention(
        self,
        q: Tensor,
        cache: PagedCache,
        layout: DeviceLayout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        if self._partials is None:
            raise ValueError("reserve() has not been called")
        return attention(
            q,
            cache.k,
            cache.v,
            layout,
            self._partials,
            scales=cache.scales,
            scale=scale,
            window=window,
            softcap=softcap,
            slopes=slopes,
        )

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

    def experts(
        self,
        norm: Part | None,
        router: Linear,
        weights: Iterable[tuple[Tensor, Tensor, Tensor]],
        activation: str,
        *,
        num_experts: int,
        per_token: int,
        normalise: bool,
    ) -> DeviceExperts:
        # Of either kind of numerics: the vendor's library has no product that groups rows by what only the device knows
        stacks: list[Tensor] = []
        for e, matrices in enumerate(weights):
            if not stacks:
                stacks = [one.new_empty((num_experts, *one.shape)) for one in matrices]
            for stack, one in zip(stacks, matrices, strict=True):
                stack[e].copy_(one)  # never more than one expert beside what stays
        self.matrix_bytes += sum(stack.numel() * stack.itemsize for stack in stacks)
        return DeviceExperts(norm, router, *stacks, activation, per_token, normalise)

    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> PagedCache:
        if block_size % self.block_multiple:
            raise ValueError(f"blocks of {block_size} tokens are not multiples of {self.block_multiple}")
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        # Zeros: kernels read whole blocks, and what a mask hides must still be a number.
        kept = torch.int8 if self.kv_dtype == "int8" else dtype
        k, v = (torch.zeros(shape, dtype=kept, device=self.device) for _ in range(2))
        if self.kv_dtype == "auto":
            return PagedCache(k, v)
        return PagedCache(k, v, torch.zeros((*shape[:3], 2), device=self.device))

    def kv_bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_kv_heads * (head_dim + 4 if self.kv_dtype == "int8" else head_dim * dtype.itemsize)

    # What plain sampling does not do is done on the host, with logits that are there.

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return peaks(logits)

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Sequence[int | None]:
        return draw(logits, draws)

    def logprobs(self, logits: Tensor, peaks: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> Logprobs:
        return logprobs(logits, peaks, rows, tokens, top)

    def _linear(self, weight: Tensor | Coded, bias: Tensor | None, activation: str | None, wide: bool) -> Linear:
        if self.numerics == "fast" and isinstance(weight, Tensor):
            return FastLinear(weight, bias, activation, wide)
        return InvariantLinear(weight, bias, activation, wide, self._products)

    def _code(self, wide: bool = False, exact: bool = False) -> Code | None:
        """What a weight is kept in; None: its dtype."""
        if exact or self._quantization == "none":
            return None
        # the output matrix decides between tokens, and a tied embedding is read from it
        return "int8" if wide else self._quantization

    def _keep(self, weights: Sequence[Tensor], code: Code | None) -> Tensor | Coded:
        kept: Tensor | Coded
        if code is not None:
            kept = coded(weights, code)
        else:
            kept = weights[0].contiguous() if len(weights) == 1 else torch.cat(list(weights))
        self.matrix_bytes += kept.nbytes
        return kept

    def _table(self, rotary: Rotary) -> Tensor:
        """Shared by all layers that rotate alike."""
        if rotary not in self._tables:
            self._tables[rotary] = rotary.angles(self._max_positions - 1)[: self._max_positions].to(self.device)
        return self._tables[rotary]


def _stack_biases(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in pairs])


def _wide(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 [M, N], never rounded to the dtype of the weights."""
    if x.is_cuda and x.dtype != torch.float32:
        out = torch.mm(x, weight.t(), out_dtype=torch.float32)
    else:
        out = functional.linear(x.float(), weight.float())
    return out if bias is None else out + bias
