"""Attention: the two ways agree, and a query's bits are its own."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orcaserve.ops.attention import attention, split_attention, store_kv
from orcaserve.ops.layout import Layout

torch.set_num_threads(1)


class World:
    """Requests with their q, k, v, a cache full of rubbish, and block tables drawn at random."""

    def __init__(self, seed, *, kv_heads, group, d, block_size, lengths, dtype, rubbish=float("nan")):
        self.random = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)

        def draw(n, heads):
            return torch.randn(n, heads, d, generator=generator).to(dtype)

        self.q = [draw(n, kv_heads * group) for n in lengths]
        self.k = [draw(n, kv_heads) for n in lengths]
        self.v = [draw(n, kv_heads) for n in lengths]
        self.block_size, self.lengths = block_size, lengths
        self.num_blocks = 2 + sum(-(-n // block_size) for n in lengths)
        self.shape = (self.num_blocks, block_size, kv_heads, d)
        self.dtype, self.rubbish = dtype, rubbish
        self.scale = d**-0.5

    def fresh(self):
        """Empty caches (what is not written must never matter) and a new block table per request."""
        self.k_cache = torch.full(self.shape, self.rubbish, dtype=self.dtype)
        self.v_cache = torch.full(self.shape, self.rubbish, dtype=self.dtype)
        free = self.random.sample(range(self.num_blocks), self.num_blocks)
        self.tables = [[free.pop() for _ in range(-(-n // self.block_size))] for n in self.lengths]

    def step(self, parts, attend, **options):
        """parts: (request, start, num_tokens); gives each one's output."""
        layout = Layout.build([(start, n, self.tables[r]) for r, start, n in parts], self.block_size)

        def rows(tensors):
            return torch.cat([tensors[r][start : start + n] for r, start, n in parts])

        store_kv(rows(self.k), rows(self.v), self.k_cache, self.v_cache, layout.slots)
        out = attend(rows(self.q), self.k_cache, self.v_cache, layout, scale=self.scale, **options)
        return out.split([n for _, _, n in parts])

    def run_ragged(self, most, **options):
        """All requests to their ends, in chunks of random size (ones included), in batches of random members."""
        done = [0] * len(self.lengths)
        outs = [[] for _ in self.lengths]
        while any(d < n for d, n in zip(done, self.lengths, strict=True)):
            parts = []
            for r in self.random.sample(range(len(done)), len(done)):
                left = self.lengths[r] - done[r]
                if left and self.random.random() < 0.7:
                    n = min(left, self.random.choice([1, 1, self.random.randint(1, most)]))
                    parts.append((r, done[r], n))
            if not parts:
                continue
            for (r, _, n), out in zip(parts, self.step(parts, attention, **options), strict=True):
                outs[r].append(out)
                done[r] += n
        return [torch.cat(out) for out in outs]


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_two_ways_agree(dtype, data):
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))
    world = World(
        data.draw(st.integers(0, 10**6)),
        kv_heads=data.draw(st.sampled_from([1, 2, 3])),
        group=data.draw(st.sampled_from([1, 2, 3, 4, 8, 20])),
        d=data.draw(st.sampled_from([8, 16, 64])),
        block_size=data.draw(st.integers(1, 64)),
        lengths=lengths,
        dtype=dtype,
    )
    world.fresh()
    options = {
        "window": data.draw(st.sampled_from([None, 1, 5, 128, 200])),
        "softcap": data.draw(st.sampled_from([None, 3.0])),
    }
    starts = [data.draw(st.one_of(st.just(n - 1), st.integers(0, n - 1))) for n in lengths]
    before = [(r, 0, start) for r, start in enumerate(starts) if start]
    if before:
        world.step(before, attention, **options)
    parts = [(r, start, n - start) for r, (start, n) in enumerate(zip(starts, lengths, strict=True))]
    fast, plain = world.step(parts, attention, **options), world.step(parts, split_attention, **options)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("threads", "kv_heads", "group", "d", "options"),
    [
        (1, 2, 2, 64, {}),
        (1, 8, 2, 128, {}),
        (1, 1, 8, 16, {"window": 100}),
        (1, 2, 3, 32, {"window": 17, "softcap": 5.0}),
        (1, 3, 1, 64, {"softcap": 2.0}),
        (1, 1, 20, 8, {}),
        (2, 4, 2, 64, {"window": 100}),
    ],
)
def test_bits_do_not_depend_on_the_way_there(threads, dtype, kv_heads, group, d, options):
    seed = random.randrange(10**6)
    print("seed", seed)
    lengths = [300, 1, 129, 64, 140, 20]
    world = World(seed, kv_heads=kv_heads, group=group, d=d, block_size=random.Random(seed).choice([1, 7, 16]),
                  lengths=lengths, dtype=dtype)  # fmt: skip
    torch.set_num_threads(threads)
    try:
        alone = []
        for r, n in enumerate(lengths):
            world.fresh()
            alone += world.step([(r, 0, n)], attention, **options)
        assert not any(out.isnan().any() for out in alone)
        world.fresh()
        world.step([(4, 0, 60)], attention, **options)
        decoded = torch.cat([world.step([(4, p, 1)], attention, **options)[0] for p in range(60, lengths[4])])
        assert torch.equal(decoded, alone[4][60:])
        for most in (20, 200):
            world.fresh()
            for r, out in enumerate(world.run_ragged(most, **options)):
                assert torch.equal(out, alone[r]), (seed, most, r)
    finally:
        torch.set_num_threads(1)


def test_many_decodes_in_several_groups():
    """More rows than one group takes: the groups meet in one output, each row in its own place."""
    world = World(3, kv_heads=8, group=1, d=16, block_size=16, lengths=[random.Random(3).randint(1, 400)
                  for _ in range(40)], dtype=torch.float32)  # fmt: skip
    world.fresh()
    world.step([(r, 0, n) for r, n in enumerate(world.lengths)], attention)
    parts = [(r, n - 1, 1) for r, n in enumerate(world.lengths)]
    together = world.step(parts, attention)
    for part, out in zip(parts, together, strict=True):
        assert torch.equal(out, world.step([part], attention)[0])
    for a, b in zip(together, world.step(parts, split_attention), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_another_requests_nan_stays_its_own():
    world = World(5, kv_heads=2, group=2, d=16, block_size=4, lengths=[50, 50, 3], dtype=torch.float32)
    world.fresh()
    parts = [(r, 0, n) for r, n in enumerate(world.lengths)]
    clean = world.step(parts, attention)
    world.v[1][20] = torch.nan
    world.k[1][30] = torch.inf
    dirty = world.step(parts, attention)
    assert torch.equal(dirty[0], clean[0])
    assert torch.equal(dirty[2], clean[2])
    assert dirty[1].isnan().any()


def test_block_table_too_short_is_refused():
    with pytest.raises(ValueError, match="cannot hold"):
        Layout.build([(0, 9, [0, 1])], 4)
