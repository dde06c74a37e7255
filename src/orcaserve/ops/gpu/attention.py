"""Attention over a paged KV cache on a device, with the promise: a token's bits depend on its own request alone.

Not on whether it is decoded or part of a chunk of a prompt, nor on the chunks, the tiles or the batch. One kernel does
all: a program walks through the spans that a tile of tokens sees, for one kv head, and merges them in order. Where
tiles are too few to occupy the device, a token's spans are dealt out to several tiles, and the last program to come
merges their states, in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.overlap import begin as let_next_begin
from orcaserve.ops.gpu.overlap import overlaps, wait
from orcaserve.ops.gpu.pieces import FIELDS
from orcaserve.ops.gpu.spans import answer, attend, empty_state, merge, read_cache, read_pages, read_scales, score

LOG2_E = tl.constexpr(math.log2(math.e))
_FIELDS = tl.constexpr(FIELDS)
_BLOCK = 64  # positions that a tile meets at a time
_PER_PROCESSOR = 2  # programs that a processor of the device has room for


@dataclass(frozen=True, slots=True)
class Tuning:
    """What changes speed and no bits.

    stages: blocks of keys and values that are on their way at a time. rows: queries * heads of a group in a tile, a
    multiple of 64 in the dtypes that matrix instructions take.
    """

    stages: int
    rows: int

    @classmethod
    def of(cls, d: int, group: int, dtype: torch.dtype, *, scaled: bool = False) -> Tuning:
        """What suits heads of d values, `group` query heads to a kv head. scaled: the cache is one of bytes."""
        # float32 is not multiplied by matrix instructions: there a few rows are as good as many
        least = 64 if dtype.itemsize == 2 else 16
        # blocks of bytes are half as large: with one more on their way a processor still has room for two programs
        stages = 2 if d > 128 else 4 if scaled else 3
        return cls(stages, max(least, 1 << (group - 1).bit_length()))

    def tile_tokens(self, group: int) -> int:
        """How many tokens a tile may have."""
        return self.rows // group


@dataclass(frozen=True, eq=False, slots=True)
class Scratch:
    """The states of spans that were dealt out; one serves all layers, since they follow each other.

    gathered: float32 [max states, heads, d]. peaks, masses: float32 [max states, heads]. arrived: int32 [max states,
    heads], zeros between two launches: how many tiles of a token are there, at the place of its first state.
    """

    gathered: Tensor
    peaks: Tensor
    masses: Tensor
    arrived: Tensor

    @classmethod
    def empty(cls, max_states: int, heads: int, d: int, device: torch.device) -> Scratch:
        return cls(
            torch.empty((max_states, heads, d), device=device),
            torch.empty((max_states, heads), device=device),
            torch.empty((max_states, heads), device=device),
            torch.zeros((max_states, heads), dtype=torch.int32, device=device),
        )


def concurrent_programs(device: torch.device) -> int:
    """How many programs of attention run at a time."""
    if device.type != "cuda":
        return _PER_PROCESSOR
    return _PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DeviceLayout,
    scratch: Scratch,
    *,
    scales: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """q [M, heads * d] -> [M, heads * d]; each token sees what the cache holds of its request up to its position.

    k, v: [blocks, kv heads, block size, d], in the dtype of q, which has contiguous rows; or int8, with scales: float32
    [blocks, kv heads, block size, 2], what each vector of k and of v is multiplied with. One that is NaN makes NaN of
    the answers of those tokens that see it, and of no other; q is bfloat16 or float32 then, else ValueError.

    scale: positive. window: a query at p sees positions > p - window. softcap: scores become
    softcap * tanh(score / softcap). slopes: float32 [heads] of ALiBi: slope * (position of the key - position of the
    query) is added to a score. The row of a token that no tile has is not written. The tiles' tokens and states must
    fit `tuning` and the scratch.
    """
    kv_heads, block_size, d = k.shape[1:]
    group = q.shape[1] // d // kv_heads
    if scales is not None and q.dtype == torch.float16:
        # a share times a scale may be less than float16 can say
        raise ValueError("keys and values in bytes do not go with float16")
    tuning = Tuning.of(d, group, q.dtype, scaled=scales is not None) if tuning is None else tuning
    out = q.new_empty(q.shape)
    if layout.tiles.shape[0] == 0:
        return out
    # the kernel counts in powers of two
    cap = None if softcap is None else softcap * LOG2_E.value
    scale = scale * LOG2_E.value if softcap is None else scale * 2 * LOG2_E.value / softcap
    overlap = overlaps(q.device)
    wide = max(16, 1 << (d - 1).bit_length())
    described = scales is None and d == wide and block_size % _BLOCK == 0

    def source(cache: Tensor) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(cache.view(-1, d), [_BLOCK, d]) if described else cache

    _attention_kernel[(layout.tiles.shape[0] * kv_heads,)](
        q, source(k), source(v), scales, out, scratch.gathered, scratch.peaks, scratch.masses, scratch.arrived,
        layout.tables, layout.tiles, layout.num_tiles, slopes, scale, cap, q.stride(0), layout.tables.stride(0),
        WINDOW=window, SPAN=SPAN, KV_HEADS=kv_heads, GROUP=group, D=d, BLOCK_SIZE=block_size,
        ROWS=tuning.rows, GROUP_ROWS=1 << (group - 1).bit_length(), BLOCK_N=_BLOCK,
        BLOCK_D=wide, DESCRIBED=described, OVERLAP=overlap,
        num_warps=max(4, tuning.rows // 16), num_stages=tuning.stages, launch_pdl=overlap, enable_fp_fusion=False,
    )  # fmt: skip
    return out


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
def _shown(first_span, end_span, low, last, WINDOW: tl.constexpr, SPAN: tl.constexpr):
    """The first and the last position in spans [first_span, end_span) that tokens at positions [low, last] see."""
    first = first_span * SPAN
    if WINDOW is not None:
        first = tl.maximum(first, low - WINDOW + 1)
    return first, tl.minimum(last, end_span * SPAN - 1)


@triton.jit
def _walk(
    k,
    v,
    scales,
    table,
    queries,
    own,
    low,
    last,
    first,
    end,
    pages,
    head,
    scale,
    cap,
    slope,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ONE: tl.constexpr,
):
    """The state of queries [ROWS, BLOCK_D], of tokens at positions [low, last], after positions [first, end].

    pages: of the first block. ONE: it is all within one span.
    """
    peak, mass, gathered = empty_state(ROWS, BLOCK_D)
    span_peak, span_mass, span_gathered = empty_state(ROWS, BLOCK_D)
    begin = first // BLOCK_N * BLOCK_N
    for start in range(begin, end + 1, BLOCK_N):
        block_k = read_cache(k, pages, head, start, first, end, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE, DESCRIBED)
        block_v = read_cache(v, pages, head, start, first, end, KV_HEADS, D, BLOCK_N, BLOCK_D, BLOCK_SIZE, DESCRIBED)
        block_k_scale = None
        block_v_scale = None
        if scales is not None:
            block_k_scale, block_v_scale = read_scales(scales, pages, head, start, KV_HEADS, BLOCK_N, BLOCK_SIZE)
        # one block ahead, so that its keys need not wait for it
        pages = read_pages(table, start + BLOCK_N, end, BLOCK_N, BLOCK_SIZE)
        hides = start + BLOCK_N - 1 > low
        if WINDOW is not None:
            hides |= start <= last - WINDOW
        seen = start + tl.arange(0, BLOCK_N)
        scores = score(queries, block_k, block_k_scale)
        if not ONE:  # noqa: SIM102 - decided at compilation
            if start % SPAN == 0:
                peak, mass, gathered = merge(peak, mass, gathered, span_peak, span_mass, span_gathered)
                span_peak, span_mass, span_gathered = empty_state(ROWS, BLOCK_D)
        span_peak, span_mass, span_gathered = attend(
            span_peak, span_mass, span_gathered, scores, block_v.to(queries.dtype), block_v_scale,
            own, seen, hides, scale, cap, slope, WINDOW,
        )  # fmt: skip
    if not ONE:
        span_peak, span_mass, span_gathered = merge(peak, mass, gathered, span_peak, span_mass, span_gathered)
    return span_peak, span_mass, span_gathered


@triton.jit
def _merge_all(
    gathered_at,
    peaks_at,
    masses_at,
    first,
    spans,
    head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """The state of one token's group of heads, from those of its spans."""
    AHEAD: tl.constexpr = 4  # states that are on their way at a time
    row = tl.arange(0, GROUP_ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    peak, mass, gathered = empty_state(GROUP_ROWS, BLOCK_D)
    for span in range(0, spans, AHEAD):
        later = ()
        for step in tl.static_range(AHEAD):
            there = (row < GROUP) & (span + step < spans)
            place = (first + span + step + tl.zeros([GROUP_ROWS], tl.int64)) * HEADS + head * GROUP + row
            inside = there[:, None] & (column < D)
            # other processors wrote them: not from this one's own cache
            later += (
                (
                    tl.load(peaks_at + place, mask=there, other=float("-inf"), cache_modifier=".cg"),
                    tl.load(masses_at + place, mask=there, other=0.0, cache_modifier=".cg"),
                    tl.load(gathered_at + (place * D)[:, None] + column, mask=inside, other=0.0, cache_modifier=".cg"),
                ),
            )
        for step in tl.static_range(AHEAD):
            peak, mass, gathered = merge(peak, mass, gathered, later[step][0], later[step][1], later[step][2])
    return peak, mass, gathered


@triton.jit
def _attention_kernel(
    q,
    k,
    v,
    scales,
    out,
    gathered_at,
    peaks_at,
    masses_at,
    arrived,
    tables,
    tiles,
    num_tiles,
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
    GROUP_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One kv head of a tile."""
    let_next_begin(OVERLAP)
    # Tiles and tables are written at the beginning of an iteration, by kernels behind which nothing begins early. What
    # hangs on each other is read first, so that little comes one after the other before keys are on their way.
    index = tl.program_id(0) // KV_HEADS
    head = tl.program_id(0) % KV_HEADS
    tile = tiles + index * _FIELDS
    token = tl.load(tile)
    count = tl.load(tile + 1)
    low = tl.load(tile + 2)
    seat = tl.load(tile + 3)
    first_span = tl.load(tile + 4)
    end_span = tl.load(tile + 5)
    shares = tl.load(tile + 6)
    states = tl.load(tile + 7)
    is_there = index < tl.load(num_tiles)
    table = tables + seat.to(tl.int64) * table_stride
    last = low + count - 1
    # all spans in one walk, or each by itself, if its state is to be merged with those of others' spans
    first, end = _shown(first_span, tl.where(shares == 1, end_span, first_span + 1), low, last, WINDOW, SPAN)
    pages = read_pages(table, first // BLOCK_N * BLOCK_N, tl.where(is_there, end, -1), BLOCK_N, BLOCK_SIZE)
    wait(OVERLAP)
    if not is_there:
        return
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    own = low + row // GROUP
    queries = _read_queries(q, token, count, head, q_stride, GROUP, D, ROWS, BLOCK_D)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head * GROUP + row % GROUP) * LOG2_E
    HEADS: tl.constexpr = KV_HEADS * GROUP

    if shares == 1:
        _, mass, gathered = _walk(
            k, v, scales, table, queries, own, low, last, first, end, pages, head, scale, cap, slope,
            WINDOW, SPAN, KV_HEADS, D, BLOCK_SIZE, ROWS, BLOCK_N, BLOCK_D, DESCRIBED, False,
        )  # fmt: skip
        goal = out + (token + row // GROUP).to(tl.int64)[:, None] * (HEADS * D)
        goal += ((head * GROUP + row % GROUP) * D)[:, None] + column
        inside = (row // GROUP < count)[:, None] & (column < D)
        tl.store(goal, answer(mass, gathered).to(out.dtype.element_ty), mask=inside)
    else:
        for span in range(first_span, end_span):
            peak, mass, gathered = _walk(
                k, v, scales, table, queries, own, low, last, first, end, pages, head, scale, cap, slope,
                WINDOW, SPAN, KV_HEADS, D, BLOCK_SIZE, ROWS, BLOCK_N, BLOCK_D, DESCRIBED, True,
            )  # fmt: skip
            place = (states + span + tl.zeros([ROWS], tl.int64)) * HEADS + head * GROUP + row
            tl.store(peaks_at + place, peak, mask=row < GROUP)
            tl.store(masses_at + place, mass, mask=row < GROUP)
            inside = (row < GROUP)[:, None] & (column < D)
            tl.store(gathered_at + (place * D)[:, None] + column, gathered, mask=inside)
            first, end = _shown(span + 1, span + 2, low, last, WINDOW, SPAN)
            pages = read_pages(table, first // BLOCK_N * BLOCK_N, end, BLOCK_N, BLOCK_SIZE)
        counter = arrived + states * HEADS + head
        tl.debug_barrier()
        is_last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == shares - 1
        tl.debug_barrier()
        if is_last:
            tl.store(counter, 0)
            _, total_mass, total = _merge_all(
                gathered_at, peaks_at, masses_at, states, low // SPAN + 1, head,
                HEADS, GROUP, D, BLOCK_D, GROUP_ROWS,
            )  # fmt: skip
            lane = tl.arange(0, GROUP_ROWS)[:, None]
            spot = out + token.to(tl.int64) * (HEADS * D) + (head * GROUP + lane) * D + column
            merged = answer(total_mass, total).to(out.dtype.element_ty)
            tl.store(spot, merged, mask=(lane < GROUP) & (column < D))
