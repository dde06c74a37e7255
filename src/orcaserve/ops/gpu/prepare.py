"""What an iteration begins and ends with on a device: its tokens and their places out of what the host staged, and the
tokens drawn kept for the next one. The host need not know them to stage the next iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

_TILE = 256
_WRITERS = 16  # programs that write block tables, however many updates there are


@dataclass(frozen=True, eq=False, slots=True)
class Staged:
    """What the host says of an iteration of M tokens: int32 tensors on the device, views of one buffer it filled.

    ids: [M], a token, or -1 for the last one drawn at its seat. seats: [M], -1 is padding. starts: [M], positions.
    updates: [at least num_updates[0], 3], (seat, index, block) of the block tables, no place twice. num_updates: [1].
    """

    ids: Tensor
    seats: Tensor
    starts: Tensor
    updates: Tensor
    num_updates: Tensor


def prepare(
    staged: Staged, last_tokens: Tensor, tables: Tensor, token_ids: Tensor, positions: Tensor, slots: Tensor,
    *, block_size: int,
) -> None:  # fmt: skip
    """Brings int32 tables [S, W] up to date, then writes int32 token_ids, positions and slots, [M] each.

    last_tokens: int32 [S]. A slot is block * block_size + offset. Padding gets token 0, position 0 and slot -1.
    """
    _update_tables[(_WRITERS,)](staged.updates, staged.num_updates, tables, tables.stride(0), TILE=_TILE)
    count = staged.ids.shape[0]
    _resolve[(-(-count // _TILE),)](
        staged.ids, staged.seats, staged.starts, last_tokens, tables, tables.stride(0), token_ids, positions, slots,
        count,
        BLOCK_SIZE=block_size, TILE=_TILE,
    )  # fmt: skip


def commit(tokens: Tensor, row_seats: Tensor, last_tokens: Tensor) -> None:
    """Keeps int32 tokens [R] in int32 last_tokens [S]; a failed row (-1) leaves 0.

    row_seats: int32 [R], -1 is padding.
    """
    count = tokens.shape[0]
    _commit[(-(-count // _TILE),)](tokens, row_seats, last_tokens, count, TILE=_TILE)


@triton.jit
def _update_tables(updates, num_updates, tables, width, TILE: tl.constexpr):
    count = tl.load(num_updates)
    begin = tl.program_id(0) * TILE
    while begin < count:
        update = begin + tl.arange(0, TILE)
        is_there = update < count
        seat = tl.load(updates + update * 3, mask=is_there, other=0)
        index = tl.load(updates + update * 3 + 1, mask=is_there, other=0)
        block = tl.load(updates + update * 3 + 2, mask=is_there, other=0)
        tl.store(tables + seat.to(tl.int64) * width + index, block, mask=is_there)
        begin += tl.num_programs(0) * TILE


@triton.jit(do_not_specialize=["count"])
def _resolve(
    ids, seats, starts, last_tokens, tables, width, token_ids, positions, slots, count,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_there = token < count
    seat = tl.load(seats + token, mask=is_there, other=-1)
    is_seated = seat >= 0
    position = tl.load(starts + token, mask=is_seated, other=0)
    given = tl.load(ids + token, mask=is_seated, other=0)
    last = tl.load(last_tokens + seat, mask=is_seated & (given < 0), other=0)
    block = tl.load(tables + seat.to(tl.int64) * width + position // BLOCK_SIZE, mask=is_seated, other=0)
    tl.store(token_ids + token, tl.where(given < 0, last, given), mask=is_there)
    tl.store(positions + token, position, mask=is_there)
    tl.store(slots + token, tl.where(is_seated, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=is_there)


@triton.jit(do_not_specialize=["count"])
def _commit(tokens, row_seats, last_tokens, count, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    seat = tl.load(row_seats + row, mask=row < count, other=-1)
    token = tl.load(tokens + row, mask=row < count, other=0)
    tl.store(last_tokens + seat, tl.maximum(token, 0), mask=seat >= 0)
