"""Kernels that begin while the one before them ends, and wait for it only when they come to what it wrote.

A kernel that is launched with `launch_pdl=overlaps(device)` calls `begin`, does what hangs on no other kernel's work,
and then calls `wait`, before it touches anything that another kernel may write, or may still read. What was written
before a kernel that is launched without it, as all of torch's, is there for all that come after that one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a device can: from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(OVERLAP: tl.constexpr):
    """Lets the next kernel come as soon as all programs of this one run and there is room."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Returns when the kernel before has ended, and what it wrote can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def prefetch(addresses, sizes):
    """Has `sizes` bytes (a multiple of 16; none where not positive) from each of `addresses` (multiples of 16) brought
    to the second-level cache. Waits for nothing. Not under the interpreter.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [addresses, sizes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
