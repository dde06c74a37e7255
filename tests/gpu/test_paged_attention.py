"""Attention on a device: right against a plain softmax in float64, and the same bits however the work is cut."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from orcaserve.ops.gpu.attention import Scratch, Tuning, attention, tile_tokens
from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.pieces import chunk_tiles, decode_items

DTYPES = [torch.bfloat16, torch.float32]
ERRORS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

PLAIN: dict[str, object] = {"window": None, "softcap": None, "sloped": False}
WINDOW = PLAIN | {"window": 100}
CAPPED = PLAIN | {"softcap": 20.0, "window": 300}
SLOPED = PLAIN | {"sloped": True}


@dataclass(frozen=True)
class Request:
    """One request's queries [n, heads * d] at all its positions, and its blocks of the cache."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    blocks: tuple[int, ...]


class World:
    """Requests of given lengths in one cache, where all that is nobody's is NaN."""

    def __init__(
        self,
        device: torch.device,
        lengths: Sequence[int],
        *,
        dtype: torch.dtype,
        kv_heads: int = 1,
        group: int = 2,
        d: int = 64,
        block_size: int = 64,
        window: int | None = None,
        softcap: float | None = None,
        sloped: bool = False,
        seed: int = 0,
    ):
        print("seed", seed)
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.device, self.block_size, self.d, self.group = device, block_size, d, group
        self.window, self.softcap, self.heads = window, softcap, kv_heads * group
        self.scale = 2.0 / math.sqrt(d)
        self.slopes = torch.rand(self.heads).div(8).to(device) if sloped else None
        counts = [-(-n // block_size) for n in lengths]
        free = list(range(sum(counts) + 3))
        rng.shuffle(free)
        shape = (len(free), kv_heads, block_size, d)
        self.k, self.v = (torch.full(shape, math.nan, device=device, dtype=dtype) for _ in range(2))
        self.requests = []
        for n, count in zip(lengths, counts, strict=True):
            blocks = tuple(free.pop() for _ in range(count))
            queries = torch.randn(n, self.heads * d, dtype=torch.float32).to(device, dtype)
            keys, values = (torch.randn(n, kv_heads, d, dtype=torch.float32).to(device, dtype) for _ in range(2))
            for cache, new in ((self.k, keys), (self.v, values)):
                for i, block in enumerate(blocks):
                    part = new[i * block_size : (i + 1) * block_size]
                    cache[block, :, : len(part)] = part.transpose(0, 1)
            self.requests.append(Request(queries, keys, values, blocks))
        width = max(counts) + 2
        # past the end of a table anything may stand
        self.tables = torch.tensor([[*r.blocks, *[1 << 30] * (width - len(r.blocks))] for r in self.requests])

    def run(
        self,
        decodes: Sequence[tuple[int, int] | None],
        chunks: Sequence[tuple[int, int, int]] = (),
        *,
        tile: int | None = None,
        items_window: int | None = None,
        tuning: Tuning | None = None,
    ) -> Tensor:
        """[M, heads * d] for decodes (request, position), None for padding, then chunks (request, start, count)."""
        tuning = Tuning.of(self.d) if tuning is None else tuning
        longest = tile_tokens(self.group, self.k.dtype, tuning)
        rows = [(0, -1) if decode is None else decode for decode in decodes]
        rows += [(request, start + i) for request, start, count in chunks for i in range(count)]
        counts = np.array([count for _, _, count in chunks], np.int64)
        firsts = len(decodes) + np.cumsum(counts) - counts
        seats = np.array([request for request, _, _ in chunks], np.int64)
        positions = np.array([position for _, position in rows])
        items, first_items = decode_items(positions[: len(decodes)], items_window)
        tiles = chunk_tiles(firsts, counts, seats, longest if tile is None else min(tile, longest))
        layout = DeviceLayout(
            positions=self._int32(positions),
            slots=self._int32(positions),
            seats=self._int32(np.array([request for request, _ in rows])),
            tables=self._int32(self.tables),
            block_size=self.block_size,
            num_decodes=len(decodes),
            items=self._int32(np.concatenate([items, np.full(5, -1)])),
            first_items=self._int32(first_items),
            tiles=self._int32(tiles.reshape(-1, 3)),
        )
        scratch = Scratch.empty(len(items) + 7, self.heads, self.d, self.device)
        for part in (scratch.gathered, scratch.peaks, scratch.masses):
            part.fill_(math.nan)
        q = torch.stack([self.requests[request].queries[position] for request, position in rows])
        return attention(
            q, self.k, self.v, layout, scratch, scale=self.scale, window=self.window, softcap=self.softcap,
            slopes=self.slopes, tuning=tuning,
        )  # fmt: skip

    def expect(self, request: int, position: int) -> Tensor:
        """float64 [heads * d]."""
        r = self.requests[request]
        first = 0 if self.window is None else max(0, position - self.window + 1)
        k, v = (
            x[first : position + 1].double().repeat_interleave(self.group, 1).transpose(0, 1)
            for x in (r.keys, r.values)
        )
        scores = (k @ r.queries[position].double().view(self.heads, self.d, 1))[..., 0] * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.slopes is not None:
            seen = torch.arange(first, position + 1, device=self.device)
            scores = scores + self.slopes.double()[:, None] * (seen - position)
        return (torch.softmax(scores, 1)[:, None] @ v).flatten()

    def _int32(self, values: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(values).to(self.device, torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(whole), b.view(whole))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (PLAIN, {"kv_heads": 2}),
        (WINDOW, {"group": 7}),
        (CAPPED, {"d": 80}),
        (SLOPED, {"d": 96, "group": 4}),
        (WINDOW | SLOPED, {"d": 128, "block_size": 16, "group": 1}),
        (PLAIN, {"d": 256, "block_size": 128, "group": 16}),
        (PLAIN, {"d": 128, "block_size": 32}),
    ],
)
def test_agrees_with_a_plain_softmax(
    device: torch.device, dtype: torch.dtype, options: dict[str, object], shape: dict[str, int]
) -> None:
    world = World(device, [SPAN + 9, 70], dtype=dtype, **options, **shape)
    decodes = [(0, SPAN + 8), None, (1, 5), (0, 0)]
    chunks = [(0, SPAN - 3, 5), (1, 60, 4)]
    got = world.run(decodes, chunks)
    wanted = [*decodes, *((request, start + i) for request, start, count in chunks for i in range(count))]
    for row, place in zip(got, wanted, strict=True):
        if place is None:
            assert torch.equal(row, torch.zeros_like(row))
        else:
            torch.testing.assert_close(row.double(), world.expect(*place), rtol=0, atol=ERRORS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "group"), [(PLAIN, 2), (WINDOW | SLOPED, 7), (CAPPED, 4)])
