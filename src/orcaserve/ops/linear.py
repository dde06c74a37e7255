"""Linear maps and embeddings whose rows have the same bits however many rows travel together.

A matrix product picks its inner loops by its shape, so a row alone and the same row among a hundred may differ in their
last bit. Here every product that is really run has exactly `TILE` rows: more rows are more products, fewer are padded.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

TILE = 32
_NARROWEST = 16  # outputs: with fewer, a row's bits were seen to depend on its place in the tile


class TileLinear:
    """x @ weightᵀ + bias, in the dtype of the weight.

    weight: [N, K], kept as given (a mapped file stays mapped; there is no second copy). bias: [N] or None.
    """

    __slots__ = ("_padded", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self._padded = weight, bias
        if (missing := _NARROWEST - weight.shape[0]) > 0:
            wide = None if bias is None else functional.pad(bias, (0, missing))
            self._padded = functional.pad(weight, (0, 0, 0, missing)), wide

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]; any M, zero included."""
        rows, n = x.shape[0], self.weight.shape[0]
        if rows == TILE:
            return self._tile(x)
        out = x.new_empty((rows, n))
        for first in range(0, rows, TILE):
            tile = x[first : first + TILE]
            used = tile.shape[0]
            if used < TILE:
                tile = functional.pad(tile, (0, 0, 0, TILE - used))
            out[first : first + used] = self._tile(tile)[:used]
        return out

    def _tile(self, x: Tensor) -> Tensor:
        return functional.linear(x, *self._padded)[:, : self.weight.shape[0]]


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows `ids` (int64 [M]) of `weight` [V, H] -> [M, H]; a tied embedding passes the output matrix's weight."""
    return weight.index_select(0, ids)
