"""Into which pieces an iteration's attention is cut: the `items` and `tiles` of a `DeviceLayout`, computed on the host.

Pure functions of numpy arrays, vectorised, since they run before every iteration.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from orcaserve.ops.gpu.layout import SPAN


def decode_items(
    positions: NDArray[np.integer], window: int | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(items [n], first_items [D + 1]) of decodes at `positions` [D], below 2**15 of them; -1 is padding, and has none.

    window: that of all layers; None if they differ.
    """
    last = positions // SPAN
    first = np.zeros_like(last) if window is None else np.maximum(positions - window + 1, 0) // SPAN
    counts = last - first + 1
    first_items = np.zeros(len(positions) + 1, np.int32)
    np.cumsum(counts, out=first_items[1:])
    tokens = np.repeat(np.arange(len(positions)), counts)
    spans = np.arange(first_items[-1]) - np.repeat(first_items[:-1] - first, counts)
    return (tokens << 16 | spans).astype(np.int32), first_items


def chunk_tiles(
    firsts: NDArray[np.integer], counts: NDArray[np.integer], seats: NDArray[np.integer], tile_tokens: int
) -> NDArray[np.int32]:
    """[T, 3] of (first token, number of tokens, seat): chunks of `counts` tokens from `firsts` on, cut into tiles."""
    tiles = -(-counts // tile_tokens)
    chunk = np.repeat(np.arange(len(counts)), tiles)
    before = (np.arange(len(chunk)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile_tokens
    sizes = np.minimum(counts[chunk] - before, tile_tokens)
    return np.stack([firsts[chunk] + before, sizes, seats[chunk]], axis=1).astype(np.int32)
