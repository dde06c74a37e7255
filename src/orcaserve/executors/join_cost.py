"""What the fixed order of sums costs: two ranks join their parts of a product, beside a plain all-reduce of them.

`measure` starts the two ranks, of one thread each, as `python -m orcaserve.executors.join_cost STORE FILE RANK HIDDEN
ROUNDS`; they share memory through FILE.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from orcaserve.bench.parallel import Joined
from orcaserve.core.config import ModelError
from orcaserve.engine.executor import WorkerLost
from orcaserve.ops.native_kernels import NativeKernels, instruction_sets
from orcaserve.parallel.parts import Join
from orcaserve.parallel.world import World
from orcaserve.worker.process import die_with_parent

ROWS = (1, 4, 16, 64, 512)


def measure(hidden: int, rounds: int = 200) -> list[Joined]:
    """Medians of so many rounds, the two ways in turn, for `hidden` values a row.

    Raises ModelError, in one line, where there are no native kernels, and WorkerLost if a rank fails.
    """
    if not instruction_sets():
        raise ModelError("no native kernels to join parts with: OrcaServe was installed without a C++ compiler")
    with tempfile.TemporaryDirectory(prefix="orcaserve-") as folder:
        shared = os.memfd_create("orcaserve-parts")
        arguments = [sys.executable, "-m", __name__, str(Path(folder) / "store"), str(shared)]
        command = [[*arguments, str(number), str(hidden), str(rounds)] for number in (0, 1)]
        other = subprocess.Popen(command[1], pass_fds=[shared])  # noqa: S603
        try:
            first = subprocess.run(command[0], stdout=subprocess.PIPE, pass_fds=[shared], check=False)  # noqa: S603
            if first.returncode or other.wait():
                raise WorkerLost("a rank that was to join its part with another's has failed")
        finally:
            other.kill()
            other.wait()
            os.close(shared)
    return [Joined(**one) for one in json.loads(first.stdout)]


def _rank(store: str, shared: int, number: int, hidden: int, rounds: int) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    world = World(dist.FileStore(store, 2), number, 2, 1, shared=shared)
    kernels = NativeKernels(1)
    join = Join(kernels, world.group, torch.bfloat16, None, None)
    found = []
    for rows in ROWS:
        residual = torch.randn(rows, hidden).bfloat16()
        fixed, plain = [], []
        for _ in range(rounds):
            part = torch.randn(rows, hidden)
            began = time.perf_counter()
            join(part, residual)
            middle = time.perf_counter()
            dist.all_reduce(part)
            kernels.join(part[None], None, residual, torch.bfloat16)
            fixed.append(middle - began)
            plain.append(time.perf_counter() - middle)
        begin = rounds // 5  # the first ones warm up
        found.append(
            {"rows": rows, "fixed": statistics.median(fixed[begin:]), "plain": statistics.median(plain[begin:])}
        )
    return found


if __name__ == "__main__":
    die_with_parent()
    _store, _shared, _number, _hidden, _rounds = sys.argv[1:]
    _found = _rank(_store, int(_shared), int(_number), int(_hidden), int(_rounds))
    if _number == "0":
        print(json.dumps(_found), flush=True)
    os._exit(0)  # the group's threads need no tidy end
