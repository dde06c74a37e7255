"""The two halves of a layer put together from a kernel set's own parts: what `TorchKernels` runs, and the slow twin of
the native halves, which are one call each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from orcaserve.ops.kernels import Heads, Kernels, KVCache, Linear, Norm, Part
from orcaserve.ops.layout import Layout


@dataclass(frozen=True, eq=False)
class ComposedAttention:
    kernels: Kernels
    norm: Part | None
    qkv: Linear
    heads: Heads
    out: Linear
    out_norm: Norm | None
    scale: float
    window: int | None
    softcap: float | None
    slopes: Tensor | None = None

    def __call__(self, x: Tensor, layout: Layout, cache: KVCache, residual: Tensor | None) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        q = self.heads(self.qkv(x), layout, cache)
        mixed = self.kernels.attention(
            q, cache, layout, scale=self.scale, window=self.window, softcap=self.softcap, slopes=self.slopes
        )
        return _add(self.out, self.out_norm, mixed, residual)


@dataclass(frozen=True, eq=False)
class ComposedMLP:
    norm: Part | None
    inner: Part
    down: Linear
    out_norm: Norm | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return _add(self.down, self.out_norm, self.inner(x), residual)


def _add(linear: Linear, norm: Norm | None, x: Tensor, residual: Tensor | None) -> Tensor:
    return linear(x, residual) if norm is None else norm(linear(x), residual)
