"""Which tile the programs of a product have, and into how many segments K is cut: plain decisions.

Any tile would give the same bits. Segments are part of a product's numerics, and hang on its matrix alone.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from orcaserve.ops.gpu.quantised import UNIT

_UNIT = 256  # a segment's length is a multiple of it, so that any BLOCK_K up to it meets the same boundaries
_LONG = 512  # a segment is at least so long, but for the last
PROCESSORS = 132  # of the cards it was measured on
PROGRAMS = 128  # what N's tiles of 64 times the segments should come to: about one for each of the 132 processors
_MOST = 8


def cdiv(x: int, y: int) -> int:
    # triton's own is for its compiler: of a call of it the host would feel the time
    return -(-x // y)


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program computes: block_n outputs of block_m tokens, K in steps of block_k, `stages` of them in flight.

    split: the segments of K belong to different programs.
    """

    block_n: int
    block_m: int
    block_k: int
    warps: int
    stages: int
    split: bool = False


@dataclass(frozen=True, slots=True)
class Pace:
    """How long programs with such a tile take, in microseconds on an H200.

    shared: a thousand of K, by how many of them share a processor, up to as many as there is room for. begin: besides.
    """

    tile: Tile
    shared: tuple[float, ...]
    begin: float


# By whether they are gated. Fitted by `tools/tile_paces.py` to timings of eight matrices and 72 to 2064 tokens on an
# H200: nine in ten are foretold within 17 %, and the tile that is chosen is within 3 % of the best as often.
PACES = {
    False: (
        Pace(Tile(64, 32, 256, 4, 4), (1.84,), 1.2),
        Pace(Tile(64, 64, 64, 4, 5), (3.82, 4.99), 1.6),
        Pace(Tile(64, 64, 128, 4, 5), (2.71,), 1.4),
        Pace(Tile(64, 128, 128, 4, 4), (3.82,), 1.0),
        Pace(Tile(128, 64, 64, 8, 4), (5.22, 7.58), 1.8),
        Pace(Tile(128, 128, 64, 8, 5), (5.71,), 2.4),
        Pace(Tile(128, 256, 64, 8, 4), (9.82,), 5.2),
    ),
    True: (
        Pace(Tile(64, 64, 64, 4, 4), (7.52, 8.55), 1.3),
        Pace(Tile(64, 64, 128, 4, 3), (4.99,), 3.1),
        Pace(Tile(64, 128, 64, 4, 4), (6.89,), 3.3),
        Pace(Tile(128, 64, 64, 8, 4), (7.68,), 2.3),
        Pace(Tile(128, 128, 64, 8, 4), (11.53,), 3.4),
    ),
}


@functools.cache
def segments(n: int, k: int) -> int:
    """Into how many pieces of equal length (the last may be shorter) the sum over K is cut, for N outputs."""
    count = 1
    while cdiv(n, 64) * count < PROGRAMS and count < _MOST and 2 * count * _LONG <= k:
        count *= 2
    return cdiv(k, segment_length(k, count))


def segment_length(k: int, count: int) -> int:
    return cdiv(cdiv(k, count), _UNIT) * _UNIT


def tiles(m: int, n: int, k: int, *, gated: bool, dtype: torch.dtype) -> Tile:
    """The tile for M tokens. Any would give the same bits; `gated` computes two times block_n outputs at once.

    Up to 64 tokens what was quickest of those that `tools/tune_gpu.py` tries on an H200; it prints them all.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 2)
    if m > 64:
        return _quickest(m, n, k, gated)
    count = segments(n, k)
    # Sums that meet in memory cost their bytes; where few programs would read the weights, that is less than it gains.
    split = count > 1 and n <= 64 * 64 and k >= 2048 and 16 * count * m <= k
    # So few outputs that programs of few tokens each, which all read the same weights, are quicker than few programs.
    few = n <= 64 * 16 and not gated
    many = n >= 128 * 2 * PROCESSORS and not gated  # programs come and go all the time
    if m <= 16:
        if gated:
            return Tile(64, 16, 64, 4, 4) if k >= 2048 else Tile(32, 16, 256, 4, 3)
        return Tile(128, 16, 128, 4, 3) if many else Tile(64, 16, 256, 4, 3, split)
    if few:
        return Tile(64, 16, 256, 4, 3 if m <= 32 else 4, split)
    if m <= 32:
        return Tile(64, 32, 128, 4, 3) if gated else Tile(64, 32, 128, 4, 4 if many else 5, split)
    if gated:
        return Tile(64, 64, 64, 4, 4) if k >= 2048 else Tile(64, 64, 128, 4, 4)
    # a program that has a processor to itself must keep more bytes on their way
    alone = cdiv(n, 64) * (count if split else 1) <= PROCESSORS
    return Tile(64, 64, 128, 4, 5 if alone else 3, split)


def _quickest(m: int, n: int, k: int, gated: bool) -> Tile:
    """The tile for more than 64 tokens: programs come in waves, and the last wave takes as long as a full one.

    Chosen for m rounded up, so that a few sizes bring in all tiles when a worker has them compiled.
    """
    if m > 2048:
        return Tile(128, 128, 64, 8, 4) if gated else Tile(128, 256, 64, 8, 4)
    step = 32 if m <= 256 else 64 if m <= 1024 else 128
    least_m, m = m, cdiv(m, step) * step
    best, least = PACES[gated][0].tile, math.inf
    for pace in PACES[gated]:
        if pace.tile.block_m > least_m and not gated:
            continue  # a box that reaches past the last row is brought slowly
        room = len(pace.shared)
        programs = cdiv(n, pace.tile.block_n) * cdiv(m, pace.tile.block_m)
        full, rest = divmod(programs, room * PROCESSORS)
        waves = full * pace.shared[-1] + (pace.shared[cdiv(rest, PROCESSORS) - 1] if rest else 0.0)
        took = pace.begin + waves * k / 1000
        if took < least:
            best, least = pace.tile, took
    return best


def coded_tiles(m: int, n: int, k: int, *, gated: bool, dtype: torch.dtype, packed: bool) -> Tile:
    """The same for a weight in 8 bits, or packed in 4. Reasoned, not measured.

    Few tokens wait for memory: it counts how many bytes of weights a processor has on their way, and a weight takes
    a half or a quarter of the room, so that two or three programs share a processor where one of `tiles` fills it. All
    tiles are of 64 outputs at least: those that take their weights from registers use one instruction for all tokens.
    """
    if dtype == torch.float32:
        return Tile(32, 32, UNIT if packed else 32, 4, 2)
    count = segments(n, k)
    # twice as many outputs as in `tiles` are split: a processor has room for two programs, and needs them
    split = not gated and count > 1 and n <= 64 * 128 and k >= 2048 and 16 * count * m <= k
    large = cdiv(n, 128) * cdiv(m, 128)
    if m <= 32:
        # programs of 50 to 75 KiB, each with four or five times 8 KiB of weights on their way, or 4 where packed
        return Tile(64, 16 if m <= 16 else 32, UNIT, 4, 4 if gated else 6 if packed else 5, split)
    if m <= 64:
        return Tile(64, 64, UNIT, 4, 4, split)
    if m <= 256 and large < 96:
        return Tile(64, 64 if gated else 128, UNIT, 4, 3)
    # twice as many tokens would not fit into registers beside weights, but for one sum of weights in 8 bits
    if packed or gated or count > 1 or large < 264:
        return Tile(128, 128, UNIT if packed else 64, 8, 3 if packed else 4)
    return Tile(128, 256, 64, 8, 3)
