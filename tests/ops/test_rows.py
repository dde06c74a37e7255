"""Linear, norms, activations, rotary: right, and a row's bits do not depend on how many rows there are."""

import math
import random

import pytest
import torch
from torch.nn import functional

from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.linear import TileLinear, embedding
from orcaserve.ops.norm import layer_norm, rms_norm
from orcaserve.ops.rotary import Rotary

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def subsets(rows, seed):
    """Row indices: prefixes of all small sizes, and random picks in random order."""
    chance = random.Random(seed)
    yield from (list(range(m)) for m in (1, 2, 3, 31, 32, 33, 65))
    yield from (chance.sample(range(rows), m) for m in (1, 5, 30, 70))


def assert_rows_keep_their_bits(f, x, seed=0):
    whole = f(x)
    for picked in subsets(x.shape[0], seed):
        assert torch.equal(f(x[picked]), whole[picked]), len(picked)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(64, 48), (1024, 300), (37, 1001)])
def test_linear(threads, dtype, k, n):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(100, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    stored = weight.t().contiguous().t()  # as GPT-2's files have it
    for linear in (TileLinear(weight), TileLinear(weight, bias), TileLinear(stored, bias)):
        assert linear.weight is weight or linear.weight is stored
        assert_rows_keep_their_bits(linear, x)
        expected = functional.linear(x.double(), weight.double(), None if linear.bias is None else bias.double())
        tolerance = 1e-4 if dtype == torch.float32 else 0.02 * math.sqrt(k)
        torch.testing.assert_close(linear(x).double(), expected, atol=tolerance, rtol=1e-2)
        assert linear(x[:0]).shape == (0, n)


def test_embedding_gathers_rows():
    weight = torch.randn(10, 4)
    assert torch.equal(embedding(torch.tensor([3, 3, 9]), weight), weight[[3, 3, 9]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("h", [37, 64, 1024])
def test_norms(threads, dtype, h):
    x = (torch.randn(100, h) * 3 + 1).to(dtype)
    weight, bias = torch.randn(h).to(dtype), torch.randn(h).to(dtype)
    wide = x.double()
    rms = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = [
        (lambda y: rms_norm(y, weight, 1e-6), rms * weight.double()),
        (lambda y: rms_norm(y, weight, 1e-6, plus_one=True), rms * (1 + weight.double())),
        (lambda y: layer_norm(y, weight, bias, 1e-5),
         functional.layer_norm(wide, (h,), weight.double(), bias.double(), 1e-5)),
        (lambda y: layer_norm(y, weight, None, 1e-5), functional.layer_norm(wide, (h,), weight.double(), None, 1e-5)),
    ]  # fmt: skip
    for f, want in expected:
        assert f(x).dtype == dtype
        assert_rows_keep_their_bits(f, x)
        torch.testing.assert_close(f(x).double(), want, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(threads, dtype, name):
    references = {
        "silu": functional.silu, "swish": functional.silu, "gelu": functional.gelu, "relu": functional.relu,
        "gelu_new": lambda y: functional.gelu(y, approximate="tanh"),
        "gelu_fast": lambda y: functional.gelu(y, approximate="tanh"),
        "gelu_pytorch_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y), "relu2": lambda y: functional.relu(y) ** 2,
        "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    }  # fmt: skip
    f = ACTIVATIONS[name]
    x = (torch.randn(100, 1001, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    before = x.clone()
    assert_rows_keep_their_bits(f, x)
    assert torch.equal(x, before), "an activation must not write to its input"
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(f(x).double(), references[name](x.double()), atol=tolerance, rtol=tolerance)
    extremes = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    torch.testing.assert_close(f(extremes).double(), references[name](extremes.double()), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "rotary_dim"), [(64, 64), (80, 32)])
def test_rotary(dtype, interleaved, d, rotary_dim):
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    x = torch.randn(6, 3, d).to(dtype)
    positions = torch.tensor([0, 5, 1, 700, 255, 256])
    rotary = Rotary(inv_freq, 1.25, rotary_dim, interleaved)
    out = rotary.rotate(x, positions)
    # as a complex number: turning a pair by an angle
    wide = x[..., :rotary_dim].double()
    half = rotary_dim // 2
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    angles = positions[:, None, None].double() * inv_freq.double()
    turned = torch.complex(a, b) * torch.polar(torch.full_like(angles, 1.25), angles)
    want = x.double().clone()
    if interleaved:
        want[..., 0:rotary_dim:2], want[..., 1:rotary_dim:2] = turned.real, turned.imag
    else:
        want[..., :half], want[..., half:rotary_dim] = turned.real, turned.imag
    torch.testing.assert_close(out.double(), want, atol=1e-3 if dtype == torch.float32 else 0.05, rtol=1e-2)
    for i in range(6):  # a fresh table, grown in another order, turns a row to the same bits
        alone = Rotary(inv_freq, 1.25, rotary_dim, interleaved)
        assert torch.equal(alone.rotate(x[i : i + 1], positions[i : i + 1]), out[i : i + 1])


def test_rotary_refuses_frequencies_that_do_not_fit():
    with pytest.raises(ValueError, match="rotary_dim"):
        Rotary(torch.ones(8), rotary_dim=32)
