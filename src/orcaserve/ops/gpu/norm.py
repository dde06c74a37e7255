"""Normalisation over the hidden dimension, one program a row; statistics in float32, results in the dtype of x."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.launch import kinds, launcher
from orcaserve.ops.gpu.overlap import begin, overlaps, wait


@triton.jit
def _norm_kernel(
    x,
    weight,
    bias,
    residual,
    out,
    h,
    eps,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    OVERLAP: tl.constexpr,
    H: tl.constexpr,
):
    begin(OVERLAP)
    column = tl.arange(0, H)
    inside = column < h
    # nothing writes weights: they are under way while the kernel before ends
    if weight is not None:
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + OFFSET
    if bias is not None:
        shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    wait(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * h + column
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / h, 0.0)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / h + eps)
    if weight is not None:
        wide *= factor
    if bias is not None:
        wide += shift
    if residual is not None:
        wide += other
    tl.store(out + at, wide, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool, residual: Tensor | None = None) -> Tensor:
    """x [M, H] / rms(x) * weight [H] + residual [M, H], rounded once; with plus_one the factor is 1 + weight."""
    return _launch(x, weight, None, eps, residual, centred=False, offset=1.0 if plus_one else 0.0)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor | None = None
) -> Tensor:
    """(x [M, H] - mean) / deviation * weight [H] + bias [H] + residual [M, H], rounded once."""
    return _launch(x, weight, bias, eps, residual, centred=True, offset=0.0)


def _launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    *,
    centred: bool,
    offset: float,
) -> Tensor:
    m, h = x.shape
    out = torch.empty_like(x)
    width = 1 << (h - 1).bit_length()
    # 16 elements a thread, and by H alone: the order of the sums hangs on it
    warps = min(max(width // 512, 1), 16)
    overlap = overlaps(x.device)
    constants = (centred, offset, overlap, width)
    tensors = kinds(x, weight, bias, residual, out)
    launcher(_norm_kernel, x.device)(
        None if tensors is None else (tensors, h, *constants),
        (m, 1, 1),
        (x, weight, bias, residual, out, h, eps, *constants),
        {"num_warps": warps, "launch_pdl": overlap},
    )
    return out
