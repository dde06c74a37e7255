"""Logits are taken and left in each iteration, of as many rows as sample: the heap must not grow by that."""

import platform
import subprocess
import sys

import pytest
from kernel_sets import NEEDS_NATIVE

MOSTLY_ALONE = """
import sys
import torch
from orcaserve.ops.native_kernels import NativeKernels
from orcaserve.worker.process import keep_freed_memory

n = 150_000
linear = NativeKernels(1).linear([torch.ones(n, 8)], [None], wide=True)
x = torch.arange(128.0).view(16, 8)
keep_freed_memory()
kept, places = [], set()
for m in (*range(1, 17), *range(16, 0, -1)):
    logits = linear(x[:m])
    assert logits.shape == (m, n) and logits.data_ptr() % 64 == 0
    assert torch.equal(logits[:, -1], x[:m].sum(1))
    places.add(logits.data_ptr())
    kept += [bytearray(700 + 100 * i) for i in range(40)]  # what comes to lie behind them, and stays
    del logits
print(len(places))
"""


@NEEDS_NATIVE
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocations that would not fit")
def test_logits_of_any_number_of_rows_lie_where_the_last_ones_did() -> None:
    done = subprocess.run([sys.executable, "-c", MOSTLY_ALONE], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 4  # aligned as torch aligns, it takes ten
