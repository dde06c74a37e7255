"""A QKV product becomes heads, in one launch: queries and keys are normed and rotated, keys and values are stored.

Attention reads whole blocks, of which it hides what no query sees; a share of zero is nothing of a finite value only.
So whoever stores a request's last value in a block puts zeros behind it, where a block may hold what another left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.launch import kinds, launcher
from orcaserve.ops.gpu.layout import DeviceLayout
from orcaserve.ops.gpu.overlap import begin, overlaps, wait

NOTHING = tl.constexpr(1e-30)  # as in `ScaledBytes`: vectors whose values are no larger become zero
ROUNDER = tl.constexpr(1.5 * 2**23)  # a float32 whose neighbours are whole numbers
_HEADS = 8  # heads that one program takes, of one token, and all of them queries, or keys, or values


@triton.jit
def _factor(weight, column, inside, OFFSET: tl.constexpr):
    return tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET


@triton.jit
def _placed(
    source,
    head_at,
    present,
    column,
    weight,
    eps,
    angles,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Heads at `source` + `head_at`, float32: normed where there is a weight, rotated where there are angles.

    Waits for the kernel before, once everything that it does not write is under way.
    """
    inside = column < D
    # each dimension takes a share of the one that it is paired with
    HALF: tl.constexpr = ROTARY_DIM // 2
    if INTERLEAVED:
        first = column % 2 == 0
        pair = tl.where(first, column + 1, column - 1)
        angle = column // 2
    else:
        first = column < HALF
        pair = tl.where(first, column + HALF, column - HALF)
        angle = tl.where(first, column, column - HALF)
    turns = column < ROTARY_DIM
    if weight is not None:
        factor = _factor(weight, column, inside, OFFSET)
        if angles is not None:
            pair_factor = _factor(weight, pair, turns, OFFSET)
    if angles is not None:
        cos = tl.load(angles + angle, mask=turns, other=1.0)
        sin = tl.load(angles + HALF + angle, mask=turns, other=0.0)
    wait(OVERLAP)
    x = tl.load(source + head_at + column, mask=present & inside, other=0.0).to(tl.float32)
    if angles is not None:
        other = tl.load(source + head_at + pair, mask=present & turns, other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * scale * factor
        if angles is not None:
            other = other * scale * pair_factor
    if angles is not None:
        x = x * cos + other * tl.where(first, -sin, sin)
    return x


@triton.jit
def _scaled(x):
    """x float32 [HEADS, D_PADDED] -> whole numbers from -127 to 127, and the scales [HEADS, 1]: as `ScaledBytes.store`.

    Divisions are exact to the last bit, and nothing can be fused: the same bytes wherever this is compiled.
    """
    # as integers magnitudes have the same order, and infinity and NaN come last: a maximum of floats would lose a NaN
    most = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1, keep_dims=True).to(tl.float32, bitcast=True)
    finite = most < float("inf")
    some = finite & (most > NOTHING)
    factor = tl.where(some, tl.div_rn(127.0, tl.where(some, most, 1.0)), 0.0)
    # Rounded as an addition does it, half to even: there are no fractions so high. What is cut off was rounding's own.
    high = tl.minimum(tl.maximum(tl.where(finite, x, 0.0) * factor, -127.0), 127.0) + ROUNDER
    return (high - ROUNDER).to(tl.int8), tl.where(finite, tl.div_rn(most, 127.0), float("nan"))


