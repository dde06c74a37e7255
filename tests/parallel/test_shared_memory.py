"""Ranks that pass parts through shared memory get what each of them gave, whatever the sizes and the pace."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import kernel_sets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orcaserve.parallel.group import _TURN_BYTES, SharedGroup

pytestmark = kernel_sets.NEEDS_NATIVE

# rows, columns, dtype, whether all ranks want it
CALLS = st.lists(
    st.tuples(
        st.integers(0, 40),
        st.integers(1, 5000),
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def part(call: int, rank: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """What a rank gives in a call."""
    values = torch.arange(rows * columns, dtype=torch.int64) * 31 + 101 * call + 7 * rank
    return (values % 251).to(dtype).view(rows, columns)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 4), calls=CALLS, seed=st.integers(0, 2**32))
def test_everybody_gets_what_each_gave(size, calls, seed):
    """Threads instead of processes: the memory is the same, and each has a view of its own."""
    file = os.memfd_create("test")

    def run(rank: int) -> None:
        chance = random.Random(seed + rank)
        group = SharedGroup(file, rank, size)
        for number, (rows, columns, dtype, is_for_all) in enumerate(calls):
            if chance.random() < 0.2:
                time.sleep(chance.random() / 500)  # long enough that the others go to sleep
            mine = part(number, rank, rows, columns, dtype)
            got = group.all_gather(mine) if is_for_all else group.gather(mine)
            if not is_for_all and rank:
                assert got is None
                continue
            expected = torch.stack([part(number, other, rows, columns, dtype) for other in range(size)])
            assert torch.equal(got, expected), f"rank {rank}, call {number}"

    try:
        with ThreadPoolExecutor(size) as pool:
            for future in [pool.submit(run, rank) for rank in range(size)]:
                future.result(60)
    finally:
        os.close(file)


def test_values_that_do_not_lie_in_a_row():
    file = os.memfd_create("test")
    x = torch.arange(12.0).view(3, 4).t()
    assert torch.equal(SharedGroup(file, 0, 1).all_gather(x), x[None])
    os.close(file)


@pytest.mark.parametrize("size", [2, 3])
def test_processes(size):
    """As many turns as fit into a call, and calls one after the other without a pause."""
    code = """if True:
        import hashlib, os, sys, torch
        from orcaserve.parallel.group import SharedGroup
        file, rank, size, count = map(int, sys.argv[1:])
        group = SharedGroup(file, rank, size)
        seen = hashlib.sha256()
        for call in range(300):
            mine = torch.full((count if call % 50 == 0 else 100,), 1000 * rank + call, dtype=torch.int32)
            seen.update(group.all_gather(mine).numpy().tobytes())
        print(seen.hexdigest())
    """
    file = os.memfd_create("test")
    count = 3 * _TURN_BYTES // 4 + 5
    command = [[sys.executable, "-c", code, str(file), str(rank), str(size), str(count)] for rank in range(size)]
    ranks = [subprocess.Popen(one, stdout=subprocess.PIPE, text=True, pass_fds=[file]) for one in command]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    os.close(file)
    assert all(rank.returncode == 0 for rank in ranks)
    assert len(set(said)) == 1 and len(said[0]) == 65


def test_who_waits_does_not_keep_the_lock_of_python():
    """The heart beat of a rank that waits for another goes on."""
    file = os.memfd_create("test")
    groups = [SharedGroup(file, rank, 2) for rank in range(2)]
    waiting = threading.Thread(target=groups[0].all_gather, args=(torch.ones(3),))
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    assert torch.equal(groups[1].all_gather(torch.zeros(3)), torch.tensor([[1.0] * 3, [0.0] * 3]))
    waiting.join(10)
    assert not waiting.is_alive()
    os.close(file)
