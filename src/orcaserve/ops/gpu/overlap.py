"""Kernels that begin while the one before them ends, and wait for it only when they come to what it wrote.

A kernel that is launched with `launch_pdl=overlaps(device)` calls `begin`, does what hangs on no other kernel's work,
and then calls `wait`, before it touches anything that another kernel may write, or may still read. What was
written before the last plain launch is there: a `DeviceLayout`, for one, in all layers.
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
def prefetch(addresses):
    """Has the lines at a tensor of valid addresses brought to the second-level cache. Not under the interpreter."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def barrier():
    """As `tl.debug_barrier`, which keeps a loop around it from being pipelined. Not under the interpreter."""
    tl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, 0;", "=r,r", [tl.num_programs(0)], tl.int32, False, 1)
