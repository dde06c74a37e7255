"""Measures on a GPU how long products of more than 64 tokens take with each tile, and fits what tiles are chosen by.

    python tools/tile_paces.py TIMINGS.JSON

Times eight matrices of two models with 72 to 2064 tokens, checks that all tiles give equal bits, and writes the timings
down; if the file is there already, nothing is measured. Then it prints, for each tile in `PACES` of
`ops/gpu/tiles.py`, what its paces would be by these timings and how well those in the table foretell them, and what
choosing by the table costs beside the best tile for each product.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from orcaserve.ops.gpu import matmul as products
from orcaserve.ops.gpu.matmul import MatmulScratch
from orcaserve.ops.gpu.stopwatch import stopwatch
from orcaserve.ops.gpu.tiles import PACES, PROCESSORS, Tile, tiles

TOKENS = (72, 96, 128, 160, 192, 224, 256, 272, 320, 384, 464, 528, 640, 784, 1040, 1296, 1552, 2064)
CHECKED = (96, 272, 1040)
TURNS = 200 << 20  # bytes of weights that take turns


class Matrix(msgspec.Struct, frozen=True):
    n: int
    k: int
    gated: bool = False


class Timing(msgspec.Struct, frozen=True):
    """seconds: of a product of m tokens. tile: block_n, block_m, block_k, warps, stages."""

    matrix: Matrix
    m: int
    tile: tuple[int, int, int, int, int]
    seconds: float


MATRICES = (
    *(Matrix(6144, 4096), Matrix(4096, 4096), Matrix(12288, 4096, gated=True), Matrix(4096, 12288)),
    *(Matrix(4096, 1024), Matrix(1024, 2048), Matrix(3072, 1024, gated=True), Matrix(1024, 3072)),
)


def tried(gated: bool) -> list[Tile]:
    return [pace.tile for pace in PACES[gated]]


def product(matrix: Matrix, x: Tensor, weights: Sequence[Tensor], scratch: MatmulScratch, tile: Tile | None) -> Tensor:
    if matrix.gated:
        return products.gated(x, *weights, None, None, "silu", scratch=scratch, tile=tile)
    return products.matmul(x, weights[0], scratch=scratch, tile=tile)


def compile_tiles(matrix: Matrix) -> None:
    """In a process of its own, whose binaries come to the disk for others to find."""
    device = torch.device("cuda")
    weights = [torch.empty(matrix.n, matrix.k, dtype=torch.bfloat16, device=device)] * (2 if matrix.gated else 1)
    for m in (256, 257):  # of more than 256 tokens no weights are asked for ahead
        for tile in tried(matrix.gated):
            x = torch.empty(m, matrix.k, dtype=torch.bfloat16, device=device)
            product(matrix, x, weights, MatmulScratch(device), tile)
    torch.cuda.synchronize()


def measure() -> list[Timing]:
    device = torch.device("cuda")
    watch, scratch, found = stopwatch(device), MatmulScratch(device), []
    with ProcessPoolExecutor(len(MATRICES), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_tiles, MATRICES))
    for matrix in MATRICES:
        count = max(2, min(4, -(-TURNS // (2 * matrix.n * matrix.k))))
        shape = (2 if matrix.gated else 1, matrix.n, matrix.k)
        copies = [torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(count)]
        rows = torch.randn(max(TOKENS), matrix.k, dtype=torch.bfloat16, device=device)
        whole = product(matrix, rows, copies[0], scratch, None)
        for m in TOKENS:
            x = rows[:m].contiguous()
            for tile in tried(matrix.gated):
                if tile.block_m >= 2 * m:
                    continue
                calls = [partial(product, matrix, x, weights, scratch, tile) for weights in copies]
                name = (tile.block_n, tile.block_m, tile.block_k, tile.warps, tile.stages)
                found.append(Timing(matrix, m, name, watch.call_seconds(calls, 3)))
                if m in CHECKED and not torch.equal(calls[0](), whole[:m]):
                    print(f"other bits: {matrix} of {m} tokens with {tile}")
        print(f"{matrix}: {len(found)} timings so far", flush=True)
    return found


def features(of: Timing, room: int) -> list[float]:
    """What a timing is the sum of: waves by how many programs share a processor, times K in thousands; and 1."""
    programs = -(-of.matrix.n // of.tile[0]) * -(-of.m // of.tile[1])
    full, rest = divmod(programs, room * PROCESSORS)
    waves = [0.0] * room
    waves[-1] += full
    if rest:
        waves[-(-rest // PROCESSORS) - 1] += 1
    return [*(wave * of.matrix.k / 1000 for wave in waves), 1.0]


def report(timings: list[Timing]) -> None:
    by_tile: dict[tuple[bool, tuple[int, ...]], list[Timing]] = defaultdict(list)
    by_product: dict[tuple[Matrix, int], dict[tuple[int, ...], float]] = defaultdict(dict)
    for one in timings:
        by_product[one.matrix, one.m][one.tile] = one.seconds
        if one.m >= one.tile[1]:
            by_tile[one.matrix.gated, one.tile].append(one)
    for gated, paces in PACES.items():
        for pace in paces:
            tile, room = pace.tile, len(pace.shared)
            some = by_tile[gated, (tile.block_n, tile.block_m, tile.block_k, tile.warps, tile.stages)]
            if len(some) < 4:
                continue
            took = np.array([1e6 * one.seconds for one in some])
            terms = np.array([features(one, room) for one in some])
            fit = np.linalg.lstsq(terms / took[:, None], np.ones(len(some)), rcond=None)[0]
            off = np.abs(terms @ np.array([*pace.shared, pace.begin]) / took - 1)
            print(
                f"{tile}: fitted {np.round(fit, 2)}; the table's are off by {np.quantile(off, 0.9):.0%} in nine of ten"
            )
    costs = []
    for (matrix, m), took in by_product.items():
        tile = tiles(m, matrix.n, matrix.k, gated=matrix.gated, dtype=torch.bfloat16)
        chosen = took.get((tile.block_n, tile.block_m, tile.block_k, tile.warps, tile.stages))
        if chosen is not None:
            costs.append(chosen / min(took.values()))
    print(f"the chosen tile takes {statistics.mean(costs):.3f} times as long as the best in the mean of {len(costs)}")


def main() -> None:
    path = Path(sys.argv[1])
    if not path.exists():
        path.write_bytes(msgspec.json.encode(measure()))
    report(msgspec.json.decode(path.read_bytes(), type=list[Timing]))


if __name__ == "__main__":
    main()
