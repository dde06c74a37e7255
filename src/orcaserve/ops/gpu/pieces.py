"""Into which tiles an iteration's attention is cut, computed on the host: the `tiles` of a `DeviceLayout`.

A pure function of numpy arrays, vectorised, since it runs before every iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orcaserve.ops.gpu.layout import SPAN

FIELDS = 8  # of a tile

Ints = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Cutter:
    """tile_tokens: that a tile may have. kv_heads: each is a program of its own. programs: that run at a time."""

    tile_tokens: int
    kv_heads: int
    programs: int

    @property
    def most_dealt(self) -> int:
        """How many tokens at most have their spans dealt out, and how many tiles there are at most because of it."""
        return self.programs // self.kv_heads

    def cut(self, firsts: Ints, counts: Ints, starts: Ints, seats: Ints) -> NDArray[np.int32]:
        """[T, FIELDS], those that take longest first. Of each row: its first token, how many, its position, its seat.

        A token by itself whose spans are more than an equal share of all that the programs have to do is cut into as
        many tiles as it takes; their states lie side by side, from `states` on, one for each span of the token.
        """
        tiles = -(-counts // self.tile_tokens)
        row = np.repeat(np.arange(len(counts)), tiles)
        before = (np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * self.tile_tokens
        sizes = np.minimum(counts[row] - before, self.tile_tokens)
        spans = (starts[row] + before + sizes - 1) // SPAN + 1
        share = max(1, -(-int(spans.sum()) * self.kv_heads // self.programs))
        shares = np.where(sizes == 1, -(-spans // share), 1)
        kept = np.where(shares > 1, spans, 0)
        tile = np.repeat(np.arange(len(row)), shares)
        place = np.arange(len(tile)) - np.repeat(np.cumsum(shares) - shares, shares)
        begin, end = place * spans[tile] // shares[tile], (place + 1) * spans[tile] // shares[tile]
        row, before = row[tile], before[tile]
        fields = (
            firsts[row] + before,
            sizes[tile],
            starts[row] + before,
            seats[row],
            begin,
            end,
            shares[tile],
            (np.cumsum(kept) - kept)[tile],
        )
        return np.stack(fields, axis=1)[np.argsort(begin - end, kind="stable")].astype(np.int32)
