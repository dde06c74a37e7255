"""Draws on the device against `ops.draw` with float32 noise, and that noise against the exact one of `ops.noise`."""

import math
import random

import pytest
import torch
import triton
import triton.language as tl

from orcaserve.ops.draw import Draw, _allowed
from orcaserve.ops.gpu.noise import gumbel, noise_key
from orcaserve.ops.gpu.sampling import Scratch, Wishes, sample
from orcaserve.ops.noise import FACTORS, HIGHEST, LOWEST, STEP, base_key, noise, signed
from orcaserve.ops.noise import noise_key as exact_key

torch.set_num_threads(1)

MASK = (1 << 64) - 1
SLACK = 5e-6  # between noisy scores in float32 of two makers
KINDS = ["normal", "peaked", "flat", "equal", "few", "steps", "holes"]


@triton.jit
def _noises(bases, positions, ids, out, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = noise_key(tl.load(bases + row), tl.load(positions + row))
    column = tl.arange(0, WIDTH)
    tl.store(out + row[:, None] * WIDTH + column[None, :], gumbel(key[:, None], tl.load(ids + column)[None, :]))


@triton.jit
def _noises_of_keys(keys, out, TILE: tl.constexpr):
    row = tl.arange(0, TILE)
    tl.store(out + row, gumbel(tl.load(keys + row).to(tl.uint64, bitcast=True), row))


def unmixed(z):
    """The word whose hash is z: each step of the finaliser undone."""
    z ^= z >> 31 ^ z >> 62
    z = z * pow(FACTORS[1], -1, 1 << 64) & MASK
    z ^= z >> 27 ^ z >> 54
    z = z * pow(FACTORS[0], -1, 1 << 64) & MASK
    return z ^ z >> 30 ^ z >> 60


def tensor(values, dtype, device):
    return torch.tensor(values, dtype=dtype, device=device)


def noises(bases, positions, ids, device):
    """float32 [n, 8] for n keys, a multiple of 4096, and 8 ids."""
    out = torch.full((len(bases), 8), torch.nan, device=device)
    _noises[(len(bases) // 4096,)](
        tensor([signed(base) for base in bases], torch.int64, device), tensor(positions, torch.int32, device),
        tensor(ids, torch.int32, device), out, WIDTH=8, TILE=4096,
    )  # fmt: skip
    return out.cpu()


def test_noise_is_exact_up_to_float32_at_every_scale(device):
    """The hash is led to words next to either end of (0, 1) and at every power of two from there."""
    rng = random.Random(1)
    words = [0, MASK, 1 << 63, (1 << 63) - 1]
    for bit in range(64):
        words += [rng.getrandbits(bit + 1), MASK - rng.getrandbits(bit + 1)] * 8
    words = (words * 2)[:1024]
    keys = [unmixed(word) - (i + 1) * STEP & MASK for i, word in enumerate(words)]
    out = torch.full((1024,), torch.nan, device=device)
    _noises_of_keys[(1,)](tensor([signed(key) for key in keys], torch.int64, device), out, TILE=1024)
    exact = torch.cat([noise(key, torch.tensor([i])) for i, key in enumerate(keys)])
    assert float(exact.min()) < -3.6 and float(exact.max()) > 36.7
    assert float(out.min()) > LOWEST and float(out.max()) < HIGHEST
    torch.testing.assert_close(out.cpu().double(), exact, rtol=3e-7, atol=5e-7)


def test_keys_are_those_of_the_host(device):
    rng = random.Random(2)
    wishes = [(rng.getrandbits(64), rng.randrange(8), rng.randrange(1 << 31)) for _ in range(4096)]
    ids = [0, 1, 2, 77, 151_935, 262_143, 65_535, 65_536]
    got = noises([base_key(seed, choice) for seed, choice, _ in wishes], [p for *_, p in wishes], ids, device)
    for i in range(0, 4096, 64):
        exact = noise(exact_key(*wishes[i]), torch.tensor(ids))
        torch.testing.assert_close(got[i].double(), exact, rtol=1e-6, atol=1e-6)


def test_draws_have_the_distribution_of_the_softmax(device):
    logits = torch.tensor([0.0, 1.5, -1.0, 0.3, -4.0, 2.0, 0.3, -2.5])
    shares, n = logits.double().softmax(0), 32_768
    ways = {
        "position": noises([base_key(7, 0)] * n, range(n), range(8), device),
        "seed": noises([base_key(seed, 0) for seed in range(n)], [12] * n, range(8), device),
        "id": noises([base_key(3, 1)] * n, range(n), [20_000 * i for i in range(8)], device),
    }
    for way, found in ways.items():
        counts = torch.bincount((logits + found).argmax(1), minlength=8)
        chi2 = float(((counts - n * shares) ** 2 / (n * shares)).sum())
        assert chi2 < 24.3, (way, chi2)  # 99.9 % of the distribution with 7 degrees of freedom
        for bound in (-1.5, 0.0, 1.0, 3.0, 6.0, 8.0):
            above = -math.expm1(-math.exp(-bound))
            error = math.sqrt(8 * n * above * (1 - above))
            assert abs(int((found > bound).sum()) - 8 * n * above) < 4 * error, (way, bound)


def row_of(kind, v, generator):
    values = torch.randn(v, generator=generator)
    somewhere = int(torch.randint(v, (1,), generator=generator))
    if kind == "peaked":
        values[somewhere] += 20.0
    elif kind == "flat":
        values *= 1e-3
    elif kind == "equal":
        values.fill_(1.5)
    elif kind == "few":
        values = (values * 2).round()
    elif kind == "steps":
        values = (values * 16).round() / 8 - 30.0
    elif kind == "holes":
        values[torch.rand(v, generator=generator) < 0.7] = -torch.inf
        values[somewhere] = 0.5
    return values * 3 if kind == "normal" else values


def plain_wish(rng):
    """(base, position, temperature, top_k, top_p, min_p), as float32 has them."""
    temperature = rng.choice([0.0, 1e-30, 0.01, 0.7, 1.0, 1.0, 3.0, 1e6])
    return base_key(rng.getrandbits(64), rng.randrange(4)), rng.randrange(100_000), temperature, 0, 1.0, 0.0


def restricted_wish(rng, v):
    restrictions = (
        rng.choice([0, 0, 1, 3, 50, max(1, v - 1), v, 2 * v]),
        rng.choice([1.0, 1.0, 0.0, 1e-6, 0.3, 0.9, 0.999, 1 - 2**-24]),
        rng.choice([0.0, 0.0, 1e-4, 0.05, 0.5, 1.0]),
    )
    return *plain_wish(rng)[:3], *restrictions


def draw(logits, wishes, device, *, truncates, scratch=None):
    """Ids, with the scratch poisoned before."""
    scratch = scratch or Scratch.make(*logits.shape, device)
    for name in Scratch.__slots__:
        getattr(scratch, name).fill_(-5)
    types = (torch.int64, torch.int32, torch.float32, torch.int32, torch.float32, torch.float32)
    columns = zip(*((signed(base), *others) for base, *others in wishes), strict=True)
    on_device = Wishes(*(tensor(column, dtype, device) for column, dtype in zip(columns, types, strict=True)))
    tokens = torch.full((len(wishes),), -77, dtype=torch.int32, device=device)
    sample(logits, on_device, tokens, scratch, truncates=truncates)
    return tokens.tolist()


def is_right(token, logits, wish):
    """Whether float32 logits [V] may give this token; two that differ by roundings alone may both be the best."""
    base, position, temperature, top_k, top_p, min_p = wish
    peak = logits.amax()
    if not peak.isfinite():
        return token == -1
    if temperature == 0.0:
        return token == int((logits == peak).nonzero()[0])
    temperature, top_p, min_p = torch.tensor([temperature, top_p, min_p]).tolist()
    scaled = (logits - peak) / temperature
    key = fold(base, position)
    noisy = scaled + noise(key, torch.arange(logits.shape[0])).float()
    # where a running sum meets top_p up to roundings, either cut is right
    for share in (top_p,) if top_p in (0.0, 1.0) else (top_p, top_p * (1 - 1e-6), top_p + (1 - top_p) * 1e-6):
        ids = _allowed(scaled, Draw(0, key, temperature, top_k, share, min_p))
        if token in ids and noisy[token] >= noisy[ids].amax() - SLACK:
            return True
    return False


def fold(base, position):
    z = (base + STEP ^ position) & MASK
    for shift, factor in ((30, FACTORS[0]), (27, FACTORS[1])):
        z = (z ^ z >> shift) * factor & MASK
    return z ^ z >> 31


def rows(seed, v, n):
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    kinds = [rng.choice(KINDS) for _ in range(n)]
    return rng, torch.stack([row_of(kind, v, generator) for kind in kinds]), kinds


def sizes(device, few, many):
    """(V, number of rows): the interpreter takes a tenth of a second for a row."""
    return many if device.type == "cuda" else few


def test_plain_rows_are_drawn_as_the_twin_does(device):
    few = [(1, 3), (5, 6), (4095, 6), (4096, 4), (9000, 8)]
    for v, n in sizes(device, few, [(1, 40), (5, 200), (4095, 200), (4096, 200), (9000, 400), (151_936, 300)]):
        rng, logits, kinds = rows(v, v, n)
        wishes = [plain_wish(rng) for _ in range(n)]
        tokens = draw(logits.to(device), wishes, device, truncates=False)
        for i in range(n):
            assert is_right(tokens[i], logits[i], wishes[i]), (v, i, kinds[i], wishes[i])


def test_restricted_rows_are_drawn_as_the_twin_does(device):
    few = [(1, 2), (2, 4), (100, 20), (1500, 6), (9000, 3)]
    for v, n in sizes(device, few, [(1, 40), (2, 100), (100, 1000), (3000, 1000), (151_936, 200), (262_144, 50)]):
        rng, logits, kinds = rows(v, v, n)
        wishes = [restricted_wish(rng, v) for _ in range(n)]
        tokens = draw(logits.to(device), wishes, device, truncates=True)
        for i in range(n):
            assert is_right(tokens[i], logits[i], wishes[i]), (v, i, kinds[i], wishes[i])


def test_the_token_that_reaches_top_p_is_the_last(device):
    """Of equal tokens exactly half have half of the mass, and more is not reached without one more of them."""
    n = 200 if device.type == "cuda" else 1
    noises = [noise(fold(9, position), torch.arange(10)) for position in range(20 * n)]
    for top_k, top_p, num_left in ((0, 0.5, 5), (8, 0.5, 4), (0, 0.625, 7), (8, 0.51, 5), (3, 1.0, 3), (0, 0.0, 1)):
        # positions whose noise favours the last token that is left, or the first one that is not
        for last in (num_left - 1, num_left):
            chosen = [i for i, found in enumerate(noises) if int(found[: last + 1].argmax()) == last][:n]
            wishes = [(9, position, 1.0, top_k, top_p, 0.0) for position in chosen]
            tokens = draw(torch.zeros(len(wishes), 10, device=device), wishes, device, truncates=True)
            assert tokens == [int(noises[i][:num_left].argmax()) for i in chosen], (top_k, top_p)


def test_a_row_depends_on_itself_alone(device):
    v = 5000
    rng, logits, _ = rows(3, v, 4)
    wishes = [plain_wish(rng) if i % 2 else restricted_wish(rng, v) for i in range(4)]
    wide = torch.full((4, v + 24), torch.nan, device=device)  # rows with something between them
    wide[:, :v] = logits.to(device)
    kept = wide.clone()
    together = draw(wide[:, :v], wishes, device, truncates=True, scratch=Scratch.make(7, v, device))
    assert torch.equal(wide.nan_to_num(7.0), kept.nan_to_num(7.0)), "logits are not changed"
    assert draw(wide[:, :v].flip(0), wishes[::-1], device, truncates=True) == together[::-1]
    for i in (1, 3):
        assert draw(wide[i : i + 1, :v], wishes[i : i + 1], device, truncates=False) == [together[i]]


@pytest.mark.parametrize("truncates", [False, True])
def test_rows_that_are_not_sound_fail_alone(truncates, device):
    v = 5000
    rng, logits, _ = rows(4, v, 7)
    wishes = [(*plain_wish(rng)[:2], i % 2 * 0.8, 20 * truncates, 1.0, 0.0) for i in range(7)]
    want = draw(logits.to(device), wishes, device, truncates=truncates)
    logits[0, 4999], logits[1, 0], logits[2, 4100], logits[3, 17] = torch.nan, torch.nan, torch.inf, torch.inf
    logits[4], logits[5] = -torch.inf, -torch.inf
    got = draw(logits.to(device), wishes, device, truncates=truncates)
    assert got == [-1] * 6 + want[6:] and want[6] >= 0
