"""`Kernels`: what a model is computed with. One protocol; torch's operators and the native kernels both fill it.

Whatever a method builds gives a row bits that depend on that row alone, and attention's on the row's own request.
Activations are [M, H], all tokens of an iteration below each other, contiguous, in the dtype of the weights.
A layout is what the kernels' worker makes: `Layout`, or `DeviceLayout` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from orcaserve.core.config import KVDtype
from orcaserve.ops.draw import Draw
from orcaserve.ops.layout import Layout
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.vocabulary import Logprobs

Part = Callable[[Tensor], Tensor]


class Norm(Protocol):
    """[M, H] -> [M, H]; with a residual [M, H] their sum."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class Linear(Protocol):
    """[M, K] -> [M, N]; with a residual [M, N] their sum, rounded once."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (int64 [M]) of the weight: the embedding, where it is tied to the output matrix."""
        ...


class KVCache(Protocol):
    """Keys and values of one layer, in a layout that only its kernels know. The worker owns it."""

    def block_bytes(self) -> Sequence[Tensor]:
        """The cache itself as bytes: uint8 [num_blocks, n], for each of its parts, as long as it lives."""
        ...


class Heads(Protocol):
    """A QKV product [M, (heads + 2 * kv heads) * d] -> queries [M, heads * d], normed and rotated; stores the rest."""

    def __call__(self, qkv: Tensor, layout: Layout, cache: KVCache) -> Tensor: ...


class AttentionHalf(Protocol):
    """residual + out_norm(out(attention(heads(qkv(norm(x)))))), all [M, H]; norms and residual where there are any.

    Writes this iteration's keys and values to the cache, attends over what the cache then holds.
    """

    def __call__(self, x: Tensor, layout: Layout, cache: KVCache, residual: Tensor | None) -> Tensor: ...


class MLPHalf(Protocol):
    """residual + out_norm(down(inner(norm(x)))), all [M, H]; norms and residual where there are any."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class Kernels(Protocol):
    """Builds the parts of a model. Immutable, but for the memory it works in.

    name: goes into the numerics profile; it changes whenever bits may.
    block_multiple: a block of the KV cache has a multiple of so many tokens.
    matrix_bytes: memory of the weights of all linear maps built so far.
    kv_dtype: what its caches keep; "auto": the dtype of the activations.
    is_quantised: whether `Linear.rows` gives other values than the weight had.
    device: where tensors live, those that it is given included.
    deterministic: whether it keeps what the first lines here say.
    """

    @property
    def name(self) -> str: ...
    @property
    def block_multiple(self) -> int: ...
    @property
    def matrix_bytes(self) -> int: ...
    @property
    def kv_dtype(self) -> KVDtype: ...
    @property
    def is_quantised(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def deterministic(self) -> bool: ...

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
        """weights: [N_i, K], whose outputs stand side by side. biases: [N_i] or None.

        cut: K is summed as a balanced tree over eight segments, so that tensor parallelism gives the same bits.
        wide: the result is float32. exact: weights stay in their dtype, whatever the others are quantised to.
        """
        ...

    def partial(self, weight: Tensor, part_of: int) -> Linear:
        """One of `part_of` equal parts, along K, of a cut map: [M, K / part_of] -> its part of the sum, float32 [M, N].

        Raises ValueError where the segments of the whole cannot be shared so, or these kernels know no segments.
        """
        ...

    def join(self, parts: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The parts' float32 [P, M, N] (P of 1, 2, 4, 8) -> what the uncut map gives, [M, N] of dtype.

        Bit for bit, unless the kernels' name tells how many ranks there are.

        bias: float32 [N]. residual: [M, N].
        """
        ...

    def gated(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
    ) -> Part:
        """x -> activation(gate(x)) * up(x); weights [N, K]."""
        ...

    def rms_norm(self, weight: Tensor, eps: float, *, plus_one: bool) -> Norm: ...

    def layer_norm(self, weight: Tensor, bias: Tensor | None, eps: float) -> Norm: ...

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
        """q_norm, k_norm: weights [d] of RMS norms over each head, with `eps` and `plus_one` as in `rms_norm`."""
        ...

    def attention(
        self,
        q: Tensor,
        cache: KVCache,
        layout: Layout,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """[M, heads * d] -> the same: every token against the cached keys and values of its request up to itself.

        window: a query at p sees positions > p - window. softcap: scores become softcap * tanh(score / softcap).
        slopes: float32 [heads] of ALiBi: slope * (position of the key - position of the query) is added to a score.
        """
        ...

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
    ) -> AttentionHalf:
        """Half a layer of parts that these kernels built."""
        ...

    def mlp_half(self, norm: Part | None, inner: Part, down: Linear, out_norm: Norm | None) -> MLPHalf:
        """inner: x -> activation(up(x)), or what `gated` gives."""
        ...

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
    ) -> MLPHalf | None:
        """A whole mixture of experts, as `model.layers.Experts` describes it, of which no rank has but a part.

        weights: gate and up [I, H] and down [H, I] of each of `num_experts`, taken one by one, none twice; no biases.
        None: these kernels do experts one by one, as halves of their own; then no weights are taken.
        """
        ...

    def kv_cache(
        self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KVCache:
        """One layer's cache for activations of a dtype. Its memory is taken when it is written to."""
        ...

    def kv_bytes_per_token(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Of one layer."""
        ...

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The greatest of each row of float32 [R, V] (NaN if the row has one), and the lowest id that has it, int64."""
        ...

    def draw(self, logits: Tensor, draws: Sequence[Draw]) -> Sequence[int | None]:
        """A token for each draw of float32 [R, V], no two of one row; None where the greatest score is not finite."""
        ...

    def logprobs(self, logits: Tensor, peaks: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> Logprobs:
        """Of token i in row i of `rows`. logits: float32 [R, V]; peaks [R]: the greatest of each row, all finite."""
        ...
