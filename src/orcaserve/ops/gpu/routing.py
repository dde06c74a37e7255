"""Which experts a row goes to, and the rows of each expert brought together: nothing of it does the host wait for.

A pair is a row and one of its places: number row * places + place. A row's pairs stand in the order of its experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.launch import kinds, launcher
from orcaserve.ops.gpu.overlap import begin, overlaps, wait

_FIELDS = 3  # of a tile: its expert, and its first and the expert's last place in the order of the experts
_BLOCK = 1024  # pairs that a program looks at together


@dataclass(frozen=True, eq=False, slots=True)
class Groups:
    """The pairs of an iteration by their experts, cut into tiles of up to `block_m` pairs of one expert.

    pairs: int32 [P], those of expert 0 first. tiles: int32 [most, 3], (expert, place of the first pair in `pairs`,
    where the expert's end), of which the first num_tiles[0] (int32 [1]) are there.
    """

    pairs: Tensor
    tiles: Tensor
    num_tiles: Tensor
    block_m: int


def most_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """A bound that hangs on no data: each expert that has pairs has one tile that need not be full."""
    return min(num_pairs, num_experts) + num_pairs // block_m


@triton.jit
def _route_kernel(
    logits,
    shares,
    chosen,
    EXPERTS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    NORMALISE: tl.constexpr,
    OVERLAP: tl.constexpr,
    E: tl.constexpr,
    PLACES: tl.constexpr,
):
    begin(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, E)
    inside = number < EXPERTS
    score = tl.load(logits + row * EXPERTS + number, mask=inside, other=-float("inf")).to(tl.float32)
    likely = tl.exp(score - tl.max(score, 0))
    likely = tl.math.div_rn(likely, tl.sum(likely, 0))
    # A row that has come to nothing still goes to experts that there are: NaN counts as the greatest, as in a sort.
    left = tl.where(likely == likely, likely, 2.0)
    left = tl.where(inside, left, -1.0)

    place = tl.arange(0, PLACES)
    experts = tl.full((PLACES,), EXPERTS, tl.int32)
    share = tl.zeros((PLACES,), tl.float32)
    total = 0.0
    for j in tl.static_range(PER_TOKEN):
        best = tl.min(tl.where(left == tl.max(left, 0), number, E), 0)
        value = tl.sum(tl.where(number == best, likely, 0.0), 0)
        left = tl.where(number == best, -1.0, left)
        experts = tl.where(place == j, best, experts)
        share = tl.where(place == j, value, share)
        total += value
    if NORMALISE:
        share = tl.math.div_rn(share, total + tl.zeros_like(share))
    share = share.to(logits.dtype.element_ty)  # rounded as the model was trained
    rank = tl.sum((experts[None, :] < experts[:, None]).to(tl.int32), 1)
    at = row * PER_TOKEN + rank
    tl.store(shares + at, share.to(tl.float32), mask=place < PER_TOKEN)
    tl.store(chosen + at, experts, mask=place < PER_TOKEN)


def route(logits: Tensor, per_token: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """Shares float32 and experts int32, [M, per_token] each, of logits [M, E], in the order of the experts.

    The likeliest `per_token` (at most E) are chosen, ties go to the lower number. normalise: their shares are divided
    by their sum. Shares are rounded to the dtype of the logits.
    """
    m, num_experts = logits.shape
    shares = torch.empty((m, per_token), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((m, per_token), dtype=torch.int32, device=logits.device)
    overlap = overlaps(logits.device)
    constants = (num_experts, per_token, normalise, overlap, _power(num_experts), _power(per_token))
    tensors = kinds(logits, shares, chosen)
    launcher(_route_kernel, logits.device)(
        None if tensors is None else (tensors, *constants),
        (m, 1, 1),
        (logits, shares, chosen, *constants),
        # one warp, whatever there is to choose from: a sum's order hangs on it
        {"num_warps": 1, "enable_fp_fusion": False, "launch_pdl": overlap},
    )
    return shares, chosen


@triton.jit(do_not_specialize=["count"])
def _group_kernel(
    chosen,
    pairs,
    tiles,
    num_tiles,
    count,
    BLOCK_M: tl.constexpr,
    FIELDS: tl.constexpr,
    OVERLAP: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each program has an expert, and finds out by itself how many pairs the experts before it have: no program waits
    # for another, and the order is always the same.
    begin(OVERLAP)
    wait(OVERLAP)
    expert = tl.program_id(0)
    number = tl.arange(0, E)
    lane = tl.arange(0, BLOCK)
    totals = tl.zeros((E,), tl.int32)
    for start in range(0, count, BLOCK):
        there = start + lane < count
        totals += tl.histogram(tl.load(chosen + start + lane, mask=there, other=0), E, mask=there)
    first = tl.sum(tl.where(number < expert, totals, 0), 0)
    end = first + tl.sum(tl.where(number == expert, totals, 0), 0)

    if end > first:
        place = first
        for start in range(0, count, BLOCK):
            pair = start + lane
            mine = tl.load(chosen + pair, mask=pair < count, other=-1) == expert
            behind = place + tl.cumsum(mine.to(tl.int32), 0)
            tl.store(pairs + behind - 1, pair, mask=mine)
            place += tl.sum(mine.to(tl.int32), 0)

    tile = tl.sum(tl.where(number < expert, (totals + BLOCK_M - 1) // BLOCK_M, 0), 0)
    own = (end - first + BLOCK_M - 1) // BLOCK_M
    for start in range(0, own, BLOCK):
        there = start + lane < own
        at = tiles + (tile + start + lane) * FIELDS
        tl.store(at, expert + tl.zeros_like(lane), mask=there)
        tl.store(at + 1, first + (start + lane) * BLOCK_M, mask=there)
        tl.store(at + 2, end + tl.zeros_like(lane), mask=there)
    if expert == tl.num_programs(0) - 1:
        tl.store(num_tiles, tile + own)


def group(chosen: Tensor, num_experts: int, block_m: int) -> Groups:
    """The groups of int32 chosen [M, places], each below num_experts."""
    count, device = chosen.numel(), chosen.device
    pairs = torch.empty(count, dtype=torch.int32, device=device)
    most = most_tiles(count, num_experts, block_m)
    tiles = torch.empty((most, _FIELDS), dtype=torch.int32, device=device)
    num_tiles = torch.empty(1, dtype=torch.int32, device=device)
    overlap = overlaps(device)
    constants = (block_m, _FIELDS, overlap, max(_power(num_experts), 32), _BLOCK)
    tensors = kinds(chosen, pairs, tiles, num_tiles)
    launcher(_group_kernel, device)(
        None if tensors is None else (tensors, *constants),
        (num_experts, 1, 1),
        (chosen, pairs, tiles, num_tiles, count, *constants),
        {"num_warps": 4, "launch_pdl": overlap},
    )
    return Groups(pairs, tiles, num_tiles, block_m)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