@triton.jit
def _clear(
    cache,
    block,
    first_head,
    first,
    block_size,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Zeros into places [first, block_size) of HEADS heads of a block: whatever was there, it is finite now."""
    ROWS: tl.constexpr = 32
    column = tl.arange(0, D_PADDED)[None, :]
    for i in range(tl.minimum(HEADS, KV_HEADS - first_head)):
        head = block.to(tl.int64) * KV_HEADS + first_head + i
        for start in range(first // ROWS * ROWS, block_size, ROWS):
            row = start + tl.arange(0, ROWS)[:, None]
            nothing = tl.zeros((ROWS, D_PADDED), cache.dtype.element_ty)
            inside = (row >= first) & (row < block_size) & (column < D)
            tl.store(cache + (head * block_size + row) * D + column, nothing, mask=inside)


@triton.jit
def _heads_kernel(
    qkv,
    q,
    k_cache,
    v_cache,
    scales,
    positions,
    slots,
    q_norm,
    k_norm,
    table,
    eps,
    block_size,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    OVERLAP: tl.constexpr,
    HEADS: tl.constexpr,
):
    Q_PARTS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    begin(OVERLAP)
    token = tl.program_id(0)
    part = tl.program_id(1)
    column = tl.arange(0, D_PADDED)[None, :]
    source = qkv + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * D)
    # positions and slots are written at the beginning of an iteration, by kernels behind which nothing begins early
    angles = None
    if table is not None:
        angles = table + tl.load(positions + token).to(tl.int64) * ROTARY_DIM
    if part < Q_PARTS:
        head = part * HEADS + tl.arange(0, HEADS)[:, None]
        present = head < NUM_HEADS
        x = _placed(source, head * D, present, column, q_norm, eps, angles, D, OFFSET, ROTARY_DIM, INTERLEAVED, OVERLAP)
        tl.store(q + token.to(tl.int64) * (NUM_HEADS * D) + head * D + column, x, mask=present & (column < D))
    else:
        slot = tl.load(slots + token)
        is_value = part >= Q_PARTS + KV_PARTS
        head = (part - Q_PARTS - is_value.to(tl.int32) * KV_PARTS) * HEADS + tl.arange(0, HEADS)[:, None]
        present = head < tl.where(slot >= 0, NUM_KV_HEADS, 0)
        place = (slot // block_size).to(tl.int64) * NUM_KV_HEADS + head
        at = (place * block_size + slot % block_size) * D + column
        if scales is not None:
            scale_at = (place * block_size + slot % block_size) * 2
        if is_value:
            wait(OVERLAP)
            value_at = source + (NUM_HEADS + NUM_KV_HEADS + head) * D + column
            value = tl.load(value_at, mask=present & (column < D), other=0.0)
            if scales is not None:
                value, value_scale = _scaled(value.to(tl.float32))
                tl.store(scales + scale_at + 1, value_scale, mask=present)
            tl.store(v_cache + at, value, mask=present & (column < D))
            if scales is None:
                before = tl.load(slots + token - 1, mask=token > 0, other=-1)
                behind = tl.load(slots + token + 1, mask=token + 1 < tl.num_programs(0), other=-1)
                first = slot % block_size + 1
                # The last of a request here; one that is alone has others before it, which have done so, or begins it.
                if (slot >= 0) & (behind != slot + 1) & ((first == 1) | (before == slot - 1)):
                    first_head = (part - Q_PARTS - KV_PARTS) * HEADS
                    _clear(v_cache, slot // block_size, first_head, first, block_size, NUM_KV_HEADS, D, D_PADDED, HEADS)
        else:
            head_at = (NUM_HEADS + head) * D
            key = _placed(
                source, head_at, present, column, k_norm, eps, angles, D, OFFSET, ROTARY_DIM, INTERLEAVED, OVERLAP
            )
            if scales is not None:
                key, key_scale = _scaled(key.to(qkv.dtype.element_ty).to(tl.float32))
                tl.store(scales + scale_at, key_scale, mask=present)
            tl.store(k_cache + at, key, mask=present & (column < D))


def heads(
    qkv: Tensor,
    layout: DeviceLayout,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    plus_one: bool,
    table: Tensor | None,
    interleaved: bool,
    rotary_dim: int,
    scales: Tensor | None = None,
) -> Tensor:
    """qkv [M, (heads + 2 * kv heads) * d] -> queries [M, heads * d]; keys and values go to the layout's slots.

    The places of a block behind the last value of its request become zeros, but in a cache of int8.

    k_cache, v_cache: [num_blocks, kv heads, block_size, d], in the dtype of qkv; or int8, with scales: float32
    [num_blocks, kv heads, block_size, 2], of keys and of values, both as `ops.attention.ScaledBytes` has them of what
    the dtype of qkv holds. q_norm, k_norm: weights [d] of an RMS norm over each head. table: float32 [positions, 2,
    rotary_dim / 2], cosines and sines; None: nothing is rotated. interleaved: as in `ops.rotary.Rotary`; dimensions
    past rotary_dim pass.
    """
    m = layout.num_tokens
    q = torch.empty((m, num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    parts = -(-num_heads // _HEADS) - 2 * (-num_kv_heads // _HEADS)
    overlap = overlaps(qkv.device)
    padded = 1 << (head_dim - 1).bit_length()
    offset = 1.0 if plus_one else 0.0
    constants = (num_heads, num_kv_heads, head_dim, padded, offset, rotary_dim, interleaved, overlap, _HEADS)
    sources = (qkv, q, k_cache, v_cache, scales, layout.positions, layout.slots, q_norm, k_norm, table)
    tensors = kinds(*sources)
    launcher(_heads_kernel, qkv.device)(
        None if tensors is None else (tensors, layout.block_size, *constants),
        (m, parts, 1),
        (*sources, eps, layout.block_size, *constants),
        {"num_warps": 4, "launch_pdl": overlap},
    )
    return q
