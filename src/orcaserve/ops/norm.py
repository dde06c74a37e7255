"""Normalisation over the hidden dimension; statistics in float32, results in the dtype of x.

A row's bits depend on that row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """x [..., H] / rms(x) * weight [H]; with plus_one the factor is 1 + weight (Gemma stores it so)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    factor = weight.float()
    return wide.mul_(factor + 1.0 if plus_one else factor).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x [..., H] - mean) / deviation * weight [H] + bias [H]; either may be None."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        wide.mul_(weight.float())
    if bias is not None:
        wide.add_(bias.float())
    return wide.to(x.dtype)
