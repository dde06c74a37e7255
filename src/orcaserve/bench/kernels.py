"""What a benchmark of kernels is about: shapes, the kernels at them, what each call must move and multiply, and shares.

Plain values without torch: `ops.benchmark` measures, `bench.kernel_report` shows.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Literal

import msgspec

Kind = Literal["linear", "output", "gated", "decode", "prefill", "heads", "rms_norm", "peaks"]

PRODUCTS: tuple[Kind, ...] = ("linear", "output", "gated")
RUNNERS = ("ours", "torch", "twin")
OURS = RUNNERS[0]
FEW, MANY = 8, 128  # up to FEW rows only memory is a limit worth naming, from MANY on only the arithmetic
FLOAT32 = 4  # bytes


class Shape(msgspec.Struct, frozen=True):
    """The sizes of a model that its kernels see."""

    name: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936),
        Shape("llama-3.1-8b", 4096, 14336, 32, 8, 128, 128256),
        Shape("tiny", 64, 96, 4, 2, 16, 1000),  # for tests of the benchmark itself
    )
}


class Kernel(msgspec.Struct, frozen=True):
    """One thing to measure, with `least` to `most` rows.

    size: K and N of a product; the context of a decode. streams: what it mostly reads comes from memory in a real run,
    so memory's bandwidth is a limit; else it was just written and lies in a cache.
    """

    kind: Kind
    name: str
    size: tuple[int, ...] = ()
    least: int = 1
    most: int = 512
    streams: bool = True

    def runners(self, *, is_quantised: bool = False) -> tuple[str, ...]:
        """torch has no operator that norms, rotates and stores at once, and the twin has no quantised weights."""
        lacks = {("heads", "torch"), *((kind, "twin") for kind in PRODUCTS if is_quantised)}
        return tuple(runner for runner in RUNNERS if (self.kind, runner) not in lacks)

    def rows(self, wanted: Sequence[int]) -> list[int]:
        return [m for m in wanted if self.least <= m <= self.most]


def kernels(shape: Shape) -> list[Kernel]:
    """Those of a layer, and what comes after the last one; logits exist only for rows that sample, so they are few."""
    hidden, mlp, across = shape.hidden, shape.mlp, shape.heads * shape.head_dim
    return [
        Kernel("linear", f"qkv {hidden}×{shape.qkv}", (hidden, shape.qkv)),
        Kernel("linear", f"o {across}×{hidden}", (across, hidden)),
        Kernel("gated", f"gated {hidden}×2·{mlp}", (hidden, mlp)),
        Kernel("linear", f"down {mlp}×{hidden}", (mlp, hidden)),
        Kernel("output", f"output {hidden}×{shape.vocab}", (hidden, shape.vocab), most=64),
        Kernel("decode", "decode at 256", (256,), most=64),
        Kernel("decode", "decode at 1024", (1024,), most=64),
        Kernel("prefill", "prefill", least=16, streams=False),
        Kernel("heads", "heads", streams=False),
        Kernel("rms_norm", "rms_norm", streams=False),
        Kernel("peaks", "peaks", most=64),
    ]


class Work(msgspec.Struct, frozen=True):
    """One call of a kernel with m rows. bytes: read or written once, at least. flops: of its products; 0: has none.

    weights: those of the bytes that are weights as they come; a runner that packs them may read fewer.
    """

    kernel: str
    m: int
    bytes: int
    flops: int
    weights: int = 0


def work(shape: Shape, kernel: Kernel, m: int, itemsize: int) -> Work:
    """itemsize: of weights, activations and the KV cache, in bytes."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    flops = weights = 0
    match kernel.kind, kernel.size:
        case "linear" | "gated" | "output", (k, n):
            matrices = 2 if kernel.kind == "gated" else 1
            result = FLOAT32 if kernel.kind == "output" else itemsize
            weights = matrices * k * n * itemsize
            moved = weights + m * k * itemsize + m * n * result
            flops = 2 * m * k * n * matrices
        case "decode", (context,):
            moved = m * (2 * context * keys + 2 * queries) * itemsize
            flops = 4 * m * context * queries
        case "prefill", _:
            moved = m * (2 * keys + 2 * queries) * itemsize
            flops = 4 * queries * m * (m + 1) // 2  # a token sees those up to itself
        case "heads", _:
            moved = 2 * m * shape.qkv * itemsize
        case "rms_norm", _:
            moved = 2 * m * shape.hidden * itemsize
        case _:
            moved = m * shape.vocab * FLOAT32
    return Work(kernel.name, m, moved, flops, weights)


class Sample(msgspec.Struct, frozen=True):
    """Seconds of one call, and the ceilings right before it, in bytes and FLOPs a second, as far as they apply.

    bytes: what this runner read or wrote, at least, with weights as it keeps them.
    """

    round: int
    kernel: str
    m: int
    runner: str
    seconds: float
    bytes: int
    bandwidth: float | None
    peak: float | None


class Cell(msgspec.Struct, frozen=True):
    """Medians over rounds. speed: how many times as fast as ours. of_…: shares of the ceilings, where they apply."""

    seconds: float
    bytes: int
    speed: float
    of_bandwidth: float | None
    of_peak: float | None

    @property
    def share(self) -> float | None:
        """Of the ceiling that is nearer."""
        return max((share for share in (self.of_bandwidth, self.of_peak) if share is not None), default=None)


class Line(msgspec.Struct, frozen=True):
    """One work by everyone who has such a kernel."""

    work: Work
    cells: dict[str, Cell]


def summary(works: Sequence[Work], samples: Sequence[Sample]) -> list[Line]:
    """Every work of which there are samples."""
    found: dict[tuple[str, int], dict[str, list[Sample]]] = {}
    for sample in samples:
        found.setdefault((sample.kernel, sample.m), {}).setdefault(sample.runner, []).append(sample)
    lines = []
    for one in works:
        if by_runner := found.get((one.kernel, one.m)):
            cells = {runner: _cell(one, mine, by_runner[OURS]) for runner, mine in by_runner.items()}
            lines.append(Line(one, cells))
    return lines


def _cell(work: Work, mine: Sequence[Sample], ours: Sequence[Sample]) -> Cell:
    seconds = [sample.seconds for sample in mine]
    return Cell(
        statistics.median(seconds),
        mine[0].bytes,
        statistics.median(b.seconds / a.seconds for a, b in zip(mine, ours, strict=False)),
        share(mine[0].bytes, seconds, [sample.bandwidth for sample in mine]),
        share(work.flops, seconds, [sample.peak for sample in mine]),
    )


def share(amount: int, seconds: Sequence[float], ceilings: Sequence[float | None]) -> float | None:
    """The median of each rate by the ceiling it was paired with, not the quotient of medians: the machine drifts."""
    pairs = [(took, ceiling) for took, ceiling in zip(seconds, ceilings, strict=True) if ceiling]
    return statistics.median(amount / took / ceiling for took, ceiling in pairs) if pairs else None
