"""Attention over a paged KV cache on a device, with the promise: a token's bits depend on its own request alone.

Not on whether it is decoded or part of a chunk of a prompt, nor on the chunks, the tiles or the batch. A decode's
spans are attended to by whichever programs are free, and their states merged by a second kernel; a tile of a prompt
walks its spans alone. Both use the arithmetic of `spans`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.overlap import begin as let_next_begin
from orcaserve.ops.gpu.overlap import overlaps, wait
from orcaserve.ops.gpu.spans import answer, attend, empty_state, merge, read_cache, read_pages, score

LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What changes speed and no bits. Stages: blocks of keys and values that are on their way at a time."""

    decode_stages: int = 3
    decode_programs: int = 2  # per processor of the device
    prefill_stages: int = 3
    prefill_rows: int = 64  # queries * heads of a group in a tile: a multiple of 64

    @classmethod
    def of(cls, d: int) -> Tuning:
        """What suits heads of d values."""
        return cls() if d <= 128 else cls(decode_stages=2, decode_programs=1, prefill_stages=2)


@dataclass(frozen=True, eq=False, slots=True)
class Scratch:
    """The states of spans between the two kernels of decode; one serves all layers, since they follow each other.

    gathered: float32 [max items, heads, d]. peaks, masses: float32 [max items, heads]. processors: of the device.
    """

    gathered: Tensor
    peaks: Tensor
    masses: Tensor
    processors: int

    @classmethod
    def empty(cls, max_items: int, heads: int, d: int, device: torch.device) -> Scratch:
        cuda = device.type == "cuda"
        return cls(
            torch.empty((max_items, heads, d), device=device),
            torch.empty((max_items, heads), device=device),
            torch.empty((max_items, heads), device=device),
            torch.cuda.get_device_properties(device).multi_processor_count if cuda else 2,
        )


