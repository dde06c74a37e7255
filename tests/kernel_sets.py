"""The kernels that this machine runs, for tests that hold for every one of them."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, get_args

import pytest
import torch

from orcaserve.core.config import KVDtype, Quantization
from orcaserve.ops.attention import ScaledBytes
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.native_kernels import NativeCache, NativeKernels, instruction_sets
from orcaserve.ops.torch_kernels import TorchKernels

EVERY = ["torch", *instruction_sets()]
BEST = instruction_sets()[:1]
TWIN_AND_BEST = ["torch", *BEST]
NEEDS_NATIVE = pytest.mark.skipif(not BEST, reason="installed without native kernels")


BYTES = [f"{isa} int8" for isa in instruction_sets()]
HALVES = [f"{isa} int4" for isa in instruction_sets()]
KV_BYTES = [f"{name} kv-int8" for name in EVERY]


@cache
def make(name: str, threads: int = 1) -> Kernels:
    isa, *words = name.split()
    kv_dtype: KVDtype = "int8" if "kv-int8" in words else "auto"
    if isa == "torch":
        return TorchKernels(kv_dtype=kv_dtype)
    quantization = next((word for word in words if word in get_args(Quantization)), "none")
    return NativeKernels(threads, isa, quantization=quantization, kv_dtype=kv_dtype)


def fill_cache(layer: Any, value: float) -> None:
    """Writes a value into every slot of a layer's KV cache, as rubbish that a request must never read."""
    if not isinstance(layer, NativeCache):
        for cache in (layer.k, layer.v):
            if isinstance(cache, ScaledBytes):
                cache.values.fill_(-128)
                cache.scales.fill_(value)
            else:
                cache.fill_(value)
        return
    for address, nbytes in layer.native.buffers:
        raw = (ctypes.c_char * nbytes).from_address(address)
        torch.frombuffer(raw, dtype=layer.dtype).fill_(value)
