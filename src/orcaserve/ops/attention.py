"""Attention over a paged KV cache, twice: the literal Split -> attend -> Merge, and the fast path with the promise.

Caches are [num_blocks, block_size, kv heads, d] in the model's dtype, or `ScaledBytes`. Both functions read back what
was stored.

`attention` gives a query bits that depend on its own value, its position and its own keys and values alone: not on who
else is in the batch, on how its prompt was cut into chunks, on decode or prefill, or on the block table. How: the
cache is walked in spans of `SPAN` positions that start at multiples of it, merged in order of position by an online
softmax; queries travel in tiles, padded, so that every product is one of a fixed shape. What a span adds that a query
may not see is exactly nothing: a zero, times a finite value of its own request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orcaserve.ops.layout import Layout, Row

SPAN = 128  # positions of the cache per product
QUERY_ROWS = 8  # rows of a query tile: positions * query heads per kv head; wider favours prefill, narrower decode
_GROUP_ITEMS = 64  # (tile, kv head) items that gather keys of their own at a time, so that the copies stay in cache


_NOTHING = 1e-30  # vectors whose values are no larger become zero: the inverse might be infinite


@dataclass(frozen=True, eq=False, slots=True)
class ScaledBytes:
    """A cache of 8 bits: values, whole numbers from -127 to 127, times the scale of their token and head.

    values: int8 [num_blocks, block_size, kv heads, d]. scales: float32 [num_blocks, block_size, kv heads]; NaN where a
    value was not finite, for bytes cannot say so.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, *shape: int) -> ScaledBytes:
        """Left as it comes."""
        return cls(torch.empty(shape, dtype=torch.int8), torch.empty(shape[:-1]))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def store(self, new: Tensor, slots: Tensor) -> None:
        """Writes new [n, kv heads, d] at `slots` (int64 [n])."""
        new = new.float()
        most = new.abs().amax(-1)
        factors = torch.where(most > _NOTHING, torch.full_like(most, 127.0) / most, 0.0)
        whole = (new * factors[..., None]).round().nan_to_num(0.0)
        self.values.flatten(0, 1).index_copy_(0, slots, whole.to(torch.int8))
        self.scales.flatten(0, 1).index_copy_(0, slots, most / 127.0 + most * 0.0)

    def read(self, places: Tensor) -> Tensor:
        """float32 [n, d] of the vectors at `places` (int64 [n] of slot * kv heads + head)."""
        values = self.values.view(-1, self.shape[3]).index_select(0, places)
        return values * self.scales.view(-1).index_select(0, places)[:, None]


Cache = Tensor | ScaledBytes


def store_kv(k: Tensor, v: Tensor, k_cache: Cache, v_cache: Cache, slots: Tensor) -> None:
    """Writes k and v [ΣL, kv heads, d] at `slots` (int64 [ΣL]) of the caches."""
    for new, cache in ((k, k_cache), (v, v_cache)):
        if isinstance(cache, ScaledBytes):
            cache.store(new, slots)
        else:
            cache.view(cache.shape[0] * cache.shape[1], -1).index_copy_(0, slots, new.reshape(new.shape[0], -1))


