"""Measures kernels, ours beside torch's operators and the torch twin, each against ceilings measured right before it.

What a real run reads from memory is read from memory here: weights, KV and logits come in so many copies, used in turn,
that none is still in a cache when its turn comes.
"""

from __future__ import annotations

import itertools
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from orcaserve.bench.kernels import FEW, MANY, OURS, Kernel, Sample, Shape, Work, kernels, work
from orcaserve.core.config import KVDtype, Quantization
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.layout import Layout
from orcaserve.ops.native_kernels import NativeKernels
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.torch_kernels import TorchKernels

Call = Callable[[], object]
Calls = dict[str, Sequence[Call]]  # by runner; to be called in turn

BLOCK = 16  # tokens of a block of the KV cache
_EPS = 1e-6
_SETTLE = 0.01  # seconds in which the threads of torch's pool give up waiting for more; until then they take cores


@dataclass(frozen=True, slots=True)
class Effort:
    """rows: the M to measure. memory: bytes that copies take together, at least. seconds: of a sample, at least."""

    rows: tuple[int, ...]
    memory: int
    seconds: float


FULL = Effort((1, 4, 16, 64, 512), 320 << 20, 0.02)
QUICK = Effort((1, 16, 128), 64 << 20, 0.004)


@dataclass(frozen=True, slots=True)
class Probe:
    """One way to find a ceiling: `amount` bytes or FLOPs a call, of the calls in turn."""

    name: str
    calls: Iterator[Call]
    amount: int
    is_torch: bool


