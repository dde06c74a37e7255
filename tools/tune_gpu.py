"""Times the matrix products of two models on the GPU with every tile worth trying, and checks that all give equal bits.

    python tools/tune_gpu.py

Prints, for each matrix and number of tokens, what torch's product takes, what the tile in the table takes (in brackets:
where each kernel begins only when the one before has ended), and the best: microseconds, and the share of a copy's
bandwidth (few tokens) or of torch's rate (many). A tile reads
outputs x tokens x K, w its warps, s its stages, /S the segments of K ("/S" where they are shared among programs,
"+S" where one program walks through them). Segments other than the table's are timed too, for some tiles.

Then it times the layers of a whole model (norms, products and heads; without attention), where kernels of all kinds
follow each other: with tiles of several kinds, with more and fewer bytes of weights asked for ahead, and with kernels
that let the next one come early or late. Tiles of less than 64 outputs use other instructions; whether their bits are
equal is counted apart.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources

from orcaserve.ops.gpu import matmul as products
from orcaserve.ops.gpu.heads import heads
from orcaserve.ops.gpu.layout import DeviceLayout
from orcaserve.ops.gpu.matmul import MatmulScratch
from orcaserve.ops.gpu.norm import rms_norm
from orcaserve.ops.gpu.tiles import Tile

TOKENS = (1, 16, 32, 64, 128, 256)
CHECKED = (1, 7, 64, 65, 130, 1024)
CACHE_BYTES = 300 << 20  # so many bytes of weights take turns that no cache holds them


@dataclass(frozen=True)
class Matrix:
    name: str
    n: int
    k: int
    gated: bool = False

    @property
    def bytes(self) -> int:
        return self.n * self.k * 2 * (2 if self.gated else 1)

    @property
    def segments(self) -> int:
        return 1 if self.gated else products.segments(self.n, self.k)

    def weights(self) -> tuple[Tensor, ...]:
        shape = (self.n, self.k)
        return tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2 if self.gated else 1))


@dataclass(frozen=True)
class Way:
    """A matrix, and how it is multiplied."""

    matrix: Matrix
    tile: Tile
    segments: int

    def __call__(self, x: Tensor, weights: Sequence[Tensor], scratch: MatmulScratch) -> Tensor:
        with patch.object(products, "segments", lambda n, k: self.segments):
            if self.matrix.gated:
                gate, up = weights
                return products.gated(x, gate, up, None, None, "silu", scratch=scratch, tile=self.tile)
            return products.matmul(x, weights[0], scratch=scratch, tile=self.tile)

    def __str__(self) -> str:
        tile = self.tile
        cut = "" if self.segments == 1 else f"{'/' if tile.split else '+'}{self.segments}"
        return f"{tile.block_n}x{tile.block_m}x{tile.block_k}w{tile.warps}s{tile.stages}{cut}"


MATRICES = (
    Matrix("8B qkv", 6144, 4096),
    Matrix("8B out", 4096, 4096),
    Matrix("8B gate, up", 12288, 4096, gated=True),
    Matrix("8B down", 4096, 12288),
    Matrix("8B head", 151936, 4096),
    Matrix("0.6B qkv", 4096, 1024),
    Matrix("0.6B out", 1024, 2048),
    Matrix("0.6B gate, up", 3072, 1024, gated=True),
    Matrix("0.6B down", 1024, 3072),
)


def table_way(matrix: Matrix, m: int) -> Way:
    tile = products.tiles(m, matrix.n, matrix.k, gated=matrix.gated, dtype=torch.bfloat16)
    return Way(matrix, tile, matrix.segments)


def ways(matrix: Matrix, m: int) -> list[Way]:
    """The table's first."""
    found = {table_way(matrix, m): None}
    for shape in _gated_shapes(m) if matrix.gated else _shapes(m):
        narrow = shape[0] < 64
        for split in (True, False) if matrix.segments > 1 and not narrow else (False,):
            found[Way(matrix, Tile(*shape, split), matrix.segments)] = None
    if not matrix.gated and matrix.n < 8192 and matrix.k >= 4096:
        for shape in _RECUT.get(m, ()):
            for count in (count for count in (1, 2, 4) if count * matrix.n <= _WIDEST):
                found[Way(matrix, Tile(*shape, count > 1), count)] = None
    return list(found)


