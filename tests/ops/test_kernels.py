"""Every kernel set computes what float64 computes, and gives a row the same bits in whatever company."""

import random

import kernel_sets
import pytest
import torch
from torch.nn import functional

from orcaserve.model.alibi import alibi_slopes
from orcaserve.ops.attention import split_attention, store_kv
from orcaserve.ops.halves import ComposedAttention, ComposedMLP
from orcaserve.ops.layout import Layout
from orcaserve.ops.rotary import Rotary

DTYPES = [torch.float32, torch.bfloat16]
every_set = pytest.mark.parametrize("name", kernel_sets.EVERY)
every_cache = pytest.mark.parametrize("name", [*kernel_sets.EVERY, *kernel_sets.KV_BYTES])
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def close(found: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> None:
    """Within what rounding to the dtype of `found` allows."""
    tolerance = 1e-5 if found.dtype == torch.float32 else 8e-3
    torch.testing.assert_close(found.double(), wanted.double(), atol=tolerance * scale, rtol=tolerance)


def draw(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def company(rows: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [list(range(m)) for m in (1, 2, 5, 6, 7, 13, 49, 97)] + [chance.sample(range(rows), m) for m in (1, 8, 60)]


@every_set
@both_dtypes
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("k", "sizes"), [(64, [48]), (1024, [96, 200, 5]), (37, [130]), (3072, [64]), (16, [1])])
@pytest.mark.parametrize("cut", [False, True])
def test_linear(name, dtype, threads, k, sizes, cut):
    kernels = kernel_sets.make(name, threads)
    x = draw(k, 200, k, dtype=dtype)
    weights = [draw(i, n, k, dtype=dtype) / k**0.5 for i, n in enumerate(sizes)]
    biases = [None, *(draw(i, n, dtype=dtype) for i, n in enumerate(sizes[1:]))]
    weights[-1] = weights[-1].t().contiguous().t()  # as GPT-2's files have it
    residual = draw(9, 200, sum(sizes), dtype=dtype)
    linear = kernels.linear(weights, biases, cut=cut)
    wide = kernels.linear(weights, biases, cut=cut, wide=True)
    wanted = torch.cat(
        [functional.linear(x.double(), w.double(), None if b is None else b.double())
         for w, b in zip(weights, biases, strict=True)], dim=1
    )  # fmt: skip
    whole, summed, logits = linear(x), linear(x, residual), wide(x)
    assert whole.dtype == dtype and logits.dtype == torch.float32
    close(whole, wanted, 4)
    close(summed, wanted + residual.double(), 8)
    torch.testing.assert_close(logits.double(), wanted, atol=1e-4 if name != "torch" else 0.05, rtol=1e-2)
    for rows in company(200, k):
        assert torch.equal(linear(x[rows]), whole[rows])
        assert torch.equal(linear(x[rows], residual[rows]), summed[rows])
        assert torch.equal(wide(x[rows]), logits[rows])
    assert torch.equal(kernel_sets.make(name, 1).linear(weights, biases, cut=cut)(x), whole)
    assert linear(x[:0]).shape == (0, sum(sizes))


def brought_to_bytes(x: torch.Tensor, segments: int) -> torch.Tensor:
    """float64 of what 8 bits keep of each row's values, with a scale for each segment."""
    parts = x.float().unflatten(1, (segments, -1))
    most = parts.abs().amax(-1, keepdim=True)
    per_part = torch.full_like(most, 127.0) / most  # (127.0 / most would be rounded twice)
    whole = (parts * torch.where(most > 0, per_part, 0.0)).round()
    return (whole.double() * (most / 127.0).double()).flatten(1)


@pytest.mark.parametrize("name", kernel_sets.BYTES)
@both_dtypes
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("k", "sizes", "cut", "segments"),
    [
        (64, [48], False, 1),
        (1024, [96, 200, 5], False, 4),
        (3072, [64], True, 8),
        (38, [130], True, 1),
        (80, [70], True, 4),
    ],
)
def test_linear_of_bytes(name, dtype, threads, k, sizes, cut, segments):
    """The integers are exact, so all that is left beside float64 on the very same bytes is the last rounding."""
    kernels = kernel_sets.make(name, threads)
    x = draw(k, 120, k, dtype=dtype) * torch.logspace(-3, 3, 120)[:, None].to(dtype)
    x[7] = 0
    weights = [draw(i, n, k, dtype=dtype) / k**0.5 for i, n in enumerate(sizes)]
    biases = [None, *(draw(i, n, dtype=dtype) for i, n in enumerate(sizes[1:]))]
    linear = kernels.linear(weights, biases, cut=cut, wide=True)
    whole = linear(x)
    kept = brought_to_bytes(x, segments)
    wanted = torch.cat(
        [kept @ brought_to_bytes(w, segments).T + (0 if b is None else b.double())
         for w, b in zip(weights, biases, strict=True)], dim=1
    )  # fmt: skip
    error = (whole.double() - wanted).abs() / wanted.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert error.max() < 1e-5
    for rows in company(120, k):
        assert torch.equal(linear(x[[r % 120 for r in rows]]), whole[[r % 120 for r in rows]])
    assert torch.equal(kernel_sets.make(name, 3).linear(weights, biases, cut=cut, wide=True)(x), whole)
    gated = kernels.gated(weights[0], weights[0].flip(0), None, None, "silu")
    first = linear(x)[:, : sizes[0]].double()
    if not cut:
        close(gated(x), functional.silu(first) * first.flip(1), 4)
    ids = torch.tensor([0, sizes[0] - 1])
    rows = kernels.linear(weights[:1], [None], cut=cut).rows(ids)
    close(rows, brought_to_bytes(weights[0], segments)[ids], 2)
    strange = x.clone()
    strange[3, k // 2], strange[5, 0] = torch.nan, torch.inf
    found = linear(strange)
    assert not found[[3, 5]].isfinite().any()
    others = [r for r in range(120) if r not in (3, 5)]
    assert torch.equal(found[others], whole[others])


@pytest.mark.parametrize("name", kernel_sets.HALVES)
@both_dtypes
@pytest.mark.parametrize(
    ("k", "sizes", "cut", "segments"),
    [
        (64, [48], False, 1),
        (1024, [96, 200, 5], False, 4),
        (3072, [64], True, 8),
        (38, [130], True, 1),
        (80, [70], True, 1),
        (96, [70], False, 1),
    ],
)
def test_linear_of_halves(name, dtype, k, sizes, cut, segments):
    """Against float64 on the weights as they were kept, which `rows` tells, and activations on the very same bytes."""
    kernels = kernel_sets.make(name)
    x = draw(k, 120, k, dtype=dtype) * torch.logspace(-3, 3, 120)[:, None].to(dtype)
    x[7] = 0
    weights = [draw(i, n, k, dtype=dtype) / k**0.5 for i, n in enumerate(sizes)]
    weights[0][3] = 0
    linear = kernels.linear(weights, [None] * len(sizes), cut=cut)
    whole = linear(x)
    kept = [kernels.linear([w.float()], [None], cut=cut).rows(torch.arange(len(w))) for w in weights]
    wanted = brought_to_bytes(x, segments) @ torch.cat(kept).double().T
    error = (whole.double() - wanted).abs() / wanted.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert error.max() < (1e-5 if dtype == torch.float32 else 4e-3)
    for weight, copy in zip(weights, kept, strict=True):
        for group in range(0, k, 32):
            w, c = weight[:, group : group + 32].float(), copy[:, group : group + 32]
            # a scale is at most a 7th of the greatest, and with -8 of them the opposite end is a whole one off
            assert ((w - c).abs() <= w.abs().amax(1, keepdim=True) * 0.145).all()
            assert (w - c).norm() <= 0.12 * w.norm()
    for rows in company(120, k):
        assert torch.equal(linear(x[[r % 120 for r in rows]]), whole[[r % 120 for r in rows]])
    assert torch.equal(kernel_sets.make(name, 3).linear(weights, [None] * len(sizes), cut=cut)(x), whole)
    gated = kernels.gated(weights[0], weights[0].flip(0), None, None, "silu")
    if not cut:
        first = linear(x)[:, : sizes[0]].double()
        off = gated(x).double() - functional.silu(first) * first.flip(1)
        assert off.norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * gated(x).double().norm()
    strange = x.clone()
    strange[3, k // 2], strange[5, 0] = torch.nan, torch.inf
    found = linear(strange)
    assert not found[[3, 5]].isfinite().any()
    others = [r for r in range(120) if r not in (3, 5)]
    assert torch.equal(found[others], whole[others])


@pytest.mark.parametrize("name", kernel_sets.HALVES)
@both_dtypes
@pytest.mark.parametrize(("k", "n", "segments"), [(64, 48, 1), (1024, 301, 4), (528, 64, 2), (38, 130, 1), (50, 65, 1)])
def test_the_output_matrix_beside_halves_has_six_bits(name, dtype, k, n, segments):
    """Against float64 on the weights as they were kept, which `rows` tells, and activations on the very same bytes."""
    kernels = kernel_sets.make(name)
    x, weight = draw(k, 120, k, dtype=dtype) * torch.logspace(-3, 3, 120)[:, None].to(dtype), draw(n, n, k, dtype=dtype)
    x[7], weight[3], x[9], weight[5] = 0, 0, 1, 1
    weight[6], x[11, ::2] = -1, -1
    output = kernels.linear([weight], [None], wide=True)
    whole = output(x)
    assert whole.dtype == torch.float32
    kept = kernels.linear([weight.float()], [None], wide=True).rows(torch.arange(n))
    wanted = brought_to_bytes(x, segments) @ kept.double().T
    error = (whole.double() - wanted).abs() / wanted.abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert error.max() < 1e-5
    for part in range(0, k, k // segments):
        w, c = weight[:, part : part + k // segments].float(), kept[:, part : part + k // segments]
        assert ((w - c).abs() <= w.abs().amax(1, keepdim=True) * (0.5001 / 31)).all()
    assert torch.equal(output.rows(torch.tensor([n - 1, 5, 0])), kept[[n - 1, 5, 0]].to(dtype))
    for rows in company(120, k):
        assert torch.equal(output(x[[r % 120 for r in rows]]), whole[[r % 120 for r in rows]])
    assert torch.equal(kernel_sets.make(name, 3).linear([weight], [None], wide=True)(x), whole)
    assert torch.equal(kernel_sets.make("portable int4").linear([weight], [None], wide=True)(x), whole)
    strange = x.clone()
    strange[3, k // 2], strange[5, 0] = torch.nan, torch.inf
    found = output(strange)
    assert not found[[3, 5]].isfinite().any()
    others = [r for r in range(120) if r not in (3, 5)]
    assert torch.equal(found[others], whole[others])


@pytest.mark.parametrize("name", [*kernel_sets.BYTES, *kernel_sets.HALVES])
def test_sums_of_the_greatest_values_overflow_nothing(name):
    least, most = (-8.0, 7.0) if name in kernel_sets.HALVES else (-1.0, 1.0)
    groups = torch.cat([torch.ones(2, 32), draw(1, 62, 32, dtype=torch.float32)])
    groups[1] = -1.0
    groups[2:4] = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, -1.0, 1.0, 1.0]]).repeat(1, 8)
    signs = groups.repeat(1, 8)
    x, weight = torch.where(signs > 0, 1.0, -1.0), torch.where(signs > 0, most, least)
    weight[:, 0] = least  # so that a column's greatest value is the same in all
    found = kernel_sets.make(name).linear([weight], [None])(x)
    close(found, x.double() @ weight.double().t(), 10)


@every_set
@both_dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"])
def test_gated_and_activated(name, dtype, activation):
    kernels = kernel_sets.make(name)
    references = {
        "silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu, "tanh": torch.tanh,
        "gelu_new": lambda y: functional.gelu(y, approximate="tanh"), "sigmoid": torch.sigmoid,
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y), "relu2": lambda y: functional.relu(y) ** 2,
    }  # fmt: skip
    n, k = 75, 48
    x, gate, up = draw(1, 100, k, dtype=dtype), draw(2, n, k, dtype=dtype) / 4, draw(3, n, k, dtype=dtype) / 4
    gate_bias, up_bias = draw(4, n, dtype=dtype), draw(5, n, dtype=dtype)
    for first, second in ((None, None), (gate_bias, up_bias), (None, up_bias)):
        gated = kernels.gated(gate, up, first, second, activation)
        a, b = (
            functional.linear(x.double(), w.double(), None if v is None else v.double())
            for w, v in ((gate, first), (up, second))
        )
        whole = gated(x)
        torch.testing.assert_close(
            whole.double(), references[activation](a) * b, atol=2e-5 if dtype == torch.float32 else 0.06, rtol=2e-2
        )
        for rows in company(100, 3):
            assert torch.equal(gated(x[rows]), whole[rows])
    activated = kernels.linear([gate], [gate_bias], activation=activation)
    a = references[activation](functional.linear(x.double(), gate.double(), gate_bias.double()))
    torch.testing.assert_close(activated(x).double(), a, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=2e-2)


@every_set
@both_dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "quick_gelu", "relu", "relu2", "tanh", "sigmoid"])
def test_what_is_no_number_stays_so_behind_an_activation(name, dtype, activation):
    weight = draw(1, 75, 48, dtype=dtype)
    weight[40] = torch.nan
    found = kernel_sets.make(name).linear([weight], [None], activation=activation)(draw(2, 3, 48, dtype=dtype))
    assert found[:, 40].isnan().all() and found.isnan().sum() == 3


