"""Matrix products whose rows have the same bits however many rows travel together.

A product is computed transposed, weight · xᵀ, so that the tensor cores' 64 rows are outputs and their narrow side, from
16 columns on, is tokens. Every output sums K in steps of one instruction, in order, whatever the tile. Where N is too
small to occupy the device, K is cut into segments; their number depends on N and K alone. Each is summed from zero, and
the sums are added in order: for few tokens by the last of the programs that share a tile, for many by one program that
walks through them all. A `Coded` weight is brought to the activations' dtype in registers, in the same order of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orcaserve.ops.gpu.activation import KINDS, activate
from orcaserve.ops.gpu.launch import kinds, launcher
from orcaserve.ops.gpu.overlap import begin, overlaps, prefetch, wait
from orcaserve.ops.gpu.quantised import GROUP, UNIT, Coded, numbers_of
from orcaserve.ops.gpu.tiles import PROGRAMS, Tile, cdiv, coded_tiles, segment_length, segments, tiles

_SPLIT_ROWS = 256  # tokens up to which segments may be summed by different programs
_AHEAD = 8 << 20  # bytes of weights, of all programs together, that are asked for before the kernel before has ended
_AHEAD_ROWS = 256  # tokens up to which weights bound the time
_FULL_ROWS = 256  # tokens up to which a coded weight is read as it is
_BAND = 8  # tiles of tokens that are computed side by side
# Up to so many tokens the next kernel may come only once programs have their sums, else as soon as they all run: while
# memory is what they wait for, programs of the next would take the place of those that would ask for more of it.
_LATE_ROWS = 32
_FEW_STEPS = 4  # with so few, the next kernel's coming would take as long as they do: it may come two steps earlier


class MatmulScratch:
    """Memory in which programs that share a tile meet. Products of one stream share it; each leaves it clean."""

    __slots__ = ("counters", "overlap", "partials")

    def __init__(self, device: torch.device) -> None:
        self.overlap = overlaps(device)
        # segments() stops as soon as tiles times segments reach PROGRAMS, so they stay below twice that
        widest = 64 * 2 * PROGRAMS
        self.partials = torch.empty(_SPLIT_ROWS * widest, dtype=torch.float32, device=device)
        self.counters = torch.zeros(PROGRAMS * _SPLIT_ROWS // 16, dtype=torch.int32, device=device)


@triton.jit
def _block(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr):
    """A block of a matrix [rows, columns], with zeros past its edges. source: a descriptor, or a pointer."""
    if DESCRIBED:
        block = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)[:, None]
        c = column + tl.arange(0, COLUMNS)[None, :]
        block = tl.load(source + r.to(tl.int64) * columns + c, mask=(r < rows) & (c < columns), other=0.0)
    return block


@triton.jit
def _fetch_ahead(matrix, first_n, column, n, width, ahead, BLOCK_N: tl.constexpr, PIECES: tl.constexpr):
    # PIECES of each row, one after the other, of `ahead` elements; past the last row it stands in
    BYTES: tl.constexpr = matrix.dtype.element_ty.primitive_bitwidth // 8
    rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), n - 1)[:, None]
    columns = column + tl.arange(0, PIECES)[None, :] * ahead
    prefetch(matrix + (rows.to(tl.int64) * width + columns), BYTES * tl.minimum(width - columns, ahead) + 0 * rows)


@triton.jit
def _scaled(nibbles, scales, row, group, n, groups, ROWS: tl.constexpr, GROUP: tl.constexpr, dtype: tl.constexpr):
    """A block of numbers in 4 bits, two groups wide, times the scales of groups `group` and `group + 1`.

    nibbles: int8, of which the lower four bits count.
    """
    r = row + tl.arange(0, ROWS)[:, None]
    g = group + tl.arange(0, 2)[None, :]
    pairs = tl.load(scales + r * groups + g, mask=(r < n) & (group < groups), other=0.0)
    # Without any data moved between threads, or the block would go through shared memory on its way to the product.
    factors = tl.reshape(tl.broadcast_to(pairs[:, :, None], (ROWS, 2, GROUP)), (ROWS, 2 * GROUP))
    return (numbers_of(nibbles) * factors).to(dtype)


@triton.jit
def _add_block(
    part,
    weight,
    scales,
    across,
    behind,
    row,
    column,
    n,
    width,
    DESCRIBED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """part + a block of the weight times `across`, and, of one packed in 4 bits, its second half times `behind`."""
    if behind is None:
        down = _block(weight, row, column, n, width, ROWS, COLUMNS, DESCRIBED).to(across.dtype)
        part = tl.dot(down, across, part, input_precision="ieee")
    else:
        both = _block(weight, row, column // 2, n, width, ROWS, COLUMNS // 2, DESCRIBED)
        group, groups = column // GROUP, width // (GROUP // 2)
        low = _scaled(both, scales, row, group, n, groups, ROWS, GROUP, across.dtype)
        high = _scaled(both >> 4, scales, row, group + 2, n, groups, ROWS, GROUP, across.dtype)
        part = tl.dot(low, across, part, input_precision="ieee")
        part = tl.dot(high, behind, part, input_precision="ieee")
    return part


@triton.jit(do_not_specialize=["m", "ahead"])
def _matmul_kernel(
    x,
    weight,
    up,
    weight_at,
    up_at,
    scales,
    up_scales,
    bias,
    up_bias,
    residual,
    out,
    partials,
    counters,
    m,
    n,
    k,
    ahead,
    ACTIVATION: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    OVERLAP: tl.constexpr,
    LEFT: tl.constexpr,
    PIECES: tl.constexpr,
    BAND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # LEFT: steps that are left when the next kernel may come
    STEPS_HERE: tl.constexpr = STEPS if SPLIT else STEPS * SEGMENTS
    begin(OVERLAP and LEFT >= STEPS_HERE)
    # Tiles are taken in bands of BAND tiles of tokens, so that those computed at one time share what they read.
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile = tl.program_id(0)
    band = tile // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    place = tile - band * BAND * tiles_n
    # A box that reaches past the last row is brought slowly: the last tile begins so early that it ends with that row,
    # and computes some rows again, to the same bits.
    first_m = tl.minimum((band * BAND + place % height) * BLOCK_M, tl.maximum(m - BLOCK_M, 0))
    first_n = place // height * BLOCK_N

    first_k = tl.program_id(1) * STEPS * BLOCK_K
    # GROUP: values that share a scale, in a weight packed in 4 bits, two values a byte and BLOCK_K of them a unit; or 0
    PARTS: tl.constexpr = 2 if GROUP > 0 else 1
    width = tl.cdiv(k, BLOCK_K) * (BLOCK_K // 2) if GROUP > 0 else k
    if PIECES > 0:
        # nothing writes weights: the first are under way while the kernel before ends
        _fetch_ahead(weight_at, first_n, first_k // PARTS, n, width, ahead, BLOCK_N, PIECES)
        if up is not None:
            _fetch_ahead(up_at, first_n, first_k // PARTS, n, width, ahead, BLOCK_N, PIECES)
    wait(OVERLAP)
    part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    total = part
    up_part = part
    for step in range(STEPS_HERE):
        if LEFT > 0 and LEFT < STEPS_HERE:  # noqa: SIM102 - decided at compilation
            if step == STEPS_HERE - LEFT:
                begin(OVERLAP)
        column = first_k + step * BLOCK_K
        across = _block(x, first_m, column, m, k, BLOCK_M, BLOCK_K // PARTS, DESCRIBED).T
        behind = None
        if GROUP > 0:
            behind = _block(x, first_m, column + BLOCK_K // 2, m, k, BLOCK_M, BLOCK_K // 2, DESCRIBED).T
        part = _add_block(
            part, weight, scales, across, behind, first_n, column, n, width, DESCRIBED, BLOCK_N, BLOCK_K, GROUP
        )
        if up is not None:
            up_part = _add_block(
                up_part, up, up_scales, across, behind, first_n, column, n, width, DESCRIBED, BLOCK_N, BLOCK_K, GROUP
            )
        if SEGMENTS > 1 and not SPLIT and (step + 1) % STEPS == 0:
            total += part
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    begin(OVERLAP and LEFT == 0)

    rows = first_m + tl.arange(0, BLOCK_M)[None, :]
    columns = first_n + tl.arange(0, BLOCK_N)[:, None]
    inside = (rows < m) & (columns < n)
    at = rows.to(tl.int64) * n + columns
    last = True
    if SPLIT:
        size = m.to(tl.int64) * n
        tl.store(partials + tl.program_id(1) * size + at, part, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SEGMENTS - 1
        tl.debug_barrier()
    if last:
        if SPLIT:
            tl.store(counters + tile, 0)
            total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for segment in tl.static_range(SEGMENTS):
                # other processors wrote them: not from this one's own cache
                total += tl.load(partials + segment * size + at, mask=inside, other=0.0, cache_modifier=".cg")
        elif SEGMENTS == 1:
            total = part
        if scales is not None and GROUP == 0:
            total *= tl.load(scales + columns, mask=columns < n, other=0.0)
        if bias is not None:
            total += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)
        total = activate(total, ACTIVATION)
        if up is not None:
            if up_scales is not None and GROUP == 0:
                up_part *= tl.load(up_scales + columns, mask=columns < n, other=0.0)
            if up_bias is not None:
                up_part += tl.load(up_bias + columns, mask=columns < n, other=0.0).to(tl.float32)
            total *= up_part
        if residual is not None:
            total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at, total, mask=inside)


def matmul(
    x: Tensor,
    weight: Tensor | Coded,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    scratch: MatmulScratch,
    activation: str | None = None,
    wide: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """activation(x [M, K] · weight [N, K]ᵀ + bias [N]) + residual [M, N] -> [M, N], rounded once; wide: to float32."""
    return _launch(x, weight, None, bias, None, residual, scratch, activation, wide, tile)


def gated(
    x: Tensor,
    gate: Tensor | Coded,
    up: Tensor | Coded,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    *,
    scratch: MatmulScratch,
    tile: Tile | None = None,
) -> Tensor:
    """activation(x [M, K] · gate [N, K]ᵀ + gate_bias) * (x · up [N, K]ᵀ + up_bias) -> [M, N], rounded once.

    gate, up: both in one kind.
    """
    return _launch(x, gate, up, gate_bias, up_bias, None, scratch, activation, False, tile)


def _parts(weight: Tensor | Coded, full: bool) -> tuple[Tensor, Tensor | None, bool]:
    """What a kernel reads of a weight: its values, its scales, and whether they are packed in 4 bits."""
    if not isinstance(weight, Coded):
        return weight, None, False
    if full:
        return weight.in_full(), None if weight.packed else weight.scales, False
    return weight.values, weight.scales, weight.packed


def _launch(
    x: Tensor,
    weight: Tensor | Coded,
    up: Tensor | Coded | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    scratch: MatmulScratch,
    activation: str | None,
    wide: bool,
    tile: Tile | None,
) -> Tensor:
    m, k = x.shape
    # Of many tokens every tile would bring the same weights to the dtype of activations again: the same numbers, once.
    full = m > _FULL_ROWS and tile is None and not wide and x.itemsize == 2
    stored, scales, packed = _parts(weight, full)
    up_stored, up_scales = (None, None) if up is None else _parts(up, full)[:2]
    n = stored.shape[0]
    if tile is None:
        if isinstance(weight, Coded) and not full:
            tile = coded_tiles(m, n, k, gated=up is not None, dtype=x.dtype, packed=packed)
        else:
            tile = tiles(m, n, k, gated=up is not None, dtype=x.dtype)
    if packed and tile.block_k != UNIT:
        raise ValueError(f"weights in 4 bits are read {UNIT} at a time, not {tile.block_k}")
    count = segments(n, k) if up is None else 1
    out = torch.empty((m, n), dtype=torch.float32 if wide else x.dtype, device=x.device)
    addresses = x.data_ptr() | stored.data_ptr() | (0 if up_stored is None else up_stored.data_ptr())
    described = not (addresses | k * x.itemsize | stored.shape[1] * stored.itemsize) % 16
    split = tile.split and count > 1
    if split and m > _SPLIT_ROWS:
        raise ValueError(f"segments meet in memory for {_SPLIT_ROWS} rows, not for {m}")
    steps = cdiv(segment_length(k, count), tile.block_k)
    tiles_n = cdiv(n, tile.block_n)
    programs = count if split else 1
    columns = UNIT // 2 if packed else tile.block_k  # of a block of either: half a unit is as many bytes as values
    pieces = ahead = 0
    if scratch.overlap and described and x.itemsize == 2:
        pieces = max(32 * tile.warps // tile.block_n, 1)  # a thread asks for one
        if m <= _AHEAD_ROWS:
            share = _AHEAD // (programs * tiles_n * tile.block_n * (1 if up is None else 2))
            row = steps * columns * stored.itemsize
            ahead = min(share, row) // pieces // 128 * 128 // stored.itemsize
        pieces = pieces if ahead else 0
    steps_here = steps if split else steps * count
    left = steps_here if m > _LATE_ROWS else 2 if steps_here <= _FEW_STEPS else 0

    def source(matrix: Tensor, rows: int) -> TensorDescriptor | Tensor:
        return TensorDescriptor.from_tensor(matrix, [rows, columns]) if described else matrix

    others = (scales, up_scales, bias, up_bias, residual, out)
    constants = (
        None if activation is None else KINDS[activation],
        steps,
        count,
        split,
        described,
        scratch.overlap,
        left,
        pieces,
        _BAND,
        GROUP if packed else 0,
        tile.block_n,
        tile.block_m,
        tile.block_k,
    )
    args = (
        source(x, tile.block_m),
        source(stored, tile.block_n),
        None if up_stored is None else source(up_stored, tile.block_n),
        stored,
        up_stored,
        *others,
        scratch.partials if split else None,
        scratch.counters if split else None,
        m,
        n,
        k,
        ahead,
        *constants,
    )
    tensors = kinds(x, stored, up_stored, *others)
    # a tensor that has no descriptor, and numbers that are multiples of nothing, are for Triton to look at
    key = (tensors, n % 16 == 0, k % 16 == 0, tile, *constants) if described and tensors and n > 1 else None
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # a multiplication and an addition are rounded apart: whether they are joined must not hang on the tile
        "enable_fp_fusion": False,
        "launch_pdl": scratch.overlap,
    }
    launcher(_matmul_kernel, x.device)(key, (cdiv(m, tile.block_m) * tiles_n, programs, 1), args, options)
    return out
