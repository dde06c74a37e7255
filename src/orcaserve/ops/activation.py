"""Activation functions by the names that checkpoints use; computed in float32, returned in the dtype of x.

They are composed of exp, tanh and erf, not taken whole from torch: its fused silu, sigmoid and tanh-gelu give the last
few elements of a buffer (those that do not fill a vector) another last bit, so a row's bits would depend on where it
stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor


def _sigmoid(x: Tensor) -> Tensor:
    return torch.exp_(x.neg()).add_(1.0).reciprocal_()


def _silu(x: Tensor) -> Tensor:
    wide = x.float()
    below = torch.exp_(wide.neg()).add_(1.0)
    return torch.div(wide, below, out=below).to(x.dtype)


def _gelu(x: Tensor) -> Tensor:
    wide = x.float()
    return (torch.erf(wide * math.sqrt(0.5)).add_(1.0).mul_(wide).mul_(0.5)).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    wide = x.float()
    inner = (wide * wide * wide).mul_(0.044715).add_(wide).mul_(math.sqrt(2.0 / math.pi))
    return torch.tanh(inner).add_(1.0).mul_(wide).mul_(0.5).to(x.dtype)


def _gelu_quick(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * _sigmoid(wide * 1.702)).to(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": _silu,
        "swish": _silu,
        "gelu": _gelu,
        "gelu_new": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "quick_gelu": _gelu_quick,
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
        "tanh": torch.tanh,
        "sigmoid": lambda x: _sigmoid(x.float()).to(x.dtype),
    }
)