class Benchmark:
    """Owns the kernels, and the buffers that the ceilings are measured with. `works` says what will be measured.

    bandwidth, peak: of several ways to find each ceiling, the one that was fastest here.
    isa: one of `instruction_sets()`; None: the best. quantization: of our weights; torch keeps them whole. kv_dtype:
    of our cache and the twin's. Raises ValueError if there are no native kernels.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        threads: int,
        isa: str | None,
        effort: Effort,
        *,
        quantization: Quantization = "none",
        kv_dtype: KVDtype = "auto",
    ) -> None:
        self.shape, self.dtype, self.threads, self.effort = shape, dtype, threads, effort
        self.ours = NativeKernels(threads, isa, quantization=quantization, kv_dtype=kv_dtype)
        self.twin = TorchKernels(kv_dtype=kv_dtype)
        self.works: list[Work] = []
        self._plan: list[tuple[Kernel, list[Work]]] = []
        for kernel in kernels(shape):
            works = [work(shape, kernel, m, dtype.itemsize) for m in kernel.rows(effort.rows)]
            self._plan.append((kernel, works))
            self.works += works
        self.bandwidth = self._best(self._reads())
        self.peak = self._best(self._products())

    def num_samples(self, rounds: int) -> int:
        return rounds * sum(len(works) * len(self._runners(kernel)) for kernel, works in self._plan)

    @torch.inference_mode()
    def samples(self, rounds: int) -> Iterator[Sample]:
        """Everything in turn, in every round; whose turn is first changes from round to round.

        A round makes its data anew: where they come to lie in memory is luck that no kernel should have throughout.
        """
        for round in range(1, rounds + 1):
            for kernel, works in self._plan:
                yield from self._samples_of(kernel, works, round)

    def _samples_of(self, kernel: Kernel, works: Sequence[Work], round: int) -> Iterator[Sample]:
        if not works:
            return
        before = self.ours.matrix_bytes
        calls_of = _MAKERS[kernel.kind](self, kernel)
        packed = self.ours.matrix_bytes - before
        runners = self._runners(kernel)
        first = round % len(runners)
        for one in works:
            calls = calls_of(one.m)
            turns = {runner: itertools.cycle(of_one) for runner, of_one in calls.items()}
            for runner in runners[first:] + runners[:first]:
                bandwidth = self._rate(self.bandwidth) if kernel.streams and one.m < MANY else None
                peak = self._rate(self.peak) if one.flops and one.m > FEW else None
                seconds = self._seconds(turns[runner], runner != OURS)
                moved = one.bytes
                if runner == OURS and one.weights:
                    moved += packed // len(calls[runner]) - one.weights
                if runner != "torch" and kernel.kind == "decode":
                    moved -= one.m * kernel.size[0] * self._spared()
                yield Sample(round, kernel.name, one.m, runner, seconds, moved, bandwidth, peak)

    def _runners(self, kernel: Kernel) -> tuple[str, ...]:
        return kernel.runners(is_quantised=self.ours.is_quantised)

    def _spared(self) -> int:
        """Bytes of a token's keys and values that are not read since the cache keeps them in fewer."""
        shape = self.shape
        whole = 2 * shape.kv_heads * shape.head_dim * self.dtype.itemsize
        return whole - self.ours.kv_bytes_per_token(shape.kv_heads, shape.head_dim, self.dtype)

    def draw(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float32).to(self.dtype)

    def copies(self, one: Tensor) -> list[Tensor]:
        """As many as it takes; a matrix that is large enough by itself stays alone."""
        return [one, *(one.clone() for _ in range(min(-(-self.effort.memory // one.nbytes), 512) - 1))]

    def cache_of(self, sets: Kernels, num_blocks: int) -> Any:
        """A KV cache that is written to throughout: pages that never were are all one page, and that is in a cache."""
        shape = self.shape
        cache = sets.kv_cache(num_blocks, BLOCK, shape.kv_heads, shape.head_dim, self.dtype)
        store = sets.heads(shape.heads, shape.kv_heads, shape.head_dim, None, None, _EPS, False, None)
        qkv = self.draw(128 * BLOCK, shape.qkv)
        for first in range(0, num_blocks, 128):
            blocks = range(first, min(num_blocks, first + 128))
            layout = Layout.build([(0, len(blocks) * BLOCK, blocks)], BLOCK)
            store(qkv[: layout.num_tokens], layout, cache)
        return cache

    def _seconds(self, calls: Iterator[Call], is_torch: bool) -> float:
        """Of one call, after one that wakes the threads and does not count."""
        torch.set_num_threads(self.threads if is_torch else 1)
        try:
            next(calls)()
            start = time.perf_counter()
            count, passed = 0, 0.0
            while passed < self.effort.seconds:
                next(calls)()
                count, passed = count + 1, time.perf_counter() - start
            return passed / count
        finally:
            if is_torch and self.threads > 1:
                torch.set_num_threads(1)
                time.sleep(_SETTLE)

    def _rate(self, probe: Probe) -> float:
        return probe.amount / self._seconds(probe.calls, probe.is_torch)

    def _best(self, probes: Sequence[Probe]) -> Probe:
        """In turn, so that all meet the same machine; the first time only brings in pages and code."""
        rates = [[self._rate(probe) for probe in probes] for _ in range(4)]
        best = [max(tries[1:]) for tries in zip(*rates, strict=True)]
        return probes[best.index(max(best))]

    def _reads(self) -> list[Probe]:
        """From a buffer of huge pages, if the system has them, a quarter at a time."""
        row = 1 << 20
        raw = mmap.mmap(-1, self.effort.memory)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            raw.madvise(mmap.MADV_HUGEPAGE)
        parts = torch.frombuffer(raw, dtype=torch.float32).fill_(1.0).view(4, -1, row)

        def probe(name: str, read: Callable[[Tensor], object], is_torch: bool) -> Probe:
            return Probe(name, itertools.cycle([partial(read, part) for part in parts]), parts[0].nbytes, is_torch)

        return [
            probe("our maximum of a buffer", self.ours.peaks, False),
            probe("torch's sum of a buffer", torch.sum, True),
        ]

    def _products(self) -> list[Probe]:
        """Ours of matrices that stay in the caches nearest, and torch's of a size that suits libraries."""
        m, k, n = 512, 1024, 512
        x, linear = self.draw(m, k), self.ours.linear([self.draw(n, k)], [None])
        side = 2048 if self.effort.seconds >= FULL.seconds else 512
        a, b = self.draw(side, side), self.draw(side, side)
        ours, plain = partial(linear, x), partial(functional.linear, a, b)
        return [
            Probe(f"our product {m}×{k}×{n}", itertools.repeat(ours), 2 * m * k * n, False),
            Probe(f"torch's product {side}×{side}×{side}", itertools.repeat(plain), 2 * side**3, True),
        ]


def _linear(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    k, n = kernel.size
    wide = kernel.kind == "output"
    weights = bench.copies(_matrix(bench, n, k))
    ours, twin = ([sets.linear([w], [None], wide=wide) for w in weights] for sets in (bench.ours, bench.twin))

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        out = functional.linear(x, weight)
        return out.float() if wide else out

    def calls(m: int) -> Calls:
        x = bench.draw(m, k)
        return {
            "ours": [partial(linear, x) for linear in ours],
            "torch": [partial(plain, x, weight) for weight in weights],
            "twin": [partial(linear, x) for linear in twin],
        }

    return calls


def _gated(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    k, n = kernel.size
    pairs = [(both[0], both[1]) for both in bench.copies(_matrix(bench, 2 * n, k).view(2, n, k))]
    ours, twin = ([sets.gated(gate, up, None, None, "silu") for gate, up in pairs] for sets in (bench.ours, bench.twin))

    def plain(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(functional.linear(x, gate)).mul_(functional.linear(x, up))

    def calls(m: int) -> Calls:
        x = bench.draw(m, k)
        return {
            "ours": [partial(gated, x) for gated in ours],
            "torch": [partial(plain, x, gate, up) for gate, up in pairs],
            "twin": [partial(gated, x) for gated in twin],
        }

    return calls


def _matrix(bench: Benchmark, n: int, k: int) -> Tensor:
    """The same rows again and again: drawing a whole output matrix would take longer than measuring with it."""
    return bench.draw(min(n, 4096), k).div_(k**0.5).repeat(-(-n // 4096), 1)[:n].contiguous()


def _decode(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    shape, [context] = bench.shape, kernel.size
    per_request = context * bench.ours.kv_bytes_per_token(shape.kv_heads, shape.head_dim, bench.dtype)
    most = max(kernel.rows(bench.effort.rows))
    requests = max(most, min(-(-bench.effort.memory // per_request), 512))
    # blocks in no order, as they are after an hour of serving
    tables = torch.randperm(requests * context // BLOCK).view(requests, -1)
    caches = {runner: bench.cache_of(sets, tables.numel()) for runner, sets in _sets(bench).items()}
    keys, values = (bench.draw(requests, shape.kv_heads, context, shape.head_dim) for _ in range(2))
    attend = functional.scaled_dot_product_attention

    def calls(m: int) -> Calls:
        q = bench.draw(m, shape.heads * shape.head_dim)
        parts = [slice(first, first + m) for first in range(0, requests - m + 1, m)]
        layouts = [Layout.build([(context - 1, 1, table) for table in tables[part]], BLOCK) for part in parts]
        mine = _attention(bench, q, layouts, caches)
        # no mask, so the heads of a group may be rows of one: torch is many times faster than with enable_gqa
        rows = q.view(m, shape.kv_heads, -1, shape.head_dim)
        return mine | {"torch": [partial(attend, rows, keys[part], values[part]) for part in parts]}

    return calls


def _prefill(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    shape = bench.shape

    def calls(m: int) -> Calls:
        blocks = -(-m // BLOCK)
        q = bench.draw(m, shape.heads * shape.head_dim)
        keys, values = (bench.draw(1, shape.kv_heads, m, shape.head_dim) for _ in range(2))
        caches = {runner: bench.cache_of(sets, blocks) for runner, sets in _sets(bench).items()}
        mine = _attention(bench, q, [Layout.build([(0, m, range(blocks))], BLOCK)], caches)
        by_head = q.view(1, m, shape.heads, shape.head_dim).transpose(1, 2).contiguous()
        attend = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return mine | {"torch": [partial(attend, by_head, keys, values)]}

    return calls


def _attention(bench: Benchmark, q: Tensor, layouts: Sequence[Layout], caches: dict[str, Any]) -> Calls:
    """What is derived from a layout is made beforehand: all layers of an iteration share it."""
    scale = bench.shape.head_dim**-0.5
    found: Calls = {}
    for runner, sets in _sets(bench).items():
        found[runner] = [partial(sets.attention, q, caches[runner], layout, scale=scale) for layout in layouts]
        for call in found[runner]:
            call()
    return found


def _heads(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    """Queries and keys are normed and rotated; up to 64 tokens of as many requests, more are one prompt."""
    shape, d = bench.shape, bench.shape.head_dim
    rotary = Rotary(1e6 ** -(torch.arange(0, d, 2) / d))
    norm = torch.ones(d, dtype=bench.dtype)

    def calls(m: int) -> Calls:
        decodes = [(256 + i % BLOCK, 1, [i] * (256 // BLOCK + 1)) for i in range(m)]
        blocks = range(-(-m // BLOCK))
        layout = Layout.build(decodes if m <= 64 else [(0, m, blocks)], BLOCK)
        qkv = bench.draw(m, shape.qkv)
        found: Calls = {}
        for runner, sets in _sets(bench).items():
            heads = sets.heads(shape.heads, shape.kv_heads, d, norm, norm, _EPS, False, rotary)
            found[runner] = [partial(heads, qkv, layout, bench.cache_of(sets, max(m, len(blocks))))]
        return found

    return calls


def _rms_norm(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    weight = torch.ones(bench.shape.hidden, dtype=bench.dtype)

    def calls(m: int) -> Calls:
        x = bench.draw(m, bench.shape.hidden)
        parts = {runner: sets.rms_norm(weight, _EPS, plus_one=False) for runner, sets in _sets(bench).items()}
        mine: Calls = {runner: [partial(part, x)] for runner, part in parts.items()}
        return mine | {"torch": [partial(functional.rms_norm, x, weight.shape, weight, _EPS)]}

    return calls


def _peaks(bench: Benchmark, kernel: Kernel) -> Callable[[int], Calls]:
    def calls(m: int) -> Calls:
        logits = bench.copies(torch.randn(m, bench.shape.vocab))
        mine: Calls = {runner: [partial(sets.peaks, one) for one in logits] for runner, sets in _sets(bench).items()}
        return mine | {"torch": [partial(torch.max, one, 1) for one in logits]}

    return calls


def _sets(bench: Benchmark) -> dict[str, Kernels]:
    return {"ours": bench.ours, "twin": bench.twin}


_MAKERS = {
    "linear": _linear,
    "output": _linear,
    "gated": _gated,
    "decode": _decode,
    "prefill": _prefill,
    "heads": _heads,
    "rms_norm": _rms_norm,
    "peaks": _peaks,
}
