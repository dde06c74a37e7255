"""Rotary position embedding, computed in float32 from a table that depends on the position alone."""

from __future__ import annotations

import torch
from torch import Tensor

_PAGE = 256  # positions computed together: one fixed shape, so that an angle never depends on how far the table reached


class Rotary:
    """Rotates the first `rotary_dim` of a head's dimensions by position * inv_freq.

    inv_freq: float32 [rotary_dim / 2]. attention_scaling: factor on cosine and sine (YaRN, longrope; else 1).
    interleaved: pairs are (0, 1), (2, 3), ... (GPT-J); else dimension i pairs with i + rotary_dim / 2 (NeoX, Llama).
    The table grows to the longest position seen; this object is its only owner.
    """

    def __init__(
        self, inv_freq: Tensor, attention_scaling: float = 1.0, rotary_dim: int | None = None, interleaved: bool = False
    ) -> None:
        self.inv_freq = inv_freq.detach().to(torch.float32)
        self.attention_scaling = attention_scaling
        self.rotary_dim = 2 * self.inv_freq.shape[0] if rotary_dim is None else rotary_dim
        self.interleaved = interleaved
        if self.rotary_dim != 2 * self.inv_freq.shape[0]:
            raise ValueError(f"rotary_dim {self.rotary_dim} needs {self.rotary_dim // 2} frequencies")
        self._table = torch.empty((0, 2, self.inv_freq.shape[0]), dtype=torch.float32)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [M, heads, d] at positions (int64 [M]) -> the same shape and dtype; dimensions past rotary_dim pass."""
        cos, sin = self._angles(positions)
        turned = x[..., : self.rotary_dim].float()
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned.chunk(2, dim=-1)
        out = torch.empty_like(x)
        if self.interleaved:
            out[..., 0 : self.rotary_dim : 2] = a * cos - b * sin
            out[..., 1 : self.rotary_dim : 2] = b * cos + a * sin
        else:
            half = self.rotary_dim // 2
            out[..., :half] = a * cos - b * sin
            out[..., half : self.rotary_dim] = b * cos + a * sin
        if self.rotary_dim < x.shape[-1]:
            out[..., self.rotary_dim :] = x[..., self.rotary_dim :]
        return out

    def angles(self, last: int) -> Tensor:
        """float32 [positions, 2, rotary_dim / 2] of cosines and sines, up to position `last` at least."""
        if last >= self._table.shape[0]:
            self._grow(last + 1)
        return self._table

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [M, 1, rotary_dim / 2] each."""
        both = self.angles(int(positions.max()) if positions.numel() else -1).index_select(0, positions)
        return both[:, 0:1], both[:, 1:2]

    def _grow(self, needed: int) -> None:
        have = self._table.shape[0]
        target = max(-(-needed // _PAGE) * _PAGE, min(2 * have, have + 16 * _PAGE))
        pages = [self._table]
        for first in range(have, target, _PAGE):
            angles = torch.arange(first, first + _PAGE, dtype=torch.float32)[:, None] * self.inv_freq
            pages.append(torch.stack((angles.cos(), angles.sin()), dim=1) * self.attention_scaling)
        self._table = torch.cat(pages)
