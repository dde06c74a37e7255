"""`Coded`: a weight that a GPU keeps in 8 or 4 bits; how it is made, and what values it stands for.

Only weights are short: activations keep the model's dtype, and a product multiplies them by what a weight stands for.
In 8 bits a row has one scale, which the finished sum is multiplied by. In 4 bits that is too coarse: GROUP values share
one, the same groups that the CPU has, and values are scaled before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

Code = Literal["int8", "int4"]

GROUP = 32  # values of a row that share a scale, in 4 bits
# In 4 bits byte j of a unit holds value j below and value j + UNIT / 2 above: each half is, as it is read, a block of
# the weight in the order of K.
UNIT = 128
_BYTES = 1024  # of a packed row that one program brings to the dtype of activations
_WIDENED = 4096  # values in 8 bits that one program brings to the dtype of activations
_AT_ONCE = 1 << 24  # values that are brought to fewer bits at a time: they are there in float32 meanwhile


@dataclass(frozen=True, eq=False, slots=True)
class Coded:
    """A weight [n, k] in fewer bits.

    values: int8 [n, k], of -127 to 127; in 4 bits int8 [n, ceil(k / UNIT) * UNIT / 2], two of -7 to 7 in each, zeros
        past k. scales: float32, [n] in 8 bits, in 4 bits [n, ceil(k / UNIT) * UNIT / GROUP].
    dtype: of the values that it stands for, and of the activations that it meets.
    """

    values: Tensor
    scales: Tensor
    k: int
    dtype: torch.dtype

    @property
    def n(self) -> int:
        return self.values.shape[0]

    @property
    def packed(self) -> bool:
        """Whether it is in 4 bits."""
        return self.scales.dim() == 2

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def in_full(self) -> Tensor:
        """What a product multiplies by, [n, k] of dtype, before a scale for each row where it has one (8 bits)."""
        out = torch.empty((self.n, self.k), dtype=self.dtype, device=self.values.device)
        if not self.packed:
            count = out.numel()
            _widen_kernel[(-(-count // _WIDENED),)](self.values, out, count, BLOCK=_WIDENED)
            return out
        width = self.values.shape[1]
        _unpack_kernel[(self.n, -(-width // _BYTES))](
            self.values, self.scales, out, self.k, width, UNIT=UNIT, GROUP=GROUP, BYTES=_BYTES
        )
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """What rows `ids` (int64 [M]) stand for: [M, k] of dtype."""
        values = self.values.index_select(0, ids)
        if not self.packed:
            return values.float().mul_(self.scales.index_select(0, ids)[:, None]).to(self.dtype)
        halves = [half.unflatten(1, (-1, UNIT // 2)) for half in (values << 4 >> 4, values >> 4)]
        groups = torch.stack(halves, 2).view(ids.shape[0], -1, GROUP)
        scaled = groups.float().mul_(self.scales.index_select(0, ids)[:, :, None])
        return scaled.to(self.dtype).flatten(1)[:, : self.k]


@triton.jit
def numbers_of(nibbles):
    """float32: two's complements of the lower four bits of int8."""
    # 2^23 + number + 8, put together from bits, since a processor converts only 16 integers a cycle
    return (((nibbles & 15) ^ 8).to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@triton.jit
def _widen_kernel(values, out, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = tl.load(values + place, mask=place < count, other=0)
    tl.store(out + place, some.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def _unpack_kernel(values, scales, out, k, width, UNIT: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    is_there = place < width
    both = tl.load(values + row * width + place, mask=is_there, other=0)
    low = place // (UNIT // 2) * UNIT + place % (UNIT // 2)
    high = low + UNIT // 2
    groups = scales + row * (width * 2 // GROUP)
    below = numbers_of(both) * tl.load(groups + low // GROUP, mask=is_there, other=0.0)
    above = numbers_of(both >> 4) * tl.load(groups + high // GROUP, mask=is_there, other=0.0)
    tl.store(out + row * k + low, below.to(out.dtype.element_ty), mask=is_there & (low < k))
    tl.store(out + row * k + high, above.to(out.dtype.element_ty), mask=is_there & (high < k))


def coded(weights: Sequence[Tensor], code: Code) -> Coded:
    """Weights [N_i, K] of one dtype below each other. The whole is never there twice, in whatever dtype."""
    first = weights[0]
    n, k, device = sum(weight.shape[0] for weight in weights), first.shape[1], first.device
    units = -(-k // UNIT)
    of_rows: Callable[[Tensor], tuple[Tensor, Tensor]]
    if code == "int8":
        of_rows, width, scales = _in_8_bits, k, torch.empty(n, device=device)
    else:
        of_rows, width, scales = _in_4_bits, units * UNIT // 2, torch.empty(n, units * UNIT // GROUP, device=device)
    values = torch.empty((n, width), dtype=torch.int8, device=device)
    at = 0
    for weight in weights:
        for some in weight.split(max(1, _AT_ONCE // k)):
            rows = slice(at, at := at + some.shape[0])
            values[rows], scales[rows] = of_rows(some.float())
    return Coded(values, scales, k, first.dtype)


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 127
    return _nearest(weight, scales[:, None], 127), scales


def _in_4_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    groups = functional.pad(weight, (0, -k % UNIT)).view(n, -1, GROUP)
    scales = groups.abs().amax(2) / 7
    low, high = _nearest(groups, scales[:, :, None], 7).view(n, -1, 2, UNIT // 2).unbind(2)
    return (high << 4 | low & 15).flatten(1), scales


def _nearest(weight: Tensor, scales: Tensor, most: int) -> Tensor:
    """int8; zeros where the scale is one."""
    numbers = torch.where(scales > 0, weight / scales, 0.0).round_()
    return numbers.clamp_(-most, most).to(torch.int8)
