"""Coded weights are the plain ones in less memory: the same products and the same rows, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_sets import NEEDS_NATIVE
from torch import Tensor

from orcaserve.ops import native_kernels

pytestmark = NEEDS_NATIVE
SETS = native_kernels.instruction_sets()
SMALLEST, LARGEST, INFINITY, NAN = 1, 0x7F7F, 0x7F80, 0x7FC0  # as bits of bfloat16


class Twin:
    """One matrix [N, K] packed twice, of which the second is coded where it can be. gated: of two such halves."""

    def __init__(self, weight: Tensor, isa: str, *, segments: int = 1, gated: bool = False) -> None:
        native = native_kernels._native
        self.weight = weight
        self.engine = native.Engine(isa, 2)
        self.n, self.k = weight.shape[0] // (2 if gated else 1), weight.shape[1]
        self.plain, self.coded = (
            native.Matrix(
                dtype=native.Dtype.bf16, format=native.Format.plain, n=self.n, k=self.k, gated=gated, group=32,
                segments=segments,
            )
            for _ in range(2)
        )  # fmt: skip
        for matrix in (self.plain, self.coded):
            for part, half in zip(weight.split(self.n), (1, 2) if gated else (0,), strict=True):
                self.engine.pack(matrix, part.data_ptr(), self.n, part.stride(0), part.stride(1), 0, half)
        self.engine.compress(self.coded)

    def products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Bits of x [M, K] times both."""
        return self._product(self.plain, x), self._product(self.coded, x)

    def rows(self) -> Tensor:
        """The weight, read back from the coded one, as bits."""
        out = torch.empty_like(self.weight)
        ids = torch.arange(self.n)
        self.engine.gather(self.coded, ids.data_ptr(), self.n, out.data_ptr())
        return out.view(torch.int16)

    def _product(self, matrix: Any, x: Tensor) -> Tensor:
        out = torch.empty(x.shape[0], self.n, dtype=torch.bfloat16)
        self.engine.linear(
            native_kernels._native.Linear(matrix, 0, 0, False), x.data_ptr(), x.shape[0], 0, out.data_ptr()
        )
        return out.view(torch.int16)


def drawn(n: int, k: int, generator: torch.Generator) -> Tensor:
    return (torch.randn(n, k, generator=generator) * 0.02).bfloat16()


@pytest.mark.parametrize("isa", SETS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_products_and_rows_keep_their_bits(isa: str, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    segments = data.draw(st.sampled_from([1, 2, 8]))
    k = 2 * segments * data.draw(st.integers(1, 40)) if segments > 1 else data.draw(st.integers(1, 300))
    n, m = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 20))
    weight = drawn(n, k, generator)
    # What no code has room for, here and there; sums of what is not a number prove nothing more than that.
    words = weight.view(torch.int16).flatten()
    for at in data.draw(st.lists(st.integers(0, n * k - 1), max_size=n * k // 2000 + 1)):
        words[at] = data.draw(st.sampled_from([0, -0x8000, SMALLEST, 0x0080, 0x0180, LARGEST - 0x3000]))
    twin = Twin(weight, isa, segments=segments)
    plain, coded = twin.products(torch.randn(m, k, generator=generator).bfloat16())
    assert torch.equal(plain, coded)
    assert torch.equal(twin.rows(), weight.view(torch.int16))


@pytest.mark.parametrize("isa", SETS)
def test_gated_pairs_keep_their_bits(isa: str) -> None:
    generator = torch.Generator().manual_seed(1)
    twin = Twin(drawn(192, 128, generator), isa, gated=True)
    plain, coded = twin.products(torch.randn(7, 128, generator=generator).bfloat16())
    assert torch.equal(plain, coded)


@pytest.mark.parametrize("isa", SETS)
def test_not_a_number_is_kept(isa: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = drawn(128, 256, generator)
    weight.view(torch.int16)[3, 5], weight.view(torch.int16)[70, 200] = NAN, INFINITY
    twin = Twin(weight, isa)
    plain, coded = twin.products(torch.ones(3, 256, dtype=torch.bfloat16))
    assert torch.equal(plain, coded) and plain.view(torch.bfloat16)[:, 3].isnan().all()
    assert torch.equal(twin.rows(), weight.view(torch.int16))


@pytest.mark.skipif("avx512bf16" not in SETS, reason="no instruction set of this machine reads coded weights")
def test_drawn_weights_take_three_quarters_and_others_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(3)
    twin = Twin(drawn(1024, 1024, generator), "avx512bf16")
    assert 0.75 * twin.plain.nbytes < twin.coded.nbytes < 0.76 * twin.plain.nbytes
    # every exponent as often as every other: half of the words would need a patch
    anything = torch.randint(0, 0x7F80, (256, 512), generator=generator).to(torch.int16).view(torch.bfloat16)
    twin = Twin(anything, "avx512bf16")
    assert twin.coded.nbytes == twin.plain.nbytes
    assert torch.equal(twin.rows(), anything.view(torch.int16))
