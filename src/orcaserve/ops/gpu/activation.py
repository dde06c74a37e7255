"""Activation functions in float32, by the names that checkpoints use: a device function, and gate times up."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from orcaserve.ops.gpu.overlap import begin, overlaps, wait

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "quick_gelu": "gelu_quick",
        "relu": "relu",
        "relu2": "relu2",
        "tanh": "tanh",
        "sigmoid": "sigmoid",
    }
)
"""What `activate` calls each function of `ops.activation.ACTIVATIONS`."""

_BLOCK = 1024  # elements of act_mul's programs


@triton.jit
def _tanh(x):
    # from the exponential of a negative number, which cannot overflow
    below = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - below) / (1.0 + below)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The function KIND (one of the values of `KINDS`, or None, which is x itself) of float32 x."""
    if KIND == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = 0.5 * x * (1.0 + _tanh((x + 0.044715 * (x * x * x)) * 0.7978845608028654))
    elif KIND == "gelu_quick":
        x = x / (1.0 + tl.exp(-1.702 * x))
    elif KIND == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "relu2":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x * x
    elif KIND == "tanh":
        x = _tanh(x)
    elif KIND == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(KIND is None, "an activation that is not known")
    return x


@triton.jit
def _act_mul_kernel(gate_up, out, n, KIND: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr):
    begin(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    gate = tl.load(gate_up + row * 2 * n + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * n + column, mask=inside).to(tl.float32)
    tl.store(out + row * n + column, activate(gate, KIND) * up, mask=inside)


def act_mul(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up of `gate_up` [M, 2N], where gate stands before up, -> [M, N]; rounded once."""
    m, n = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((m, n), dtype=gate_up.dtype, device=gate_up.device)
    grid = (m, -(-n // _BLOCK))
    overlap = overlaps(gate_up.device)
    _act_mul_kernel[grid](gate_up, out, n, KINDS[activation], overlap, _BLOCK, num_warps=4, launch_pdl=overlap)
    return out