def split_attention(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """q [ΣL, heads, d] -> [ΣL, heads, d]: split by request, attend each against its own cache, merge.

    window: a query at p sees positions > p - window. softcap: scores become softcap * tanh(score / softcap).
    slopes: float32 [heads] of ALiBi: slope * (position of the key - position of the query) is added to a score.
    """
    return torch.cat(
        [
            _attend_one(part, k_cache, v_cache, row, layout.block_size, scale, window, softcap, slopes)
            for part, row in zip(q.split([row.num_tokens for row in layout.rows]), layout.rows, strict=True)
        ]
    )


def _attend_one(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    row: Row,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    seen = torch.arange(row.end)
    own = torch.arange(row.start, row.end)[:, None]
    slots = torch.from_numpy(row.blocks)[seen // block_size] * block_size + seen % block_size
    kv_heads, d = k_cache.shape[2:]
    group = q.shape[1] // kv_heads
    places = (slots[:, None] * kv_heads + torch.arange(kv_heads)).flatten()
    k, v = (_vectors(cache, places).view(-1, kv_heads, d).repeat_interleave(group, 1) for cache in (k_cache, v_cache))
    scores = torch.einsum("qhd,khd->hqk", q.float() * scale, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * (seen - own)
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    shares = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", shares, v).to(q.dtype)


def attention(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """As `split_attention`, with the promise; the two agree but for rounding."""
    heads, kv_heads = q.shape[1], k_cache.shape[2]
    shape = _Shape(max(1, QUERY_ROWS * kv_heads // heads), heads // kv_heads, kv_heads, q.shape[2])
    plan = layout.derived((shape, window), lambda: _plan(layout, shape, window))
    by_kv_head = None if slopes is None else slopes.view(kv_heads, 1, 1, -1, 1)
    out = torch.empty_like(q)
    for tiles in plan:
        out.index_copy_(0, tiles.tokens, _attend(q, k_cache, v_cache, tiles, shape, scale, softcap, by_kv_head))
    return out


@dataclass(frozen=True, slots=True)
class _Shape:
    """The fixed shape of every product: positions * group query rows of one kv head, d wide, against SPAN positions."""

    positions: int
    group: int
    kv_heads: int
    d: int


@dataclass(frozen=True, eq=False, slots=True)
class _Step:
    """Tiles [lo, hi) meet one span each.

    places: int64 [kv heads * n * SPAN] of slot * kv heads + head, with n = hi - lo, or n = 1: all of them meet the same
        span. Positions that are not stored yet stand as the last one that is, so that only the request's own values
        are ever read.
    mask: float32 [hi - lo, positions * group, SPAN], 0 or -inf; None where all is visible.
    own: int64 [hi - lo, positions], of the queries; seen: int64 [hi - lo or 1, SPAN], of the keys.
    """

    lo: int
    hi: int
    places: Tensor
    mask: Tensor | None
    own: Tensor
    seen: Tensor

    def distances(self) -> Tensor:
        """float32 [hi - lo, positions, 1, SPAN], from the query to the key."""
        return (self.seen[:, None, :] - self.own[:, :, None])[:, :, None].float()


@dataclass(frozen=True, eq=False, slots=True)
class _Tiles:
    """Query tiles that are worked on together, and the spans they meet in order of position.

    queries: int64 [tiles * positions], the token in each place; places past a row's end repeat its last token.
    tokens: int64 [n], the tokens that the tiles answer; places: int64 [n], where their answers stand.
    """

    queries: Tensor
    tokens: Tensor
    places: Tensor
    steps: tuple[_Step, ...]


def _plan(layout: Layout, shape: _Shape, window: int | None) -> tuple[_Tiles, ...]:
    """Rows of one tile (decodes, mostly) go together; a row of many goes alone, and its tiles share their spans."""

    def first_span(row: Row) -> int:
        return 0 if window is None else max(0, row.start - window + 1) // SPAN

    rows = [row for row in layout.rows if row.num_tokens]
    # longest first: then the tiles that still have a span to meet are always the first few
    single = sorted(
        (row for row in rows if row.num_tokens <= shape.positions),
        key=lambda row: first_span(row) - (row.end - 1) // SPAN,
    )
    at_once = max(1, _GROUP_ITEMS // shape.kv_heads)
    groups = [single[i : i + at_once] for i in range(0, len(single), at_once)]
    plan = [_single_tiles(group, layout.block_size, shape, window) for group in groups]
    plan += [_row_tiles(row, layout.block_size, shape, window) for row in rows if row.num_tokens > shape.positions]
    return tuple(plan)


def _single_tiles(rows: Sequence[Row], block_size: int, shape: _Shape, window: int | None) -> _Tiles:
    """One tile per row, each with keys of its own; step s is the s-th span that a tile meets."""
    start, count, first = (
        torch.tensor([[getattr(row, name)] for row in rows]) for name in ("start", "num_tokens", "first")
    )
    last = start + count - 1
    place = torch.arange(shape.positions)
    own = torch.minimum(start + place, last)
    used = (place < count).flatten().nonzero().flatten()
    queries = (first + own - start).flatten()
    lengths = torch.tensor([row.blocks.shape[0] for row in rows])
    blocks = torch.from_numpy(np.concatenate([row.blocks for row in rows]))
    offset = (lengths.cumsum(0) - lengths)[:, None]
    span = torch.zeros_like(start) if window is None else (start - window + 1).clamp_(min=0) // SPAN
    spans = (last // SPAN - span + 1).flatten().tolist()
    steps = []
    for step in range(spans[0]):
        n = sum(have > step for have in spans)
        seen = (span[:n] + step) * SPAN + torch.arange(SPAN)
        stored = torch.minimum(seen, last[:n])
        slots = blocks[offset[:n] + stored // block_size] * block_size + stored % block_size
        steps.append(_Step(0, n, _places(slots.flatten(), shape), _mask(own[:n], seen, shape, window), own[:n], seen))
    return _Tiles(queries, queries[used], used, tuple(steps))


def _row_tiles(row: Row, block_size: int, shape: _Shape, window: int | None) -> _Tiles:
    """All tiles of one row, in order; step j is one span, met by those tiles that see any of it."""
    tiles = -(-row.num_tokens // shape.positions)
    own = torch.arange(row.start, row.start + tiles * shape.positions).clamp_(max=row.end - 1).view(tiles, -1)
    queries = (own - row.start + row.first).flatten()
    used = torch.arange(row.num_tokens)
    steps = []
    first = 0 if window is None else max(0, row.start - window + 1) // SPAN
    for span in range(first, (row.end - 1) // SPAN + 1):
        seen = torch.arange(span * SPAN, (span + 1) * SPAN)
        # tiles run upwards in position: those below the span see nothing of it yet, those far above no longer
        lo = max(0, span * SPAN - row.start) // shape.positions
        past = tiles * shape.positions if window is None else (span + 1) * SPAN - 1 + window - row.start
        hi = min(tiles, -(-past // shape.positions))
        stored = seen.clamp(max=row.end - 1)
        slots = torch.from_numpy(row.blocks)[stored // block_size] * block_size + stored % block_size
        places, mask = _places(slots, shape), _mask(own[lo:hi], seen[None], shape, window)
        steps.append(_Step(lo, hi, places, mask, own[lo:hi], seen[None]))
    return _Tiles(queries, queries[used], used, tuple(steps))


def _places(slots: Tensor, shape: _Shape) -> Tensor:
    """Where the slots' vectors of head 0 stand in a cache, then those of head 1, and so on."""
    return (slots * shape.kv_heads + torch.arange(shape.kv_heads)[:, None]).flatten()


def _mask(own: Tensor, seen: Tensor, shape: _Shape, window: int | None) -> Tensor | None:
    """own: int64 [tiles, positions]; seen: int64 [tiles or 1, SPAN]."""
    hidden = seen[:, None, :] > own[:, :, None]
    if window is not None:
        hidden |= seen[:, None, :] <= own[:, :, None] - window
    if not bool(hidden.any()):
        return None
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(shape.group, dim=1)


def _attend(
    q: Tensor,
    k_cache: Cache,
    v_cache: Cache,
    tiles: _Tiles,
    shape: _Shape,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
) -> Tensor:
    """The answers of the tiles' tokens, [n, heads, d] in the dtype of q. slopes: float32 [kv heads, 1, 1, group, 1]."""
    split = (-1, shape.positions, shape.kv_heads, shape.group, shape.d)
    queries = q.index_select(0, tiles.queries).view(split).permute(2, 0, 1, 3, 4).float().mul(scale)
    queries = queries.reshape(shape.kv_heads, -1, shape.positions * shape.group, shape.d)
    peak = torch.full((*queries.shape[:3], 1), -torch.inf)
    mass = torch.zeros_like(peak)
    gathered = torch.zeros_like(queries)
    for step in tiles.steps:
        now = slice(step.lo, step.hi)
        scores = _products(queries[:, now], _read(k_cache, step.places).transpose(2, 3))
        if softcap is not None:
            scores = torch.tanh(scores.div_(softcap)).mul_(softcap)
        if slopes is not None:
            scores.add_((slopes * step.distances()).flatten(2, 3))
        if step.mask is not None:
            scores.add_(step.mask)
        higher = torch.maximum(peak[:, now], scores.amax(-1, keepdim=True))
        pivot = higher.masked_fill(higher == -torch.inf, 0.0)  # a query that has seen nothing yet
        shares = scores.sub_(pivot).exp_()
        keep = (peak[:, now] - pivot).exp_()
        peak[:, now] = higher
        mass[:, now] = mass[:, now].mul(keep).add_(shares.sum(-1, keepdim=True))
        gathered[:, now] = gathered[:, now].mul(keep).add_(_products(shares, _read(v_cache, step.places)))
    answers = (gathered / mass).to(q.dtype).view(shape.kv_heads, -1, shape.positions, shape.group, shape.d)
    answers = answers.permute(1, 2, 0, 3, 4).reshape(-1, shape.kv_heads * shape.group, shape.d)
    return answers.index_select(0, tiles.places)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a [heads, n, rows, x] times b [heads, n or 1, x, y] -> [heads, n, rows, y], every item a product of one shape."""
    heads, n, rows, inner = a.shape
    if b.shape[1] == n:
        return torch.bmm(a.reshape(-1, rows, inner), b.flatten(0, 1)).view(heads, n, rows, -1)
    out = a.new_empty((heads, n, rows, b.shape[3]))
    for head in range(heads):
        torch.bmm(a[head], b[head].expand(n, -1, -1), out=out[head])
    return out


def _read(cache: Cache, places: Tensor) -> Tensor:
    """The spans at `places` as float32 [kv heads, spans, SPAN, d]: gathered by head, then widened in one sweep."""
    return _vectors(cache, places).view(cache.shape[2], -1, SPAN, cache.shape[3])


def _vectors(cache: Cache, places: Tensor) -> Tensor:
    """float32 [n, d] of the vectors at `places` (int64 [n] of slot * kv heads + head)."""
    if isinstance(cache, ScaledBytes):
        return cache.read(places)
    return cache.view(-1, cache.shape[3]).index_select(0, places).float()
