"""The last levels of the tree in which a sum over K is made, where its parts come from several ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def join(parts: Tensor, bias: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Float32 [P, M, N] (P a power of two), bias float32 [N] and residual [M, N] -> their sum, [M, N] of dtype."""
    sums = list(parts)
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    out = sums[0] if bias is None else sums[0] + bias
    return (out if residual is None else out + residual).to(dtype)