def test_a_token_has_the_same_bits_decoded_and_in_any_chunk(
    device: torch.device, dtype: torch.dtype, options: dict[str, object], group: int
) -> None:
    start, length = SPAN - 4, SPAN + 12
    world = World(device, [length, 40], dtype=dtype, group=group, **options, seed=group)
    whole = world.run([], [(0, start, length - start)])
    assert torch.isfinite(whole).all()
    at = [SPAN - 1, SPAN, SPAN + 1, length - 1]
    wanted = whole[[position - start for position in at]]

    crowd = [(1, 3), None, *((0, position) for position in reversed(at)), None]
    mixed = world.run(crowd, [(1, 0, 3), (0, SPAN + 1, 8)], tile=5, items_window=world.window)
    assert same_bits(mixed[2 : 2 + len(at)].flip(0), wanted)
    assert same_bits(mixed[len(crowd) + 3 :], whole[SPAN + 1 - start : SPAN + 9 - start])

    other = Tuning(decode_stages=2, decode_programs=1, prefill_stages=2, prefill_rows=64)
    cut = world.run([(0, SPAN)], [(0, SPAN - 1, 3)], tuning=other)
    assert same_bits(cut[0], whole[SPAN - start])
    assert same_bits(cut[1:], whole[SPAN - 1 - start : SPAN + 2 - start])


