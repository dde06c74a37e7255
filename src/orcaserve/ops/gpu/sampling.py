"""Draws of tokens on a device: what `ops.draw` does, with float32 noise, and a row's outcome depends on that row alone.

The greatest of a row with temperature 0, ties to the lower id. Else the argmax of (logit - peak) / temperature + noise,
in float32, over the tokens that top_k, top_p and min_p leave, in this order.

A row is cut into spans, a program each, so that few rows keep the whole device busy. A span scores its tokens relative
to its own peak, and what its peak lacks to the row's is added to the best score: logits are read once, and a great
offset that all have in common costs no precision.

A row that restricts its draw goes a second way. The tokens left are always a prefix of the order by (gap, id), the gap
being the distance to the peak over the temperature. A gap is not negative, so as float32 its bits are an integer of the
same order, and the last gap left is found by bisection over these. Masses are integers too, multiples of 2^-44, so that
no order of summation matters. At first only the greatest of every 64 tokens are looked at: tokens that reach what is
wanted by themselves bound the cut, and blocks without a token within the bound are never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.noise import gumbel, noise_key

SPAN, BLOCK = 4096, 64  # tokens of one program; tokens that are represented by their greatest

_NO_ID = tl.constexpr(2**31 - 1)
_ALL = tl.constexpr(2**31 - 1)
_FARTHEST = tl.constexpr(0x7F800000)  # the gap of a logit of -inf, as an integer
_COARSE = tl.constexpr(1 << 19)  # a sixteenth of a gap: how far the bound may be off
_UNIT = tl.constexpr(2.0**44)  # the mass of a token at the peak: those of 2^18 tokens fit an int64
_INF = tl.constexpr(float("inf"))


@dataclass(frozen=True, eq=False, slots=True)
class Wishes:
    """How to draw from each of R rows: tensors [R] on the device.

    bases: int64, bits of `base_key`. positions: int32, of the token to be drawn. temperatures: float32, 0 is greedy,
    else at least 1e-30. top_k: int32, 0 is off. top_p: float32, 1 is off. min_p: float32, 0 is off. With temperature 0
    the last three are not looked at.
    """

    bases: Tensor
    positions: Tensor
    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Scratch:
    """What one launch of `sample` leaves for the next, for up to R rows of V logits; nothing survives a call.

    peaks, scores: float32, ids: int32, masses: int64, all [R, spans]: of each span the peak, the best score, whose it
    is, and the mass relative to its peak. maxima: float32, blocks: int32, both [R, blocks]: the greatest of each block,
    and which blocks are read again.
    """

    peaks: Tensor
    scores: Tensor
    ids: Tensor
    masses: Tensor
    maxima: Tensor
    blocks: Tensor

    @classmethod
    def make(cls, num_rows: int, vocab_size: int, device: torch.device) -> Scratch:
        spans = -(-vocab_size // SPAN)

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(num_rows, width, dtype=dtype, device=device)

        return cls(
            peaks=empty(spans, torch.float32),
            scores=empty(spans, torch.float32),
            ids=empty(spans, torch.int32),
            masses=empty(spans, torch.int64),
            maxima=empty(spans * (SPAN // BLOCK), torch.float32),
            blocks=empty(spans * (SPAN // BLOCK), torch.int32),
        )


def sample(logits: Tensor, wishes: Wishes, tokens: Tensor, scratch: Scratch, *, truncates: bool) -> None:
    """Writes to int32 tokens [R] what is drawn from each row of float32 logits [R, V], V up to 2^18.

    -1 where the row holds a NaN or its greatest is infinite. truncates: whether top_k, top_p or min_p of any row is on;
    they are not looked at if not. The rows of logits need not be adjacent; their entries must be.
    """
    num_rows, vocab_size = logits.shape
    num_spans = -(-vocab_size // SPAN)
    how = (wishes.bases, wishes.positions, wishes.temperatures, wishes.top_k, wishes.top_p, wishes.min_p)
    # fused multiply-adds only where they are spelled out, lest a row's bits depend on `truncates`
    options = {"enable_fp_fusion": False}
    _score_spans[(num_spans, num_rows)](
        logits, logits.stride(0), *how, scratch.peaks, scratch.scores, scratch.ids, scratch.masses, scratch.maxima,
        VOCAB=vocab_size, TRUNCATES=truncates, SPAN=SPAN, BLOCK=BLOCK, num_warps=8, **options,
    )  # fmt: skip
    _choose_span[(num_rows,)](
        *how, scratch.peaks, scratch.scores, scratch.ids, tokens,
        NUM_SPANS=num_spans, TRUNCATES=truncates, num_warps=1, **options,
    )  # fmt: skip
    if truncates:
        _draw_restricted[(num_rows,)](
            logits, logits.stride(0), *how, scratch.peaks, scratch.masses, scratch.maxima, scratch.blocks, tokens,
            VOCAB=vocab_size, SPAN=SPAN, BLOCK=BLOCK, WAYS=8, TILE=1024, num_warps=16, **options,
        )  # fmt: skip


@triton.jit
def _is_restricted(temperature, top_k, top_p, min_p):
    return (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0))


@triton.jit
def _score_spans(
    logits, stride, bases, positions, temperatures, top_ks, top_ps, min_ps, peaks, scores, ids, masses, maxima,
    VOCAB: tl.constexpr, TRUNCATES: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    span, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = row * tl.num_programs(0) + span
    tokens = span * SPAN + tl.arange(0, SPAN)
    values = tl.load(logits + row * stride + tokens, mask=tokens < VOCAB, other=-_INF)
    values = tl.where(values == values, values, _INF)  # a NaN fails the row as well
    peak = tl.max(values)
    tl.store(peaks + slot, peak)
    temperature = tl.load(temperatures + row)
    is_restricted = False
    if TRUNCATES:
        top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
        is_restricted = _is_restricted(temperature, top_k, top_p, tl.load(min_ps + row))
        if is_restricted:
            PER_SPAN: tl.constexpr = SPAN // BLOCK
            greatest = tl.max(tl.reshape(values, [PER_SPAN, BLOCK]), axis=1)
            tl.store(maxima + slot * PER_SPAN + tl.arange(0, PER_SPAN), greatest)
            if (top_k == 0) & (top_p < 1):
                tl.store(masses + slot, tl.sum(_mass(_gap(values, peak, temperature))))
    if not is_restricted:
        if temperature == 0:
            tl.store(ids + slot, tl.min(tl.where(values == peak, tokens, _NO_ID)))
        else:
            key = noise_key(tl.load(bases + row), tl.load(positions + row))
            # a span of nothing but -inf has no peak to measure from
            scaled = (values - tl.where(tl.abs(peak) < _INF, peak, 0.0)) * tl.div_rn(1.0, temperature)
            noisy = scaled + gumbel(key, tokens)
            best = tl.max(noisy)
            tl.store(scores + slot, best)
            tl.store(ids + slot, tl.min(tl.where(noisy == best, tokens, _NO_ID)))


@triton.jit
def _choose_span(
    bases, positions, temperatures, top_ks, top_ps, min_ps, peaks, scores, ids, tokens,
    NUM_SPANS: tl.constexpr, TRUNCATES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    if TRUNCATES:  # noqa: SIM102 - decided at compilation
        if _is_restricted(temperature, tl.load(top_ks + row), tl.load(top_ps + row), tl.load(min_ps + row)):
            return
    spans = tl.arange(0, triton.next_power_of_2(NUM_SPANS))
    slots, is_there = row * NUM_SPANS + spans, spans < NUM_SPANS
    own_peaks = tl.load(peaks + slots, mask=is_there, other=-_INF)
    peak = tl.max(own_peaks)
    is_sound = tl.abs(peak) < _INF
    if temperature == 0:
        totals = own_peaks
    else:
        lacking = (own_peaks - tl.where(is_sound, peak, 0.0)) * tl.div_rn(1.0, temperature)
        totals = tl.load(scores + slots, mask=is_there, other=-_INF) + lacking
    best = tl.max(totals)
    token = tl.min(tl.where(totals == best, tl.load(ids + slots, mask=is_there, other=_NO_ID), _NO_ID))
    tl.store(tokens + row, tl.where(is_sound, token, -1))


@triton.jit
def _draw_restricted(
    logits, stride, bases, positions, temperatures, top_ks, top_ps, min_ps, peaks, masses, maxima, blocks, tokens,
    VOCAB: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    NUM_SPANS: tl.constexpr = (VOCAB + SPAN - 1) // SPAN
    NUM_BLOCKS: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k = tl.load(temperatures + row), tl.load(top_ks + row)
    top_p, min_p = tl.load(top_ps + row), tl.load(min_ps + row)
    if not _is_restricted(temperature, top_k, top_p, min_p):
        return
    spans = tl.arange(0, triton.next_power_of_2(NUM_SPANS))
    slots, is_there = row * NUM_SPANS + spans, spans < NUM_SPANS
    own_peaks = tl.load(peaks + slots, mask=is_there, other=-_INF)
    peak = tl.max(own_peaks)
    if tl.abs(peak) == _INF:
        tl.store(tokens + row, -1)
        return
    logits += row * stride
    maxima += row * NUM_SPANS * (SPAN // BLOCK)
    blocks += row * NUM_SPANS * (SPAN // BLOCK)

    least = tl.cast(_FARTHEST, tl.int32)  # the cut that min_p makes by itself
    if min_p > 0:
        least = tl.abs(tl.log(min_p.to(tl.float64))).to(tl.float32).to(tl.int32, bitcast=True)
    is_cut = (top_k > 0) | (top_p < 1)
    is_nucleus = top_k == 0
    wanted = tl.minimum(top_k, VOCAB).to(tl.int64)
    bound = least
    if is_cut:
        if is_nucleus:
            lacking = tl.div_rn(own_peaks - peak, temperature).to(tl.float64)
            own_masses = tl.load(masses + slots, mask=is_there, other=0).to(tl.float64)
            wanted = _share(top_p, tl.sum(own_masses * tl.exp(lacking)))
        bound, _ = _reach(
            wanted, _FARTHEST, is_nucleus, maxima, blocks, NUM_BLOCKS, peak, temperature,
            _COARSE, NUM_BLOCKS, 1, WAYS, TILE,
        )  # fmt: skip
    num_listed = _list_blocks(maxima, blocks, bound, peak, temperature, NUM_BLOCKS, TILE)
    tl.debug_barrier()  # the list is read by others than wrote it
    size = num_listed * BLOCK

    cut, num_ties = bound, tl.cast(_ALL, tl.int32)  # the last gap left, and how many of those who have it
    if is_cut:
        cut, below = _reach(
            wanted, bound, is_nucleus, logits, blocks, size, peak, temperature, 1, VOCAB, BLOCK, WAYS, TILE
        )
        num_ties = _ties(wanted - below, cut, is_nucleus)
        if (top_k > 0) & (top_p < 1):
            inside = _weigh(
                tl.full([1], cut - 1, tl.int32), True, logits, blocks, size, peak, temperature, VOCAB, BLOCK, 1, TILE
            )
            wanted = _share(top_p, (tl.max(inside) + num_ties * _mass(cut)).to(tl.float64))
            narrower, below = _reach(
                wanted, cut, True, logits, blocks, size, peak, temperature, 1, VOCAB, BLOCK, WAYS, TILE
            )
            fewer = _ties(wanted - below, narrower, True)
            num_ties = tl.where(narrower == cut, tl.minimum(num_ties, fewer), fewer)
            cut = narrower
    if least < cut:
        cut, num_ties = least, tl.cast(_ALL, tl.int32)

    key = noise_key(tl.load(bases + row), tl.load(positions + row))
    best, best_ids = tl.full([TILE], -_INF, tl.float32), tl.full([TILE], _NO_ID, tl.int32)
    num_seen = 0
    begin = 0
    while begin < size:
        here, gaps = _entries(begin, logits, blocks, size, peak, temperature, VOCAB, BLOCK, TILE)
        is_tie = (gaps == cut).to(tl.int32)
        is_left = (gaps < cut) | ((is_tie > 0) & (num_seen + tl.cumsum(is_tie) <= num_ties))
        num_seen += tl.sum(is_tie)
        noisy = tl.where(is_left, gumbel(key, here) - gaps.to(tl.float32, bitcast=True), -_INF)
        best_ids = tl.where(noisy > best, here, best_ids)
        best = tl.maximum(best, noisy)
        begin += TILE
    tl.store(tokens + row, tl.min(tl.where(best == tl.max(best), best_ids, _NO_ID)))


@triton.jit
def _gap(values, peak, temperature):
    """int32 bits of (peak - value) / temperature, which is never negative: in the order of the numbers."""
    return tl.div_rn(peak - values, temperature).to(tl.int32, bitcast=True)


@triton.jit
def _mass(gaps):
    """int64: exp(-gap), in units."""
    return (tl.exp2(gaps.to(tl.float32, bitcast=True) * -1.4426950408889634) * _UNIT).to(tl.int64)


@triton.jit
def _share(top_p, total):
    """int64: the mass to be reached; one token at least it takes."""
    return tl.maximum(tl.ceil(top_p.to(tl.float64) * total).to(tl.int64), 1)


@triton.jit
def _ties(lacking, gap, by_mass):
    """int32: how many of this gap it takes to reach what is lacking."""
    weight = tl.where(by_mass, tl.maximum(_mass(gap), 1), 1)
    return tl.minimum((lacking + weight - 1) // weight, _ALL).to(tl.int32)


@triton.jit
def _entries(
    begin, values, blocks, size, peak, temperature, LIMIT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Ids and gaps of TILE entries from `begin` on, of the `size` in the listed blocks (BLOCK 1: of all values).

    What is not there, or has an id from LIMIT on, counts as -inf.
    """
    places = begin + tl.arange(0, TILE)
    ids = places
    if BLOCK > 1:
        ids = tl.load(blocks + places // BLOCK, mask=places < size, other=0) * BLOCK + places % BLOCK
    found = tl.load(values + ids, mask=(places < size) & (ids < LIMIT), other=-_INF)
    return ids, _gap(found, peak, temperature)


@triton.jit
def _weigh(
    thresholds, by_mass, values, blocks, size, peak, temperature,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """int64 [WAYS]: the number, or the mass, of the entries whose gaps are not above each threshold."""
    reached = tl.full([WAYS, TILE], 0, tl.int64)
    begin = 0
    while begin < size:
        _, gaps = _entries(begin, values, blocks, size, peak, temperature, LIMIT, BLOCK, TILE)
        weights = tl.where(by_mass, _mass(gaps), 1)
        reached += tl.where(gaps[None, :] <= thresholds[:, None], weights[None, :], 0)
        begin += TILE
    return tl.sum(reached, axis=1)


@triton.jit
def _reach(
    wanted, highest, by_mass, values, blocks, size, peak, temperature,
    GRAIN: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The least gap up to which the weights reach `wanted`, or `highest`; and the weight of the lesser gaps.

    Where the lesser gaps of some integer weigh just what is wanted, it is as good an answer: none of its own is needed.
    With a GRAIN above 1 the answer may be too great by less than that. Each pass tries WAYS thresholds, which cut
    [low, high] into WAYS + 1 pieces, none longer than `step`.
    """
    low, high, below = tl.cast(0, tl.int32), tl.cast(highest, tl.int32), tl.cast(0, tl.int64)
    while high - low >= GRAIN:
        step = (high - low + WAYS + 1) // (WAYS + 1)
        thresholds = tl.minimum(low + step * (tl.arange(0, WAYS) + 1), high) - 1
        weights = _weigh(thresholds, by_mass, values, blocks, size, peak, temperature, LIMIT, BLOCK, WAYS, TILE)
        is_short = weights < wanted
        num_short = tl.sum(is_short.to(tl.int32))
        below = tl.maximum(below, tl.max(tl.where(weights <= wanted, weights, 0)))
        if num_short < WAYS:
            high = tl.minimum(low + step * (num_short + 1), high) - (below < wanted).to(tl.int32)
        low = tl.where(below < wanted, tl.minimum(low + step * num_short, high), high)
    return high, below


@triton.jit
def _list_blocks(maxima, blocks, bound, peak, temperature, NUM_BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Writes, in order, which blocks have a gap within the bound, and gives their number."""
    num_listed = 0
    begin = 0
    while begin < NUM_BLOCKS:
        here, gaps = _entries(begin, maxima, blocks, NUM_BLOCKS, peak, temperature, NUM_BLOCKS, 1, TILE)
        is_listed = (gaps <= bound) & (here < NUM_BLOCKS)
        places = num_listed + tl.cumsum(is_listed.to(tl.int32)) - 1
        tl.store(blocks + places, here, mask=is_listed)
        num_listed += tl.sum(is_listed.to(tl.int32))
        begin += TILE
    return num_listed