@every_set
@both_dtypes
def test_rows_of_a_tied_embedding(name, dtype):
    weight = draw(1, 150, 37, dtype=dtype)
    ids = torch.tensor([3, 3, 149, 0, 64, 63])
    assert torch.equal(kernel_sets.make(name).linear([weight], [None], wide=True).rows(ids), weight[ids])


@every_set
@both_dtypes
@pytest.mark.parametrize("h", [37, 64, 1024])
def test_norms(name, dtype, h):
    kernels = kernel_sets.make(name, 2)
    x = draw(1, 100, h, dtype=dtype) * 3 + 1
    weight, bias = draw(2, h, dtype=dtype), draw(3, h, dtype=dtype)
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    layer = functional.layer_norm(wide, (h,), weight.double(), bias.double(), 1e-5)
    for norm, wanted in (
        (kernels.rms_norm(weight, 1e-6, plus_one=False), rms * weight.double()),
        (kernels.rms_norm(weight, 1e-6, plus_one=True), rms * (1 + weight.double())),
        (kernels.layer_norm(weight, bias, 1e-5), layer),
    ):
        whole = norm(x)
        close(whole, wanted, 4)
        for rows in company(100, h):
            assert torch.equal(norm(x[rows]), whole[rows])


class World:
    """Requests with their QKV products, block tables drawn at random, and caches full of NaN."""

    def __init__(self, name, seed, *, heads, kv_heads, d, lengths, dtype, norms=False, rotary=None, threads=1):
        self.random = random.Random(seed)
        self.kernels = kernel_sets.make(name, threads)
        self.block_size = self.kernels.block_multiple * self.random.choice([1, 2, 16])
        self.heads, self.kv_heads, self.d, self.dtype, self.lengths = heads, kv_heads, d, dtype, lengths
        self.qkv = [draw(seed + r, n, (heads + 2 * kv_heads) * d, dtype=dtype) for r, n in enumerate(lengths)]
        self.norms = [draw(seed + i, d, dtype=dtype) if norms else None for i in (1, 2)]
        self.rotary = rotary
        self.part = self.kernels.heads(heads, kv_heads, d, *self.norms, 1e-6, False, rotary)
        self.num_blocks = 2 + sum(-(-n // self.block_size) for n in lengths)

    def fresh(self):
        self.cache = self.kernels.kv_cache(self.num_blocks, self.block_size, self.kv_heads, self.d, self.dtype)
        kernel_sets.fill_cache(self.cache, float("nan"))
        free = self.random.sample(range(self.num_blocks), self.num_blocks)
        self.tables = [[free.pop() for _ in range(-(-n // self.block_size))] for n in self.lengths]

    def step(self, parts, **options):
        """parts: (request, start, num_tokens); gives each one's output."""
        layout = Layout.build([(start, n, self.tables[r]) for r, start, n in parts], self.block_size)
        qkv = torch.cat([self.qkv[r][start : start + n] for r, start, n in parts])
        q = self.part(qkv, layout, self.cache)
        out = self.kernels.attention(q, self.cache, layout, scale=self.d**-0.5, **options)
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
                    parts.append((r, done[r], min(left, self.random.choice([1, 1, self.random.randint(1, most)]))))
            if parts:
                for (r, _, n), out in zip(parts, self.step(parts, **options), strict=True):
                    outs[r].append(out)
                    done[r] += n
        return [torch.cat(out) for out in outs]

    def by_definition(self, **options):
        """The same in float32, request by request, by the twin's parts."""
        outs = []
        for r, n in enumerate(self.lengths):
            blocks = -(-n // 16)
            layout = Layout.build([(0, n, list(range(blocks)))], 16)
            in_bytes = self.kernels.kv_dtype == "int8"
            twin = kernel_sets.make("torch kv-int8" if in_bytes else "torch")
            cache = twin.kv_cache(blocks, 16, self.kv_heads, self.d, torch.float32)
            wide = [None if norm is None else norm.float() for norm in self.norms]
            part = twin.heads(self.heads, self.kv_heads, self.d, *wide, 1e-6, False, self.rotary)
            q = part(self.qkv[r].float(), layout, cache)
            if not in_bytes:
                k, v = cache.k.flatten(0, 1)[:n].clone(), cache.v.flatten(0, 1)[:n].clone()
                # what attention reads back is what was stored, in the dtype of the cache
                store_kv(k.to(self.dtype).float(), v.to(self.dtype).float(), cache.k, cache.v, layout.slots)
            q = q.to(self.dtype).float().unflatten(1, (-1, self.d))
            outs.append(split_attention(q, cache.k, cache.v, layout, scale=self.d**-0.5, **options).flatten(1))
        return outs


def frequencies(dim: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)


@every_cache
@both_dtypes
@pytest.mark.parametrize(
    ("threads", "heads", "kv_heads", "d", "rotary_dim", "norms", "options"),
    [
        (1, 4, 2, 64, 64, False, {}),
        (2, 16, 8, 128, 128, True, {}),
        (1, 8, 1, 16, 8, True, {"window": 100}),
        (1, 6, 2, 32, 0, False, {"window": 17, "softcap": 5.0}),
        (1, 3, 3, 80, 32, False, {"softcap": 2.0}),
        (1, 20, 1, 8, 8, False, {}),
        (1, 64, 1, 12, 12, True, {}),
        (2, 8, 4, 64, 64, False, {"window": 100}),
        (1, 6, 3, 32, 0, False, {"slopes": torch.tensor(alibi_slopes(6))}),
        (2, 8, 1, 16, 0, False, {"slopes": torch.tensor(alibi_slopes(8)), "window": 150, "softcap": 9.0}),
    ],
)
def test_attention(name, threads, dtype, heads, kv_heads, d, rotary_dim, norms, options):
    seed = random.randrange(10**6)
    print("seed", seed)
    lengths = [170, 1, 129, 64, 20]
    rotary = Rotary(frequencies(rotary_dim), interleaved=heads == 8) if rotary_dim else None
    shape = {"heads": heads, "kv_heads": kv_heads, "d": d, "lengths": lengths, "dtype": dtype}
    world = World(name, seed, **shape, norms=norms, rotary=rotary, threads=threads)
    alone = []
    for r, n in enumerate(lengths):
        world.fresh()
        alone += world.step([(r, 0, n)], **options)
    found, wanted = torch.cat(alone).float(), torch.cat(world.by_definition(**options))
    # The native kernels round the shares and the result to bfloat16; torch also the scores, which may be as high as 16.
    # With caches of 8 bits they round queries to 14 bits and shares to 15; and where a key's value lies between two
    # whole numbers, another last bit of its rotation makes it a whole one more.
    of_all, of_one = (0.02, 0.15) if "torch" in name else (0.004, 0.01)
    if dtype == torch.float32:
        of_all, of_one = (2e-5, 2e-5)
    if name in kernel_sets.KV_BYTES[1:]:
        of_all, of_one = max(of_all, 1e-3), 0.03
    off = (found - wanted).abs()
    print("off by", float(off.norm() / wanted.norm()), float((off / (1 + wanted.abs())).max()))
    assert (found - wanted).norm() <= of_all * wanted.norm()
    assert ((found - wanted).abs() <= of_one * (1 + wanted.abs())).all()
    world.fresh()
    world.step([(2, 0, 85)], **options)
    decoded = torch.cat([world.step([(2, p, 1)], **options)[0] for p in range(85, lengths[2])])
    assert torch.equal(decoded, alone[2][85:])
    for most in (20, 200):
        world.fresh()
        for r, out in enumerate(world.run_ragged(most, **options)):
            assert torch.equal(out, alone[r]), (seed, most, r)


@every_cache
@both_dtypes
@pytest.mark.parametrize("options", [{}, {"window": 200}, {"slopes": torch.tensor(alibi_slopes(8)), "softcap": 9.0}])
def test_spans_of_few_requests_are_shared_out(name, dtype, options):
    """With more threads than pieces of work; the bits are those of one thread that walks all spans."""
    outs = []
    for threads in (1, 2, 7):
        world = World(name, 5, heads=8, kv_heads=1, d=48, lengths=[700, 129], dtype=dtype, threads=threads)
        world.fresh()
        world.step([(0, 0, 640), (1, 0, 100)], **options)
        chunks = [world.step([(0, 640, 3)], **options), world.step([(0, 643, 1), (1, 100, 28)], **options)]
        decodes = [world.step([(0, at, 1), (1, 128, 1)], **options) for at in range(644, 700)]
        outs.append(torch.cat([out for step in (*chunks, *decodes) for out in step]))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert outs[0].isfinite().all()


@pytest.mark.parametrize("name", kernel_sets.KV_BYTES)
@both_dtypes
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_what_is_not_a_number_shows_in_its_own_request_alone(name, dtype, strange):
    """Bytes cannot say so: the scale of the token and head does."""
    d, lengths = 16, [50, 50, 3]
    world = World(name, 5, heads=2, kv_heads=1, d=d, lengths=lengths, dtype=dtype)
    parts = [(r, 0, n) for r, n in enumerate(lengths)]
    world.fresh()
    clean = world.step(parts)
    for column in (2 * d + 3, 3 * d + 3):  # of keys, of values
        world.fresh()
        before = world.qkv[1][20, column].clone()
        world.qkv[1][20, column] = strange
        dirty = world.step(parts)
        world.qkv[1][20, column] = before
        assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[2], clean[2])
        if "torch" not in name:  # where a span adds zero times whatever the request's own values are
            assert torch.equal(dirty[1][:20], clean[1][:20])
        assert not dirty[1][20:].isfinite().any(1).any()


@pytest.mark.parametrize("name", kernel_sets.KV_BYTES)
def test_bytes_of_nothing_and_of_next_to_nothing(name):
    world = World(name, 6, heads=2, kv_heads=2, d=16, lengths=[40], dtype=torch.float32)
    world.qkv[0][:, 64:] *= 1e-35
    world.qkv[0][7] = 0.0
    world.fresh()
    [out] = world.step([(0, 0, 40)])
    assert (out.abs() < 1e-30).all()


@every_cache
@both_dtypes
@pytest.mark.parametrize("out_norms", [False, True])
def test_halves_are_what_they_are_made_of(name, dtype, out_norms):
    seed = random.randrange(10**6)
    print("seed", seed)
    h, d, lengths = 48, 16, [40, 3, 1]
    rotary = Rotary(frequencies(d))
    world = World(name, seed, heads=4, kv_heads=2, d=d, lengths=lengths, dtype=dtype, norms=True, rotary=rotary)
    kernels = world.kernels
    weights = iter(
        draw(seed + 10, n, k, dtype=dtype) * k**-0.5 for n, k in [(128, h), (h, 64), (80, h), (80, h), (h, 80)]
    )
    norms = [kernels.rms_norm(draw(seed + i, h, dtype=dtype), 1e-6, plus_one=False) for i in range(20, 24)]
    out_norm, mlp_out_norm = norms[2:] if out_norms else (None, None)
    qkv, out = (kernels.linear([next(weights)], [None], cut=cut) for cut in (False, True))
    inner = kernels.gated(next(weights), next(weights), None, None, "silu")
    down = kernels.linear([next(weights)], [None], cut=True)
    view = {"scale": d**-0.5, "window": 30, "softcap": 8.0}
    attention = kernels.attention_half(norms[0], qkv, world.part, out, out_norm, **view)
    mlp = kernels.mlp_half(norms[1], inner, down, mlp_out_norm)
    slow_attention = ComposedAttention(kernels, norms[0], qkv, world.part, out, out_norm, *view.values())
    slow_mlp = ComposedMLP(norms[1], inner, down, mlp_out_norm)
    xs = [draw(seed + 30 + r, n, h, dtype=dtype) for r, n in enumerate(lengths)]

    def run(attention, mlp, members):
        world.fresh()
        layout = Layout.build([(0, lengths[r], world.tables[r]) for r in members], world.block_size)
        x = torch.cat([xs[r] for r in members])
        mixed = attention(x, layout, world.cache, x)
        return torch.cat([mixed, mlp(mixed, mixed), mlp(mixed)], dim=1)

    whole, slow = run(attention, mlp, [0, 1, 2]), run(slow_attention, slow_mlp, [0, 1, 2])
    assert torch.equal(whole, slow)
    for r, part in enumerate(whole.split(lengths)):
        assert torch.equal(run(attention, mlp, [r]), part)


@pytest.mark.parametrize("name", kernel_sets.EVERY[1:])
def test_native_kernels_take_whole_groups_of_slots(name):
    with pytest.raises(ValueError, match="multiples of 16"):
        kernel_sets.make(name).kv_cache(4, 12, 1, 16, torch.float32)
    with pytest.raises(ValueError, match="dimensions"):
        kernel_sets.make(name).heads(1, 1, 7, None, None, 1e-6, False, None)
