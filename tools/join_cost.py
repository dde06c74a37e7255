"""What the fixed order costs: joining two ranks' parts of a product in the tree's order, beside a plain all-reduce.

    python tools/join_cost.py --hidden 1024 --rounds 200

Starts two ranks of one thread each. Per iteration of M tokens a layer does two of these. In turns, medians; also the
bytes that each rank sends.
"""

from __future__ import annotations

import argparse
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

from orcaserve.ops.native_kernels import NativeKernels
from orcaserve.parallel.parts import Join
from orcaserve.parallel.world import World

SIZES = (1, 4, 16, 64, 512)


def rank(number: int, store: str, hidden: int, rounds: int) -> dict[str, dict[int, float]]:
    """Microseconds of each way, by M."""
    world = World(dist.FileStore(store, 2), number, 2, 1)
    kernels = NativeKernels(1)
    join = Join(kernels, world.group, torch.bfloat16, None, None)
    took: dict[str, dict[int, list[float]]] = {name: {m: [] for m in SIZES} for name in ("fixed order", "all-reduce")}
    for m in SIZES:
        residual = torch.randn(m, hidden).bfloat16()
        for _ in range(rounds):
            part = torch.randn(m, hidden)
            began = time.perf_counter()
            join(part, residual)
            middle = time.perf_counter()
            dist.all_reduce(part)
            kernels.join(part[None], None, residual, torch.bfloat16)
            took["fixed order"][m].append(middle - began)
            took["all-reduce"][m].append(time.perf_counter() - middle)
    return {
        name: {m: 1e6 * statistics.median(seconds[len(seconds) // 5 :]) for m, seconds in by_size.items()}
        for name, by_size in took.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--store")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank is not None:
        found = rank(given.rank, given.store, given.hidden, given.rounds)
        if given.rank == 0:
            print(json.dumps(found), flush=True)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--store", str(Path(folder) / "store")]
        other = subprocess.Popen([*command, "--rank", "1"])  # noqa: S603
        first = subprocess.run([*command, "--rank", "0"], stdout=subprocess.PIPE, check=True)  # noqa: S603
        other.wait()
    found = json.loads(first.stdout)
    print(f"{'M':>5} {'fixed order, us':>16} {'all-reduce, us':>15} {'ratio':>6}")
    for m, took in found["fixed order"].items():
        plain = found["all-reduce"][m]
        print(f"{m:>5} {took:16.0f} {plain:15.0f} {took / plain:6.2f}")


main()
