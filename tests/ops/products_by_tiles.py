"""What holds of products by AMX's tiles, beside what holds of every set; `test_emulated_amx.py` runs it."""

from __future__ import annotations

import random

import pytest
import torch
from test_coded_weights import Twin, drawn
from torch import Tensor

from orcaserve.ops import native_kernels
from orcaserve.ops.native_kernels import NativeKernels

SET = next(name for name in native_kernels.instruction_sets() if name.startswith("amx"))
ROWS = [*range(1, 41), 191, 192, 193, 209]
DEPTHS = [1, 2, 31, 32, 33, 34, 63, 64, 65, 130, 1000, 3072]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(found: Tensor, wanted: Tensor, terms: Tensor) -> None:
    """Within what float32 sums lose, and one rounding to bfloat16. terms: the sums of the sizes of what is added up."""
    lost = 2.0**-8 if found.dtype == torch.bfloat16 else 0.0
    assert ((found.double() - wanted).abs() <= 1e-6 * terms + lost * wanted.abs() + 1e-30).all()


@pytest.mark.parametrize("k", DEPTHS)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_bfloat16_beside_float64_and_rows_alone(k, cut, threads):
    kernels = NativeKernels(threads, SET)
    x, weights, bias = draw(k, max(ROWS), k), [draw(1, 70, k), draw(2, 100, k)], draw(3, 100)
    linear = kernels.linear(weights, [None, bias], cut=cut)
    wide = kernels.linear(weights, [None, bias], cut=cut, wide=True)
    residual = draw(4, max(ROWS), 170)
    weight, bias = torch.cat(weights).double(), torch.cat([torch.zeros(70), bias.float()]).double()
    wanted, terms = x.double() @ weight.t() + bias, x.double().abs() @ weight.t().abs() + bias.abs()
    whole, summed, logits = linear(x), linear(x, residual), wide(x)
    close(logits, wanted, terms)
    close(whole, wanted, terms)
    close(summed, wanted + residual.double(), terms + residual.double().abs())
    for m in ROWS:
        assert torch.equal(linear(x[:m]), whole[:m]) and torch.equal(wide(x[:m]), logits[:m])
    for r in (0, 15, 16, 100, 208):
        assert torch.equal(linear(x[r : r + 1], residual[r : r + 1]), summed[r : r + 1])


@pytest.mark.parametrize("k", DEPTHS)
def test_gated(k):
    gate, up, biases = draw(1, 100, k) / k**0.5, draw(2, 100, k) / k**0.5, [draw(3, 100), draw(4, 100)]
    gated = NativeKernels(2, SET).gated(gate, up, *biases, "silu")
    x = draw(k, max(ROWS), k)
    whole = gated(x)
    a, b = (x.double() @ w.double().t() + bias.double() for w, bias in zip((gate, up), biases, strict=True))
    torch.testing.assert_close(whole.double(), torch.nn.functional.silu(a) * b, atol=1e-4, rtol=2.0**-8)
    for m in ROWS:
        assert torch.equal(gated(x[:m]), whole[:m])


@pytest.mark.parametrize(("k", "segments"), [(33, 1), (130, 1), (1000, 1), (1000, 2), (3072, 8), (144, 8)])
def test_coded_weights_are_the_plain_ones(k, segments):
    chance = random.Random(k)
    weight = drawn(150, k, torch.Generator().manual_seed(k))
    for _ in range(weight.numel() // 2000):  # words to be patched
        weight.view(torch.int16)[chance.randrange(150), chance.randrange(k)] = chance.choice([0, -0x8000, 1, 0x0180])
    twin = Twin(weight, SET, segments=segments)
    if k > 33:
        assert twin.coded.nbytes < twin.plain.nbytes
    for m in ROWS:
        plain, coded = twin.products(draw(m, m, k))
        assert torch.equal(plain, coded)


@pytest.mark.parametrize("k", [4, 33, 60, 64, 68, 130, 1000, 3072])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_have_the_bits_of_the_portable_set(k, cut, dtype):
    x, residual = draw(k, max(ROWS), k).to(dtype), draw(4, max(ROWS), 170).to(dtype)
    weights, bias = [draw(1, 70, k).to(dtype), draw(2, 100, k).to(dtype)], draw(3, 100).to(dtype)
    products = []
    for isa in (SET, "portable"):
        kernels = NativeKernels(2, isa, quantization="int8")
        linear = kernels.linear(weights, [None, bias], cut=cut)
        wide = kernels.linear(weights, [None, None], cut=cut, wide=True)
        products.append([p for m in ROWS for p in (linear(x[:m]), linear(x[:m], residual[:m]), wide(x[:m]))])
    assert all(torch.equal(found, wanted) for found, wanted in zip(*products, strict=True))


def test_denormal_values_are_zero_and_what_is_no_number_stays_in_its_row():
    tiny = torch.full((1, 40), 1, dtype=torch.int16).view(torch.bfloat16)
    kernels = NativeKernels(1, SET)
    assert (kernels.linear([tiny], [None], wide=True)(torch.full((3, 40), 1e30).bfloat16()) == 0).all()
    x = draw(1, 20, 40)
    linear = kernels.linear([draw(2, 70, 40)], [None])
    whole = linear(x)
    x[17, 39] = torch.nan
    found = linear(x)
    assert found[17].isnan().all() and torch.equal(found[:17], whole[:17]) and torch.equal(found[18:], whole[18:])
