"""The arithmetic of attention, shared by all its kernels, so that a query gets the same bits from each of them.

A tile of queries meets the cache block by block of `BLOCK_N` positions. Over one span of positions it gathers a state
(peak, mass, gathered) that begins empty: the highest score, in powers of two; the sum of the shares exp2(score -
peak); and the values weighted with these shares. The states of the spans are then merged in order of position.

A state is nothing until something is visible: its peak is -inf, mass and values are zero. A block or span in which all
is hidden adds exactly nothing, so it does not matter whether a kernel leaves it out.

A cache of bytes is widened on its way to the product, which is exact in every dtype. A key's scale is multiplied with
its scores, a value's with the shares, before they are rounded to what is multiplied; the mass is of shares alone.

What else the bits rest on: the kernels run without contraction (`enable_fp_fusion=False`; what shall be fused says
fma), and give 64 rows to each group of four warps, so that all use the same matrix instructions and reduce a row over
the same lanes in the same order.
"""

import triton
import triton.language as tl


@triton.jit
def empty_state(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """(peak [ROWS], mass [ROWS], gathered [ROWS, BLOCK_D]) that have seen nothing."""
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    return peak, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)


@triton.jit
def score(q, k, k_scale):
    """float32 [ROWS, BLOCK_N], of q [ROWS, BLOCK_D] and k [BLOCK_N, BLOCK_D], a row of which counts k_scale times.

    k_scale: float32 [BLOCK_N], or None. Bytes are exact in every dtype of q.
    """
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
    if k_scale is not None:
        scores = scores * k_scale[None, :]
    return scores


@triton.jit
def _visible(own, seen, WINDOW: tl.constexpr):
    visible = seen[None, :] <= own[:, None]
    if WINDOW is not None:
        visible &= seen[None, :] > own[:, None] - WINDOW
    return visible


@triton.jit
def attend(
    peak,
    mass,
    gathered,
    scores,
    v,
    v_scale,
    own,
    seen,
    hides,
    scale,
    cap,
    slope,
    WINDOW: tl.constexpr,
):
    """The state after queries q [ROWS, BLOCK_D] at positions own [ROWS] have met k and v [BLOCK_N, BLOCK_D] at seen.

    hides: whether any query may not see any key; if not, nothing is masked. scale, cap: see `exponents`. slope: [ROWS]
    times log2(e), or None. v_scale: float32 [BLOCK_N], by which a row of v counts, or None.
    """
    if cap is not None:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both infinities
        scores = tl.fma(2.0 / (tl.exp2(scores * scale) + 1.0), -cap, cap)
    elif slope is not None:
        scores = scores * scale
    if slope is not None:
        scores = tl.fma(slope[:, None], (seen[None, :] - own[:, None]).to(tl.float32), scores)
    if hides:
        scores = tl.where(_visible(own, seen, WINDOW), scores, float("-inf"))
    # nothing but the scale: folded into the exponent; it is positive, so the highest stays the highest
    factor = scale if cap is None and slope is None else 1.0
    higher = tl.maximum(peak, tl.max(scores, 1) * factor)
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    shares = tl.exp2(tl.fma(scores, factor, -pivot[:, None]))
    keep = tl.exp2(peak - pivot)
    mass = tl.fma(mass, keep, tl.sum(shares, 1))
    if v_scale is not None:
        shares = shares * v_scale[None, :]
        if hides:
            # a scale that is NaN is seen by those alone who see its position
            shares = tl.where(_visible(own, seen, WINDOW), shares, 0.0)
    gathered = tl.dot(shares.to(v.dtype), v, gathered * keep[:, None], input_precision="ieee")
    return higher, mass, gathered


@triton.jit
def merge(peak, mass, gathered, later_peak, later_mass, later_gathered):
    """The state of two pieces of the cache from those of each."""
    higher = tl.maximum(peak, later_peak)
    pivot = tl.where(higher == float("-inf"), 0.0, higher)
    keep = tl.exp2(peak - pivot)
    gain = tl.exp2(later_peak - pivot)
    mass = tl.fma(later_mass, gain, mass * keep)
    gathered = tl.fma(later_gathered, gain[:, None], gathered * keep[:, None])
    return higher, mass, gathered


@triton.jit
def answer(mass, gathered):
    """float32 [ROWS, BLOCK_D]; zeros for a query that has seen nothing, and no zero is negative."""
    return gathered / tl.where(mass == 0.0, 1.0, mass)[:, None] + 0.0


@triton.jit
def read_pages(table, start, last, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The blocks of the cache that hold positions [start, start + BLOCK_N): one, or [BLOCK_N] of them.

    table: pointer to the request's block table, which is not read past position `last`.
    """
    if BLOCK_SIZE % BLOCK_N == 0:
        pages = tl.load(table + start // BLOCK_SIZE, mask=start <= last, other=0)
    else:
        seen = start + tl.arange(0, BLOCK_N)
        pages = tl.load(table + seen // BLOCK_SIZE, mask=seen <= last, other=0)
    return pages


@triton.jit
def read_cache(
    cache,
    pages,
    head,
    start,
    first,
    last,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] of one head at positions [start, start + BLOCK_N).

    DESCRIBED: cache is a descriptor, and what stands outside [first, last] comes along: another's keys, which `attend`
    hides, and values that are finite, since `heads` sees to that. Else it is a pointer, and there are zeros outside and
    past D: what stands there may be not finite, and even a share of zero would not make it nothing.
    """
    if DESCRIBED:
        block = cache.load([(pages * KV_HEADS + head) * BLOCK_SIZE + start % BLOCK_SIZE, 0])
    else:
        seen = start + tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_D)
        visible = ((seen >= first) & (seen <= last))[:, None]
        if D != BLOCK_D:
            visible &= (column < D)[None, :]
        if BLOCK_SIZE % BLOCK_N == 0:
            at = cache + (pages.to(tl.int64) * KV_HEADS + head) * (BLOCK_SIZE * D) + start % BLOCK_SIZE * D
            place = at + (tl.arange(0, BLOCK_N) * D)[:, None] + column[None, :]
        else:
            blocks = (pages.to(tl.int64) * KV_HEADS + head) * (BLOCK_SIZE * D) + seen % BLOCK_SIZE * D
            place = cache + blocks[:, None] + column[None, :]
        block = tl.load(place, mask=visible, other=0.0)
    return block


@triton.jit
def read_scales(scales, pages, head, start, KV_HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Two of [BLOCK_N], of one head's keys and values at positions [start, start + BLOCK_N), in one load.

    Whatever stands there, also where no query looks: `attend` takes nothing of what it hides.
    """
    seen = start + tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:
        block = scales + ((pages.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + start % BLOCK_SIZE) * 2
        place = block + (tl.arange(0, BLOCK_N) * 2)[:, None]
    else:
        place = scales + (((pages.to(tl.int64) * KV_HEADS + head) * BLOCK_SIZE + seen % BLOCK_SIZE) * 2)[:, None]
    return tl.split(tl.load(place + tl.arange(0, 2)[None, :]))