@pytest.mark.parametrize("options", [PLAIN, WINDOW])
def test_a_long_context_has_the_same_bits_decoded_and_in_any_chunk(
    device: torch.device, options: dict[str, object]
) -> None:
    length = 2 * SPAN + 45
    world = World(device, [length], dtype=torch.bfloat16, **options)
    whole = world.run([], [(0, 2 * SPAN - 12, 57)])
    at = [2 * SPAN - 1, 2 * SPAN, length - 1]
    assert same_bits(world.run([(0, position) for position in at]), whole[[p - 2 * SPAN + 12 for p in at]])


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="minutes under the interpreter, where the tests above hold the same of a few tokens",
)
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_of_a_prompt_has_the_bits_of_decodes(device: torch.device, dtype: torch.dtype, d: int, group: int) -> None:
    length = 3 * SPAN + 77
    world = World(device, [length], dtype=dtype, d=d, group=group, kv_heads=2)
    whole = world.run([], [(0, 0, length)])
    assert same_bits(world.run([(0, position) for position in range(length)]), whole)
    assert same_bits(world.run([], [(0, 0, 100), (0, 100, length - 100)], tile=3), whole)


def test_refuses_more_items_than_the_scratch_holds(device: torch.device) -> None:
    world = World(device, [3], dtype=torch.float16)
    none = torch.zeros(2, dtype=torch.int32, device=device)
    layout = DeviceLayout(none, none, none, none[None], 64, 2, torch.zeros(9).int(), none, none.new_empty(0, 3))
    scratch = Scratch.empty(8, world.heads, world.d, device)
    with pytest.raises(ValueError, match="9 items"):
        attention(world.requests[0].queries, world.k, world.v, layout, scratch, scale=1.0)


@pytest.mark.parametrize("window", [None, 1, 100, SPAN, 3 * SPAN])
def test_items_are_the_spans_that_a_window_shows(window: int | None) -> None:
    rng = random.Random(f"items {window}")
    positions = [rng.choice([-1, rng.randrange(9 * SPAN), SPAN * rng.randrange(1, 9)]) for _ in range(50)]
    wanted, firsts = [], [0]
    for token, position in enumerate(positions):
        low = 0 if window is None else max(0, position - window + 1)
        wanted += [token << 16 | span for span in sorted({p // SPAN for p in range(low, position + 1)})]
        firsts.append(len(wanted))
    items, first_items = decode_items(np.array(positions), window)
    assert (items.dtype, first_items.dtype) == (np.int32, np.int32)
    assert items.tolist() == wanted
    assert first_items.tolist() == firsts


def test_no_decodes_have_no_items() -> None:
    items, first_items = decode_items(np.zeros(0, np.int32))
    assert (items.tolist(), first_items.tolist()) == ([], [0])


def test_tiles_cover_each_chunk_in_order() -> None:
    rng = random.Random("tiles")
    counts = [rng.choice([1, 7, 8, 9, rng.randrange(1, 100)]) for _ in range(30)]
    firsts = np.cumsum(counts) - counts + 5
    wanted = [
        [first + i, min(8, count - i), seat]
        for first, count, seat in zip(firsts, counts, range(30), strict=True)
        for i in range(0, count, 8)
    ]
    tiles = chunk_tiles(firsts, np.array(counts), np.arange(30), 8)
    assert tiles.dtype == np.int32
    assert tiles.tolist() == wanted
    assert chunk_tiles(*[np.zeros(0, np.int64)] * 3, 8).shape == (0, 3)
