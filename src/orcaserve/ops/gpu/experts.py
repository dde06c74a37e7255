"""A mixture of experts on a GPU: the rows of each expert, brought together, go through its matrices in two products.

A product is one launch for all experts. It sums as `matmul` does: transposed, weight · xᵀ, K in steps of one
instruction, in order, in one piece, whatever the tile; so a pair's bits depend on its row and its expert alone. The
number of programs depends on how many pairs there are, never on where they go: those that find no tile end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orcaserve.ops.gpu.activation import KINDS, activate
from orcaserve.ops.gpu.launch import kinds, launcher
from orcaserve.ops.gpu.overlap import begin, overlaps, wait
from orcaserve.ops.gpu.routing import Groups, group, route
from orcaserve.ops.gpu.tiles import Tile
from orcaserve.ops.kernels import Linear, Part

_BAND = 8  # tiles of pairs that are computed side by side
_COLUMNS = 1024  # of the result, of one program that adds up


def tiles(num_pairs: int, num_experts: int, k_in: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """The tiles of both products, with the same block_m, for so many pairs and rows of k_in elements.

    Any would give the same bits. By the pairs that an expert has on average, in steps of at least two, so that
    iterations of every power of two meet all of them. Taken over from those of `matmul`, not timed.
    """
    if dtype == torch.float32:
        return Tile(32, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)
    each = -(-num_pairs // num_experts)
    if each <= 16:
        return Tile(64, 16, 64 if k_in >= 2048 else 128, 4, 4), Tile(64, 16, 256, 4, 3)
    if each <= 32:
        return Tile(64, 32, 128, 4, 3), Tile(64, 32, 128, 4, 4)
    if each <= 128:
        return Tile(64, 64, 64, 4, 4), Tile(64, 64, 128, 4, 3)
    return Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)


@triton.jit
def _weights(source, first_row, row, column, K: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """A block of the rows from first_row on, with zeros behind K. row: those of this program, none past the last."""
    if DESCRIBED:
        block = source.load([first_row, column])
    else:
        c = column + tl.arange(0, BLOCK_K)[None, :]
        at = source + row[:, None].to(tl.int64) * K + c
        block = tl.load(at) if EVEN else tl.load(at, mask=c < K, other=0.0)
    return block


@triton.jit(do_not_specialize=["most"])
def _grouped_kernel(
    x,
    weight,
    up,
    pairs,
    tiles,
    num_tiles,
    out,
    most,
    N: tl.constexpr,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DESCRIBED: tl.constexpr,
    OVERLAP: tl.constexpr,
    BAND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # With few rows memory is what is waited for: the next kernel's programs must not take the place of this one's.
    begin(OVERLAP and BLOCK_M > 16)
    # In bands of BAND tiles of pairs, so that those computed at one time share what they read.
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = K % BLOCK_K == 0
    program = tl.program_id(0)
    band = program // (BAND * TILES_N)
    height = tl.minimum(most - band * BAND, BAND)
    rest = program - band * BAND * TILES_N
    tile = band * BAND + rest % height
    first_n = rest // height * BLOCK_N
    wait(OVERLAP)
    if tile >= tl.load(num_tiles):
        return

    expert = tl.load(tiles + tile * 3)
    first = tl.load(tiles + tile * 3 + 1)
    end = tl.load(tiles + tile * 3 + 2)
    place = first + tl.arange(0, BLOCK_M)
    there = place < end
    # Past the expert's end its last pair stands in; so do the last output and its weights. Neither is kept.
    place = tl.minimum(place, end - 1)
    pair = tl.load(pairs + place)
    if PLACES > 0:  # from the rows themselves, to the order of the experts
        source = pair // PLACES
        target = place
    else:  # from the order of the experts, to that of the rows
        source = place
        target = pair
    source = source[:, None].to(tl.int64) * K
    first_row = expert * N + first_n
    row = expert * N + tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1)

    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    up_total = total
    for step in range((K + BLOCK_K - 1) // BLOCK_K):
        column = step * BLOCK_K
        c = column + tl.arange(0, BLOCK_K)[None, :]
        across = tl.load(x + source + c) if EVEN else tl.load(x + source + c, mask=c < K, other=0.0)
        across = across.T
        down = _weights(weight, first_row, row, column, K, EVEN, DESCRIBED, BLOCK_K)
        total = tl.dot(down, across, total, input_precision="ieee")
        if up is not None:
            down = _weights(up, first_row, row, column, K, EVEN, DESCRIBED, BLOCK_K)
            up_total = tl.dot(down, across, up_total, input_precision="ieee")
    begin(OVERLAP and BLOCK_M <= 16)

    total = activate(total, ACTIVATION)
    if up is not None:
        total *= up_total
    n = first_n + tl.arange(0, BLOCK_N)[:, None]
    tl.store(out + target[None, :].to(tl.int64) * N + n, total, mask=there[None, :] & (n < N))


@triton.jit
def _mix_kernel(
    results, shares, residual, out, H: tl.constexpr, PLACES: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr
):
    begin(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    mixed = tl.zeros((BLOCK,), tl.float32)
    for place in range(PLACES):
        pair = row * PLACES + place
        result = tl.load(results + pair * H + column, mask=inside, other=0.0).to(tl.float32)
        mixed += tl.load(shares + pair) * result
    if residual is not None:
        mixed += tl.load(residual + row * H + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * H + column, mixed, mask=inside)


def grouped(
    x: Tensor, weight: Tensor, up: Tensor | None, groups: Groups, *, places: int, activation: str | None, tile: Tile
) -> Tensor:
    """A product of each pair with the matrices [E, N, K] of its expert -> [P, N], rounded once.

    places: of a row. Not 0: x is [M, K], and the results stand in the order of the experts. 0: x is [P, K] in that
    order, and the results stand in that of the pairs' numbers. up: as `weight`; the result is then
    activation(x · weightᵀ) * (x · upᵀ). tile: with the groups' block_m.
    """
    num_experts, n, k = weight.shape
    count = groups.pairs.shape[0]
    most = groups.tiles.shape[0]
    out = torch.empty((count, n), dtype=x.dtype, device=x.device)
    described = not (weight.data_ptr() | (0 if up is None else up.data_ptr()) | k * x.itemsize) % 16
    overlap = overlaps(x.device)

    def source(matrices: Tensor) -> TensorDescriptor | Tensor:
        # A block may reach into the next expert's rows, which are then not kept.
        flat = matrices.view(num_experts * n, k)
        return TensorDescriptor.from_tensor(flat, [tile.block_n, tile.block_k]) if described else flat

    others = (groups.pairs, groups.tiles, groups.num_tiles, out)
    kind = None if activation is None else KINDS[activation]
    constants = (n, k, places, kind, described, overlap, _BAND, tile.block_n, groups.block_m, tile.block_k)
    tensors = kinds(x, weight, up, *others)
    options = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # a multiplication and an addition are rounded apart: whether they are joined must not hang on the tile
        "enable_fp_fusion": False,
        "launch_pdl": overlap,
    }
    launcher(_grouped_kernel, x.device)(
        (tensors, tile, *constants) if described and tensors else None,
        (most * -(-n // tile.block_n), 1, 1),
        (x, source(weight), None if up is None else source(up), *others, most, *constants),
        options,
    )
    return out


def mix(results: Tensor, shares: Tensor, residual: Tensor | None) -> Tensor:
    """Sum of shares float32 [M, places] * results [M * places, H], place by place in float32, + residual [M, H].

    [M, H] in the dtype of the results, rounded once.
    """
    (m, places), h = shares.shape, results.shape[1]
    out = torch.empty((m, h), dtype=results.dtype, device=results.device)
    overlap = overlaps(results.device)
    constants = (h, places, overlap, _COLUMNS)
    tensors = kinds(results, shares, residual, out)
    launcher(_mix_kernel, results.device)(
        None if tensors is None else (tensors, *constants),
        (m, -(-h // _COLUMNS), 1),
        (results, shares, residual, out, *constants),
        {"num_warps": 4, "enable_fp_fusion": False, "launch_pdl": overlap},
    )
    return out


@dataclass(frozen=True, eq=False, slots=True)
class DeviceExperts:
    """What `model.layers.Experts` computes, [M, H] -> [M, H], in kernels whose launches hang on M alone.

    router: to logits [M, E]. gate, up: [E, I, H]; down: [E, H, I], of one dtype, contiguous. per_token: experts that a
    row goes through. normalise: their shares come to one.
    """

    norm: Part | None
    router: Linear
    gate: Tensor
    up: Tensor
    down: Tensor
    activation: str
    per_token: int
    normalise: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        num_experts = self.gate.shape[0]
        inner, outer = tiles(x.shape[0] * self.per_token, num_experts, x.shape[1], x.dtype)
        shares, chosen = route(self.router(x), self.per_token, normalise=self.normalise)
        groups = group(chosen, num_experts, inner.block_m)
        middle = grouped(x, self.gate, self.up, groups, places=self.per_token, activation=self.activation, tile=inner)
        results = grouped(middle, self.down, None, groups, places=0, activation=None, tile=outer)
        return mix(results, shares, residual)