_NARROW_MARK = "narrow: "
_WIDEST = 16384  # outputs times segments that the scratch has room for
_RECUT = {
    1: [(64, 16, 128, 4, 3), (64, 16, 128, 4, 5)],
    16: [(64, 16, 128, 4, 3)],
    64: [(64, 64, 128, 4, 3), (128, 64, 128, 4, 4)],
    256: [(64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (256, 128, 64, 8, 4)],
}


def _shapes(m: int) -> Iterator[tuple[int, int, int, int, int]]:
    if m <= 16:
        yield from ((64, 16, 128, 4, 3), (64, 16, 128, 4, 5), (64, 16, 256, 4, 3), (128, 16, 128, 4, 4))
        yield from ((32, 16, 128, 4, 6), (32, 16, 256, 4, 4), (16, 16, 128, 4, 8), (16, 16, 256, 2, 5))
    elif m <= 64:
        yield from ((64, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 64, 64, 4, 8), (128, 64, 128, 4, 4))
        yield from ((128, 64, 128, 8, 4), (32, 64, 128, 4, 4), (64, 16, 256, 4, 3), (64, 16, 256, 4, 4))
    elif m <= 128:
        yield from ((64, 64, 128, 4, 5), (64, 128, 64, 4, 4), (64, 128, 128, 4, 4), (128, 64, 128, 4, 4))
        yield (64, 32, 256, 4, 3)
    else:
        yield (64, 32, 256, 4, 3)
        yield from ((64, 128, 64, 4, 4), (64, 128, 128, 4, 4), (128, 128, 64, 8, 3))
        yield from ((64, 256, 64, 8, 4), (128, 128, 128, 8, 3))


def _gated_shapes(m: int) -> Iterator[tuple[int, int, int, int, int]]:
    if m <= 16:
        yield from ((64, 16, 128, 4, 3), (64, 16, 64, 4, 4), (64, 16, 64, 4, 6))
        yield from ((32, 16, 128, 4, 4), (32, 16, 256, 4, 3), (16, 16, 128, 4, 7))
    elif m <= 64:
        yield from ((64, 64, 128, 4, 3), (64, 64, 64, 4, 4), (128, 64, 64, 8, 4), (64, 64, 128, 4, 4))
        yield (32, 64, 128, 4, 4)
    elif m <= 128:
        yield from ((64, 128, 64, 4, 3), (64, 128, 64, 4, 4), (64, 64, 128, 4, 3), (128, 128, 64, 8, 4))
    else:
        yield from ((64, 128, 64, 4, 4), (64, 128, 64, 4, 3), (64, 256, 64, 8, 4), (128, 128, 64, 8, 4))


def compile_all(share: Sequence[Way]) -> None:
    """In a process of its own: runs each way once, whereby its binary comes to the disk, for others to find."""
    scratch, one_by_one = MatmulScratch(torch.device("cuda")), apart()
    for way in share:
        weights = [torch.empty((way.matrix.n, way.matrix.k), dtype=torch.bfloat16, device="cuda")] * 2
        try:
            way(weights[0][:1], weights, scratch)
            if way.tile.block_m <= 64 and way == table_way(way.matrix, way.tile.block_m):
                way(weights[0][:1], weights, one_by_one)
        except OutOfResources as error:
            print(f"{way} for {way.matrix.name}: {error}", flush=True)
    torch.cuda.synchronize()


def apart() -> MatmulScratch:
    """With which kernels begin when the one before has ended."""
    scratch = MatmulScratch(torch.device("cuda"))
    scratch.overlap = False
    return scratch


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Of one of the calls, made one after the other in a graph: the best of a few rounds."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / (2 * len(calls)))
    return min(times)


def torch_product(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for weight in weights:
        out = linear(x, weight)
    return out


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds([lambda: target.copy_(source)]) * 1e-6)


def time_matrix(matrix: Matrix, copies: list[tuple[Tensor, ...]], scratch: MatmulScratch, bandwidth: float) -> None:
    one_by_one = apart()
    for m in TOKENS:
        x = torch.randn((m, matrix.k), dtype=torch.bfloat16, device="cuda")
        turns = copies[: len(copies) if m <= 64 else 4]
        theirs = microseconds([partial(torch_product, x, weights) for weights in turns])
        results = []
        for way in ways(matrix, m):
            try:
                results.append((microseconds([partial(way, x, weights, scratch) for weights in turns]), way))
            except OutOfResources:
                continue
        floor = matrix.bytes / bandwidth * 1e6 if m <= 64 else theirs
        flops = matrix.bytes * m  # two for each of the weight's elements, of two bytes
        rate = f"{matrix.bytes / theirs / 1e6:.2f} TB/s" if m <= 64 else f"{flops / theirs / 1e6:.0f} TFLOP/s"
        line = f"{matrix.name:13} M {m:4}  torch {theirs:7.1f} us {rate:12} table {results[0][0]:7.1f}"
        if m <= 64:
            line += f" ({microseconds([partial(results[0][1], x, weights, one_by_one) for weights in turns]):.1f})"
        line += f" {floor / results[0][0]:4.0%}  "
        best = sorted(results, key=lambda result: result[0])[:3]
        print(line + "  ".join(f"{way} {took:.1f} {floor / took:.0%}" for took, way in best), flush=True)


def check_matrix(matrix: Matrix, weights: tuple[Tensor, ...], scratch: MatmulScratch) -> tuple[int, list[str]]:
    """The number of products compared, and those whose rows had other bits than in the greatest batch."""
    x = torch.randn((max(CHECKED), matrix.k), dtype=torch.bfloat16, device="cuda")
    whole = table_way(matrix, len(x))(x, weights, scratch)
    wanted = linear(x[:64], weights[0])
    if matrix.gated:
        wanted = torch.nn.functional.silu(wanted) * linear(x[:64], weights[1])
    error = (whole[:64].float() - wanted.float()).norm() / wanted.float().norm()
    wrong = [] if error < 2e-2 else [f"{matrix.name}: error {error:.1e}"]
    count = 0
    for m in CHECKED:
        tried = [table_way(matrix, m)]
        for other in TOKENS:
            tried += [
                w for w in ways(matrix, other) if w.segments == matrix.segments and not (w.tile.split and m > 256)
            ]
        for first in {0, (len(x) - m) // 2, len(x) - m}:
            for way in dict.fromkeys(tried):
                try:
                    got = way(x[first : first + m], weights, scratch)
                except OutOfResources:
                    continue
                count += 1
                if not torch.equal(got, whole[first : first + m]):
                    mark = _NARROW_MARK if way.tile.block_n < 64 else ""
                    wrong.append(mark + f"{matrix.name} M {m} from {first}: {way}")
    return count, wrong


@dataclass(frozen=True)
class Layers:
    """Layers of a model, as they follow each other for some tokens."""

    hidden: int
    heads: int
    kv_heads: int
    inner: int
    count: int
    head_dim: int = 128

    @property
    def qkv(self) -> Matrix:
        return Matrix("qkv", (self.heads + 2 * self.kv_heads) * self.head_dim, self.hidden)

    @property
    def out(self) -> Matrix:
        return Matrix("out", self.hidden, self.heads * self.head_dim)

    @property
    def gate_up(self) -> Matrix:
        return Matrix("gate, up", self.inner, self.hidden, gated=True)

    @property
    def down(self) -> Matrix:
        return Matrix("down", self.hidden, self.inner)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def calls(self, m: int, scratch: MatmulScratch) -> Callable[[Sequence[Tile]], Tensor]:
        """What runs them with the tiles of the four matrices."""
        draws = [[matrix.weights() for matrix in self.matrices] for _ in range(self.count)]
        norm = torch.ones(self.hidden, dtype=torch.bfloat16, device="cuda")
        head_norm = torch.ones(self.head_dim, dtype=torch.bfloat16, device="cuda")
        table = torch.ones((8, self.head_dim), device="cuda")
        cache = torch.zeros((-(-m // 64), self.kv_heads, 64, self.head_dim), dtype=torch.bfloat16, device="cuda")
        first = torch.randn((m, self.hidden), dtype=torch.bfloat16, device="cuda")
        ints = torch.arange(m, dtype=torch.int32, device="cuda")
        none = ints[:0]
        layout = DeviceLayout(ints % 8, ints, none, none, 64, none, none)

        def run(tiles: Sequence[Tile]) -> Tensor:
            x = first
            qkv, out, gate_up, down = tiles
            for (w_qkv,), (w_out,), (gate, up), (w_down,) in draws:
                y = rms_norm(x, norm, 1e-6, plus_one=False)
                y = products.matmul(y, w_qkv, scratch=scratch, tile=qkv)
                y = heads(
                    y, layout, cache, cache, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim,
                    q_norm=head_norm, k_norm=head_norm, eps=1e-6, plus_one=False, table=table, interleaved=False,
                    rotary_dim=self.head_dim,
                )  # fmt: skip
                x = products.matmul(y, w_out, None, x, scratch=scratch, tile=out)
                y = rms_norm(x, norm, 1e-6, plus_one=False)
                y = products.gated(y, gate, up, None, None, "silu", scratch=scratch, tile=gate_up)
                x = products.matmul(y, w_down, None, x, scratch=scratch, tile=down)
            return x

        return run


LAYERS = {"8B": Layers(4096, 32, 8, 12288, 5), "0.6B": Layers(1024, 16, 8, 3072, 12)}
_WIDE = (64, 16, 128, 4, 5, True), (64, 16, 128, 4, 5, True), (64, 16, 64, 4, 4), (64, 16, 128, 4, 5, True)
_NARROW = (32, 16, 128, 4, 6), (32, 16, 128, 4, 6), (32, 16, 128, 4, 4), (32, 16, 128, 4, 6)
_DEEP = (32, 16, 256, 4, 4), (32, 16, 256, 4, 4), (32, 16, 256, 4, 3), (32, 16, 256, 4, 4)
_NARROWEST = (16, 16, 128, 4, 8), (16, 16, 128, 4, 8), (16, 16, 128, 4, 7), (16, 16, 128, 4, 8)


def kinds(layers: Layers, m: int) -> dict[str, Sequence[Tile]]:
    """Tiles of the four matrices: the table's, and others."""
    table = [products.tiles(m, x.n, x.k, gated=x.gated, dtype=torch.bfloat16) for x in layers.matrices]
    found = {"table": table}
    if m <= 16:
        for name, others in (("wide", _WIDE), ("narrow", _NARROW), ("deep", _DEEP), ("narrowest", _NARROWEST)):
            tiles = [Tile(*other) for other in others]
            found[name] = tiles
            for i, matrix in enumerate(layers.matrices):
                found[f"{name} {matrix.name}"] = [*table[:i], tiles[i], *table[i + 1 :]]
    return found


def settings(kind: str) -> Iterator[tuple[int, bool]]:
    """Megabytes asked for ahead, and whether the next kernel comes early; the settings there are come first."""
    yield products._AHEAD >> 20, True
    if " " not in kind:
        for early in (True, False) if kind in ("table", "narrow") else (True,):
            for ahead in (0, 4, 8, 16, 32):
                yield ahead, early


def time_layers(name: str, layers: Layers, scratch: MatmulScratch) -> None:
    size = layers.count * sum(matrix.bytes for matrix in layers.matrices)
    for m in (1, 16, 64, 256):
        run, results = layers.calls(m, scratch), []
        for kind, tiles in kinds(layers, m).items():
            for ahead, early in dict.fromkeys(settings(kind)):
                with (
                    patch.object(products, "_AHEAD", ahead << 20),
                    patch.object(products, "_LATE_ROWS", 0 if early else 1 << 30),
                ):
                    took = microseconds([partial(run, tiles)]) / layers.count
                results.append((took, f"{kind} {ahead} MB {'early' if early else 'late'}"))
        print(f"{name} layer M {m}: {size / layers.count / 4.6e6:.1f} us at 4.6 TB/s")
        for took, how in sorted(results):
            print(f"  {took:7.1f} {how}", flush=True)


def compile_layers(task: tuple[str, int, str, bool]) -> None:
    """In a process of its own, as `compile_all`."""
    name, m, kind, early = task
    layers = replace(LAYERS[name], count=1)
    with patch.object(products, "_LATE_ROWS", 0 if early else 1 << 30):
        layers.calls(m, MatmulScratch(torch.device("cuda")))(kinds(layers, m)[kind])
    torch.cuda.synchronize()


def main() -> None:
    began = time.monotonic()
    everything = list(dict.fromkeys(way for matrix in MATRICES for m in (*TOKENS, *CHECKED) for way in ways(matrix, m)))
    workers = max(1, min(16, len(os.sched_getaffinity(0))))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        tasks = [
            (name, m, kind, early)
            for name, layers in LAYERS.items()
            for m in (1, 64, 256)
            for kind in kinds(layers, m)
            if " " not in kind
            for early in sorted({early for _, early in settings(kind)})
        ]
        others = pool.map(compile_layers, tasks)
        list(pool.map(compile_all, [everything[first :: 3 * workers] for first in range(3 * workers)]))
        list(others)
    bandwidth = copy_bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, a copy moves {bandwidth / 1e12:.2f} TB/s;"
        f" {len(everything)} products compiled in {time.monotonic() - began:.0f} s"
    )
    scratch = MatmulScratch(torch.device("cuda"))
    torch.manual_seed(0)
    compared, wrong = 0, []
    for matrix in MATRICES:
        copies = [matrix.weights() for _ in range(max(2, -(-CACHE_BYTES // matrix.bytes)))]
        time_matrix(matrix, copies, scratch, bandwidth)
        count, others = check_matrix(matrix, copies[0], scratch)
        compared, wrong = compared + count, wrong + others
    narrow = [line for line in wrong if line.startswith(_NARROW_MARK)]
    others = [line for line in wrong if not line.startswith(_NARROW_MARK)]
    print(
        f"bits: {compared} products compared, {len(others)} differ, and {len(narrow)} of tiles of less than 64 outputs;"
        f" {time.monotonic() - began:.0f} s until here"
    )
    for line in others[:20] + narrow[:10]:
        print(" ", line)
    for name, layers in LAYERS.items():
        time_layers(name, layers, scratch)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