def tile_tokens(group: int, dtype: torch.dtype, tuning: Tuning) -> int:
    """How many tokens a tile of a prompt may have, with `group` query heads to a kv head."""
    return _rows(dtype, tuning.prefill_rows) // group


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DeviceLayout,
    scratch: Scratch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """q [M, heads * d] -> [M, heads * d]; each token sees what the cache holds of its request up to its position.

    k, v: [blocks, kv heads, block size, d], in the dtype of q, which has contiguous rows. scale: positive. window: a
    query at p sees positions > p - window. softcap: scores become softcap * tanh(score / softcap). slopes: float32
    [heads] of ALiBi: slope * (position of the key - position of the query) is added to a score. The layout's items
    may name spans that the window hides; a token of the first `num_decodes` without items gets zeros. Raises
    ValueError where there are more items than the scratch has room for.
    """
    kv_heads, block_size, d = k.shape[1:]
    heads = q.shape[1] // d
    if layout.items.shape[0] > scratch.peaks.shape[0]:
        raise ValueError(f"{layout.items.shape[0]} items of attention, and room for {scratch.peaks.shape[0]}")
    tuning = Tuning.of(d) if tuning is None else tuning
    out = q.new_empty(q.shape)
    # the kernels count in powers of two
    cap = None if softcap is None else softcap * LOG2_E.value
    scale = scale * LOG2_E.value if softcap is None else scale * 2 * LOG2_E.value / softcap
    overlap = overlaps(q.device)
    runs = {"OVERLAP": overlap, "launch_pdl": overlap, "enable_fp_fusion": False}
    numbers = {"scale": scale, "cap": cap, "slopes": slopes, "WINDOW": window}
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "D": d,
        "SPAN": SPAN,
        "BLOCK_SIZE": block_size,
        "BLOCK_N": 64,
        "BLOCK_D": max(16, 1 << (d - 1).bit_length()),
    }
    tables, strides = layout.tables, {"q_stride": q.stride(0), "table_stride": layout.tables.stride(0)}
    if layout.num_decodes:
        states = (scratch.gathered, scratch.peaks, scratch.masses)
        rows = _rows(q.dtype, 64)
        # an odd number of programs: else the short spans, which come at even steps, would all fall to the same few
        _decode_kernel[(scratch.processors * tuning.decode_programs - 1,)](
            q, k, v, *states, layout.positions, layout.seats, tables, layout.items, layout.first_items,
            num_decodes=layout.num_decodes, ROWS=rows, **numbers, **shape, **strides,
            num_warps=4, num_stages=tuning.decode_stages, **runs,
        )  # fmt: skip
        _combine_kernel[(layout.num_decodes * heads,)](
            *states, out, layout.first_items, HEADS=heads, D=d, BLOCK_D=shape["BLOCK_D"],
            num_warps=1, **runs,
        )  # fmt: skip
    if layout.tiles.shape[0]:
        rows = _rows(q.dtype, tuning.prefill_rows)
        _prefill_kernel[(layout.tiles.shape[0] * kv_heads,)](
            q, k, v, out, layout.positions, tables, layout.tiles, ROWS=rows, **numbers, **shape, **strides,
            num_warps=max(4, rows // 16), num_stages=tuning.prefill_stages, **runs,
        )  # fmt: skip
    return out


def _rows(dtype: torch.dtype, rows: int) -> int:
    """float32 is not multiplied by matrix instructions: there a few rows are as good as many."""
    return rows if dtype.itemsize == 2 else 16


@triton.jit
def _read_queries(
    q, first, count, head, q_stride, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[ROWS, BLOCK_D]: the heads of the kv head's group, of each of the tokens [first, first + count)."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    place = q + (first + row // GROUP).to(tl.int64)[:, None] * q_stride
    place += ((head * GROUP + row % GROUP) * D)[:, None] + column[None, :]
    return tl.load(place, mask=(row // GROUP < count)[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_decodes"])
def _decode_kernel(
    q,
    k,
    v,
    gathered_out,
    peaks_out,
    masses_out,
    positions,
    seats,
    tables,
    items,
    first_items,
    slopes,
    scale,
    cap,
    num_decodes,
    q_stride,
    table_stride,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The states of all items, one kv head of an item at a time."""
    let_next_begin(OVERLAP)
    wait(OVERLAP)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    units = tl.load(first_items + num_decodes) * KV_HEADS
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        index = unit // KV_HEADS
        head = unit % KV_HEADS
        item = tl.load(items + index)
        token = item >> 16
        span = item & 0xFFFF
        position = tl.load(positions + token)
        table = tables + tl.load(seats + token).to(tl.int64) * table_stride
        first = span * SPAN
        if WINDOW is not None:
            first = tl.maximum(first, position - WINDOW + 1)
        last = tl.minimum(position, span * SPAN + SPAN - 1)
        queries = _read_queries(q, token, 1, head, q_stride, GROUP, D, ROWS, BLOCK_D)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head * GROUP + row % GROUP) * LOG2_E
        own = tl.full([ROWS], 0, tl.int32) + position

        peak, mass, gathered = empty_state(ROWS, BLOCK_D)
        begin = first // BLOCK_N * BLOCK_N
        pages = read_pages(table, begin, last, BLOCK_N, BLOCK_SIZE)
        for start in range(begin, last + 1, BLOCK_N):
            block_k = read_cache(k, pages, head, start, first, last, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE)
            block_v = read_cache(v, pages, head, start, first, last, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE)
            # one block ahead, so that its keys need not wait for it
            pages = read_pages(table, start + BLOCK_N, last, BLOCK_N, BLOCK_SIZE)
            hides = (start < first) | (start + BLOCK_N - 1 > last)
            seen = start + tl.arange(0, BLOCK_N)
            scores = score(queries, block_k)
            peak, mass, gathered = attend(
                peak, mass, gathered, scores, block_v, own, seen, hides, scale, cap, slope, WINDOW
            )

        place = (index + tl.zeros([ROWS], tl.int64)) * (KV_HEADS * GROUP) + head * GROUP + row
        tl.store(peaks_out + place, peak, mask=row < GROUP)
        tl.store(masses_out + place, mass, mask=row < GROUP)
        values = gathered_out + (place * D)[:, None] + column[None, :]
        tl.store(values, gathered, mask=(row < GROUP)[:, None] & (column < D)[None, :])


@triton.jit
def _combine_kernel(
    gathered_in,
    peaks_in,
    masses_in,
    out,
    first_items,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of a decode from the states of its spans."""
    let_next_begin(OVERLAP)
    wait(OVERLAP)
    token = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    column = tl.arange(0, BLOCK_D)[None, :]
    one = tl.zeros([1], tl.int64)
    peak, mass, gathered = empty_state(1, BLOCK_D)
    first = tl.load(first_items + token)
    end = tl.load(first_items + token + 1)
    for item in tl.range(first, end, loop_unroll_factor=8):
        place = (item + one) * HEADS + head
        later_peak = tl.load(peaks_in + place)
        later_mass = tl.load(masses_in + place)
        later = tl.load(gathered_in + (place * D)[:, None] + column, mask=column < D, other=0.0)
        peak, mass, gathered = merge(peak, mass, gathered, later_peak, later_mass, later)
    place = out + (tl.program_id(0) + one)[:, None] * D + column
    tl.store(place, answer(mass, gathered).to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _prefill_kernel(
    q,
    k,
    v,
    out,
    positions,
    tables,
    tiles,
    slopes,
    scale,
    cap,
    q_stride,
    table_stride,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One kv head of a tile."""
    let_next_begin(OVERLAP)
    wait(OVERLAP)
    # a chunk's last tiles have the most to do: they begin
    tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) // KV_HEADS * 3
    head = tl.program_id(0) % KV_HEADS
    token = tl.load(tile)
    count = tl.load(tile + 1)
    table = tables + tl.load(tile + 2).to(tl.int64) * table_stride
    low = tl.load(positions + token)
    last = low + count - 1
    first = 0
    if WINDOW is not None:
        first = tl.maximum(low - WINDOW + 1, 0)
    row = tl.arange(0, ROWS)
    own = low + row // GROUP
    queries = _read_queries(q, token, count, head, q_stride, GROUP, D, ROWS, BLOCK_D)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head * GROUP + row % GROUP) * LOG2_E

    peak, mass, gathered = empty_state(ROWS, BLOCK_D)
    span_peak, span_mass, span_gathered = empty_state(ROWS, BLOCK_D)
    begin = first // BLOCK_N * BLOCK_N
    pages = read_pages(table, begin, last, BLOCK_N, BLOCK_SIZE)
    for start in range(begin, last + 1, BLOCK_N):
        block_k = read_cache(k, pages, head, start, first, last, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE)
        block_v = read_cache(v, pages, head, start, first, last, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE)
        # one block ahead, so that its keys need not wait for it
        pages = read_pages(table, start + BLOCK_N, last, BLOCK_N, BLOCK_SIZE)
        hides = start + BLOCK_N - 1 > low
        if WINDOW is not None:
            hides |= start <= last - WINDOW
        seen = start + tl.arange(0, BLOCK_N)
        scores = score(queries, block_k)
        if start % SPAN == 0:
            peak, mass, gathered = merge(peak, mass, gathered, span_peak, span_mass, span_gathered)
            span_peak, span_mass, span_gathered = empty_state(ROWS, BLOCK_D)
        span_peak, span_mass, span_gathered = attend(
            span_peak, span_mass, span_gathered, scores, block_v, own, seen, hides, scale, cap, slope, WINDOW
        )
    peak, mass, gathered = merge(peak, mass, gathered, span_peak, span_mass, span_gathered)

    column = tl.arange(0, BLOCK_D)
    place = out + (token + row // GROUP).to(tl.int64)[:, None] * (KV_HEADS * GROUP * D)
    place += ((head * GROUP + row % GROUP) * D)[:, None] + column[None, :]
    visible = (row // GROUP < count)[:, None] & (column < D)[None, :]
    tl.store(place, answer(mass, gathered).to(out.dtype.element_ty), mask=visible)
