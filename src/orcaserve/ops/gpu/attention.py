"""Attention over a paged KV cache on a device, with the promise: a token's bits depend on its own request alone.

Not on whether it is decoded or part of a chunk of a prompt, nor on the chunks, the tiles or the batch. A decode's
spans are dealt out to programs, the last of which to end merges the states of all; a tile of a prompt walks its spans
alone. Both use the arithmetic of `spans`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.overlap import barrier, overlaps, prefetch, wait
from orcaserve.ops.gpu.overlap import begin as let_next_begin
from orcaserve.ops.gpu.spans import answer, attend, empty_state, locate, merge, read_cache, read_pages, score

LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True, slots=True)
class Tuning:
    """What changes speed and no bits. Stages: blocks of keys and values that are on their way at a time."""

    decode_stages: int = 3
    decode_programs: int = 2  # per processor of the device
    decode_early: bool = True  # whether a program's first span is fetched while the kernel before ends
    prefill_stages: int = 3
    prefill_rows: int = 64  # queries * heads of a group in a tile: a multiple of 64

    @classmethod
    def of(cls, d: int) -> Tuning:
        """What suits heads of d values."""
        return cls() if d <= 128 else cls(decode_stages=2, decode_programs=1, prefill_stages=2, prefill_rows=128)


@dataclass(frozen=True, eq=False, slots=True)
class Scratch:
    """The states of spans that are to be merged; one serves all layers, since they follow each other.

    gathered: float32 [max items, heads, d]. peaks, masses: float32 [max items, heads]. arrived: int32 [max items,
    heads], zeros but within the kernel: states that are there. processors: of the device.
    """

    gathered: Tensor
    peaks: Tensor
    masses: Tensor
    arrived: Tensor
    processors: int

    @classmethod
    def empty(cls, max_items: int, heads: int, d: int, device: torch.device) -> Scratch:
        cuda = device.type == "cuda"
        return cls(
            torch.empty((max_items, heads, d), device=device),
            torch.empty((max_items, heads), device=device),
            torch.empty((max_items, heads), device=device),
            torch.zeros((max_items, heads), dtype=torch.int32, device=device),
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
    may name spans that the window hides; padding among the first `num_decodes` gets zeros. Raises
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
        states = (scratch.gathered, scratch.peaks, scratch.masses, scratch.arrived)
        rows = _rows(q.dtype, 64)
        # an odd number of programs: else the short spans, which come at even steps, would all fall to the same few
        _decode_kernel[(scratch.processors * tuning.decode_programs - 1,)](
            q, k, v, *states, out, layout.slots, tables, layout.items, layout.num_items,
            num_decodes=layout.num_decodes, ROWS=rows, GROUP_ROWS=1 << (heads // kv_heads - 1).bit_length(),
            EARLY=overlap and tuning.decode_early, INTERPRETED=q.device.type != "cuda", **numbers, **shape, **strides,
            num_warps=4, num_stages=tuning.decode_stages, **runs,
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


@triton.jit
def _read_item(items, unit, units, KV_HEADS: tl.constexpr):
    """(token, span, position, seat, number of the token's items); past the end whatever may be read."""
    record = items + unit // KV_HEADS * 4
    there = unit < units
    place = tl.load(record, mask=there, other=0)
    position = tl.load(record + 1, mask=there, other=0)
    seat = tl.load(record + 2, mask=there, other=0)
    count = tl.load(record + 3, mask=there, other=0)
    return place >> 16, place & 0xFFFF, position, seat, count


@triton.jit
def _shown(span, position, WINDOW: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first and the last position of a span that a query at `position` sees, and where its first block begins.

    A span that the window hides has one block all the same, in which nothing is seen.
    """
    first = span * SPAN
    last = tl.minimum(position, span * SPAN + SPAN - 1)
    if WINDOW is not None:
        first = tl.maximum(first, position - WINDOW + 1)
    return first, last, tl.minimum(first, last) // BLOCK_N * BLOCK_N


@triton.jit
def _count_blocks(
    items, units, KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, BLOCK_N: tl.constexpr
):
    """How many blocks this program attends to, in all of its units."""
    stride = tl.num_programs(0)
    blocks = tl.zeros([32], tl.int32)
    for some in range(tl.program_id(0), units, stride * 32):
        unit = some + tl.arange(0, 32) * stride
        _, span, position, _, _ = _read_item(items, unit, units, KV_HEADS)
        _, last, start = _shown(span, position, WINDOW, SPAN, BLOCK_N)
        blocks += tl.where(unit < units, (last - start) // BLOCK_N + 1, 0)
    return tl.sum(blocks, 0)


@triton.jit
def _merge_if_last(
    gatherings,
    peaks,
    masses,
    arrived,
    out,
    token,
    head,
    first,
    count,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The answer of a token's group of heads, whose states are those of `count` items from `first` on."""
    if not INTERPRETED:
        barrier()  # all threads have stored their part of the state
    counter = arrived + first * (HEADS // GROUP) + head
    if tl.atomic_add(counter, 1, sem="acq_rel") == count - 1:
        tl.store(counter, 0)
        row = tl.arange(0, GROUP_ROWS)
        column = tl.arange(0, BLOCK_D)[None, :]
        peak, mass, gathered = empty_state(GROUP_ROWS, BLOCK_D)
        for item in range(first, first + count, 8):
            # all that is to be merged next is on its way at once; what is past the end is nothing
            place = (item + tl.zeros([GROUP_ROWS], tl.int64)) * HEADS + head * GROUP + row
            values = gatherings + (place * D)[:, None] + column
            states = ()
            for ahead in tl.static_range(8):
                there = (item + ahead < first + count) & (row < GROUP)
                at = place + ahead * HEADS
                later_peak = tl.load(peaks + at, mask=there, other=float("-inf"), cache_modifier=".cg")
                later_mass = tl.load(masses + at, mask=there, other=0.0, cache_modifier=".cg")
                inside = there[:, None] & (column < D)
                later = tl.load(values + ahead * (HEADS * D), mask=inside, other=0.0, cache_modifier=".cg")
                states += ((later_peak, later_mass, later),)
            for ahead in tl.static_range(8):
                later_peak, later_mass, later = states[ahead]
                peak, mass, gathered = merge(peak, mass, gathered, later_peak, later_mass, later)
        place = out + token.to(tl.int64) * (HEADS * D) + ((head * GROUP + row) * D)[:, None] + column
        tl.store(place, answer(mass, gathered).to(out.dtype.element_ty), mask=(row < GROUP)[:, None] & (column < D))


@triton.jit
def _store_halves(rows, values, GROUP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The first GROUP of `values` [ROWS, BLOCK_D], in two parts, so that few are in shared memory at a time."""
    HALF: tl.constexpr = BLOCK_D // 2
    own = (tl.arange(0, ROWS) < GROUP)[:, None]
    column = tl.arange(0, HALF)[None, :]
    low, high = tl.split(tl.permute(tl.reshape(values, [ROWS, 2, HALF]), [0, 2, 1]))
    tl.store(rows + column, low, mask=own & (column < D))
    tl.store(rows + HALF + column, high, mask=own & (HALF + column < D))


@triton.jit
def _finish(
    gatherings,
    peaks,
    masses,
    arrived,
    out,
    unit,
    token,
    span,
    position,
    count,
    peak,
    mass,
    gathered,
    SPAN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The answer of a token that has one span; else the span's state, and the answer if it is the last to come."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    row = tl.arange(0, ROWS)
    head = unit % KV_HEADS
    index = unit // KV_HEADS
    if count == 1:
        place = out + token.to(tl.int64) * (HEADS * D) + ((head * GROUP + row) * D)[:, None]
        _store_halves(place, answer(mass, gathered).to(out.dtype.element_ty), GROUP, D, ROWS, BLOCK_D)
    else:
        state = index.to(tl.int64) * HEADS + head * GROUP + row
        tl.store(peaks + state, peak, mask=row < GROUP)
        tl.store(masses + state, mass, mask=row < GROUP)
        _store_halves(gatherings + (state * D)[:, None], gathered, GROUP, D, ROWS, BLOCK_D)
        first = index - span + position // SPAN + 1 - count
        _merge_if_last(
            gatherings, peaks, masses, arrived, out, token, head, first, count,
            HEADS, GROUP, D, BLOCK_D, GROUP_ROWS, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _bring_near(
    cache,
    pages,
    head,
    start,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
<<<<<<< HEAD
    """Fetches what `read_cache` will read. What is written there meanwhile is no harm: that cache is everybody's."""
    rows = locate(cache, pages, head, start, KV_HEADS, D, BLOCK_N, BLOCK_SIZE)
    prefetch(rows, tl.full([BLOCK_N], D * cache.dtype.element_ty.primitive_bitwidth // 8, tl.int32))
=======
    """Has what `read_cache` will read brought to the second-level cache, through which all writes go."""
    LINE: tl.constexpr = 1024 // cache.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = BLOCK_D // LINE if BLOCK_D > LINE else 1
    column = tl.minimum(tl.arange(0, LINES) * LINE, D - 1)
    prefetch(locate(cache, pages, head, start, KV_HEADS, D, BLOCK_N, BLOCK_SIZE)[:, None] + column[None, :])
>>>>>>> attn2


@triton.jit
def _clear_padding(out, slots, slot, num_decodes, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zeros for a share of the padding. slot: that of the first token of this program."""
    column = tl.arange(0, BLOCK_D)
    token = tl.program_id(0)
    while token < num_decodes:
        if slot < 0:
            for head in range(HEADS):
                place = out + (token.to(tl.int64) * HEADS + head) * D + column
                tl.store(place, tl.zeros([BLOCK_D], out.dtype.element_ty), mask=column < D)
        token += tl.num_programs(0)
        slot = tl.load(slots + token, mask=token < num_decodes, other=0)


@triton.jit(do_not_specialize=["num_decodes"])
def _decode_kernel(
    q,
    k,
    v,
    gatherings,
    peaks,
    masses,
    arrived,
    out,
    slots,
    tables,
    items,
    num_items,
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
    GROUP_ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """All decodes, one kv head of an item (a unit) at a time.

    A step is a block of a unit, and the steps of all its units are one loop, so that blocks of the next unit are on
    their way while one ends. What says where a block is, is loaded a step before it is used.
    """
    let_next_begin(OVERLAP)
    stride = tl.num_programs(0)
    unit = tl.program_id(0)
    units = tl.load(num_items) * KV_HEADS
    steps = _count_blocks(items, units, KV_HEADS, WINDOW, SPAN, BLOCK_N)
    token, span, position, seat, count = _read_item(items, unit, units, KV_HEADS)
    next_token, next_span, next_position, next_seat, next_count = _read_item(items, unit + stride, units, KV_HEADS)
    first, last, start = _shown(span, position, WINDOW, SPAN, BLOCK_N)
    table = tables + seat.to(tl.int64) * table_stride
    pages = read_pages(table, start, last, BLOCK_N, BLOCK_SIZE)
    slot = tl.load(slots + unit, mask=unit < num_decodes, other=0)
    if EARLY:
        # the token's own keys and values may not be written yet: what is brought nearer is not read yet either
        for block in tl.static_range(SPAN // BLOCK_N):
            at = start + block * BLOCK_N
            if (at <= last) & (unit < units):
                some = read_pages(table, at, last, BLOCK_N, BLOCK_SIZE)
                _bring_near(k, some, unit % KV_HEADS, at, KV_HEADS, D, BLOCK_N, BLOCK_SIZE)
                _bring_near(v, some, unit % KV_HEADS, at, KV_HEADS, D, BLOCK_N, BLOCK_SIZE)
    wait(OVERLAP)
    _clear_padding(out, slots, slot, num_decodes, KV_HEADS * GROUP, D, BLOCK_D)
    queries = _read_queries(q, token, 1, unit % KV_HEADS, q_stride, GROUP, D, ROWS, BLOCK_D)
    peak, mass, gathered = empty_state(ROWS, BLOCK_D)
    old_token, old_span, old_position, old_count = token, span, position, 0
    row = tl.arange(0, ROWS)
    for _ in range(steps):
        head = unit % KV_HEADS
        block_k = read_cache(k, pages, head, start, first, last, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE)
        block_v = read_cache(v, pages, head, start, first, last, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE)
        scores = score(queries, block_k)
        # here, and not where a unit ends: what a product gave may be used within an `if` only in the step after it
        if (start <= first) & (old_count > 0):
            _finish(
                gatherings, peaks, masses, arrived, out, unit - stride, old_token, old_span, old_position, old_count,
                peak, mass, gathered, SPAN, KV_HEADS, GROUP, D, ROWS, BLOCK_D, GROUP_ROWS, INTERPRETED,
            )  # fmt: skip
            peak, mass, gathered = empty_state(ROWS, BLOCK_D)
        hides = (start < first) | (start + BLOCK_N - 1 > last)
        slope = None
        if slopes is not None:
            slope = tl.load(slopes + head * GROUP + row % GROUP) * LOG2_E
        own = tl.full([ROWS], 0, tl.int32) + position
        seen = start + tl.arange(0, BLOCK_N)
        peak, mass, gathered = attend(
            peak, mass, gathered, scores, block_v, own, seen, hides, scale, cap, slope, WINDOW
        )

        ends = start + BLOCK_N > last
        # chosen anew at every step: a loop that hands on what it was handed would not be pipelined
        old_token = tl.where(ends, token, old_token)
        old_span = tl.where(ends, span, old_span)
        old_position = tl.where(ends, position, old_position)
        old_count = tl.where(ends, count, old_count)
        unit = tl.where(ends, unit + stride, unit)
        token = tl.where(ends, next_token, token)
        span = tl.where(ends, next_span, span)
        position = tl.where(ends, next_position, position)
        seat = tl.where(ends, next_seat, seat)
        count = tl.where(ends, next_count, count)
        first, last, begin = _shown(span, position, WINDOW, SPAN, BLOCK_N)
        start = tl.where(ends, begin, start + BLOCK_N)
        next_token, next_span, next_position, next_seat, next_count = _read_item(items, unit + stride, units, KV_HEADS)
        pages = read_pages(tables + seat.to(tl.int64) * table_stride, start, last, BLOCK_N, BLOCK_SIZE)
        queries = _read_queries(q, token, 1, unit % KV_HEADS, q_stride, GROUP, D, ROWS, BLOCK_D)
    if steps > 0:
        _finish(
            gatherings, peaks, masses, arrived, out, unit - stride, old_token, old_span, old_position, old_count,
            peak, mass, gathered, SPAN, KV_HEADS, GROUP, D, ROWS, BLOCK_D, GROUP_ROWS, INTERPRETED,
        )  # fmt: skip


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
    begin = first // BLOCK_N * BLOCK_N
    pages = read_pages(table, begin, last, BLOCK_N, BLOCK_SIZE)
    wait(OVERLAP)
    queries = _read_queries(q, token, count, head, q_stride, GROUP, D, ROWS, BLOCK_D)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head * GROUP + row % GROUP) * LOG2_E

    peak, mass, gathered = empty_state(ROWS, BLOCK_D)
    span_peak, span_mass, span_gathered = empty_state(ROWS, BLOCK_D)
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
