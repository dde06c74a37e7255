"""Measures a GPU's limits, and its kernels one by one against them.

What a real run reads from memory is read from memory here: weights, keys and values come in so many copies, used in
turn, that no cache still holds one when its turn comes. Data are random: zeros would be multiplied faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from orcaserve.bench.gpu.plan import Decode, Plan
from orcaserve.bench.gpu.report import Line
from orcaserve.bench.gpu.roofline import Card
from orcaserve.bench.kernels import Kernel, Shape, kernels, work
from orcaserve.ops.gpu.kernels import PagedCache, TritonKernels
from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.pieces import Cutter
from orcaserve.ops.gpu.quantised import Code
from orcaserve.ops.gpu.sampling import Scratch, Wishes, sample
from orcaserve.ops.gpu.stopwatch import Call, Stopwatch
from orcaserve.ops.kernels import KVCache
from orcaserve.ops.rotary import Rotary

BLOCK = 64  # tokens of a block of the KV cache
DTYPE = torch.bfloat16
_EPS = 1e-6
_WISHES = {
    "greatest": {"temperature": 0.0, "top_p": 1.0},
    "draw": {"temperature": 0.6, "top_p": 1.0},
    "draw with top_p": {"temperature": 0.6, "top_p": 0.95},
}
_READ = 8192  # int32 values of a program that only reads


@triton.jit
def _read_kernel(source, greatest, BLOCK: tl.constexpr):
    """The greatest of each BLOCK int32 values: reads all, writes next to nothing."""
    block = tl.program_id(0)
    values = tl.load(source + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(greatest + block, tl.max(values, 0))


def measure_card(device: torch.device, watch: Stopwatch, plan: Plan) -> tuple[Card, list[Line]]:
    """What the card can do: bytes copied and read a second, and products."""
    source = torch.empty(plan.memory // 2, dtype=DTYPE, device=device).normal_()
    target = torch.empty_like(source)
    # A copy in a graph is the copy engines' affair, which are slower than a kernel.
    copies = {
        "copy of {}, read and written": partial(target.copy_, source),
        "copy of {} by a kernel": partial(torch.mul, source, 1, out=target),
    }
    copied = {what: 2 * source.nbytes / watch.call_seconds([call], plan.samples) for what, call in copies.items()}
    words = source.view(torch.int32)
    programs = (words.shape[0] // _READ,)
    ours = partial(_read_kernel[programs], words, target.view(torch.int32), BLOCK=_READ, num_warps=8)
    floats = target.view(torch.float32).normal_()
    reads = {
        "read of {}": source.nbytes / watch.call_seconds([ours], plan.samples),
        "read of {} by torch's sum": source.nbytes / watch.call_seconds([partial(torch.sum, floats)], plan.samples),
    }
    del source, target, words, floats, ours, copies
    side = plan.side
    a, b = (torch.empty(side, side, dtype=DTYPE, device=device).normal_() for _ in range(2))
    seconds = watch.call_seconds([partial(torch.matmul, a, b)], plan.samples)
    flops = 2 * side**3 / seconds
    size = f"{plan.memory / 2**30:.3g} GiB"
    return Card(max(copied.values()), max(reads.values()), flops), [
        *(Line(what=what.format(size), rate=rate / 1e9, unit="GB/s") for what, rate in (copied | reads).items()),
        Line(what=f"torch's product {side}×{side}×{side}", seconds=seconds, rate=flops / 1e12, unit="TFLOP/s"),
    ]


def device_layout(
    parts: Sequence[tuple[int, int, Sequence[int]]], block_size: int, cutter: Cutter, device: torch.device
) -> DeviceLayout:
    """From (start, number of tokens, block table) of each request."""
    starts, counts = (np.array([part[field] for part in parts]) for field in range(2))
    firsts = np.cumsum(counts) - counts
    seats = np.repeat(np.arange(len(parts)), counts)
    positions = np.concatenate([np.arange(start, start + count) for start, count, _ in parts])
    tables = np.zeros((len(parts), max(len(table) for _, _, table in parts)), np.int32)
    for seat, (_, _, table) in enumerate(parts):
        tables[seat, : len(table)] = table
    slots = tables[seats, positions // block_size] * block_size + positions % block_size
    tiles = cutter.cut(firsts, counts, starts, np.arange(len(parts)))

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

    return DeviceLayout(
        *map(on_device, (positions, slots, seats, tables)), block_size, *map(on_device, (tiles, np.array([len(tiles)])))
    )


@dataclass(frozen=True)
class Benchmark:
    """Kernels and what they are measured against."""

    kernels: TritonKernels
    watch: Stopwatch
    plan: Plan
    card: Card

    def lines(self) -> Iterator[Line]:
        """Everything in turn. What raises is said in a line of its own, and the others are measured all the same."""
        for what, measure in self._works():
            try:
                with torch.inference_mode():
                    line = measure(what)
            except Exception as error:
                line = Line(what=what, note=f"{type(error).__name__}: {error}"[:300], wrong=True)
            yield line

    def _works(self) -> Iterator[tuple[str, Callable[[str], Line]]]:
        plan, shape = self.plan, self.plan.linear
        for decode in plan.decodes:
            heads = f"{decode.heads}/{decode.kv_heads} heads"
            kept = "" if decode.kv_dtype == "auto" else f", KV {decode.kv_dtype}"
            yield f"decode of {decode.batch} at {decode.context}, {heads}{kept}", partial(self._decode, decode)
        heads = f"{shape.heads}/{shape.kv_heads} heads"
        yield f"prefill of {plan.prompt}, {heads}", self._prefill
        products = {kernel.kind + kernel.name: kernel for kernel in kernels(shape)}.values()
        for kernel in (one for one in products if one.kind in ("linear", "gated", "output")):
            for m in plan.rows:
                if kernel.kind != "output" or m <= max(plan.sampled):
                    yield f"{kernel.name}, {m} rows", partial(self._product, kernel, m)
                if m <= max(plan.sampled):
                    codes: tuple[Code, ...] = ("int8",) if kernel.kind == "output" else ("int8", "int4")
                    for code in codes:
                        yield f"{kernel.name} in {code}, {m} rows", partial(self._coded_product, kernel, m, code)
        for m in (1, max(plan.sampled), max(plan.rows)):
            yield f"rms_norm with residual, {m} rows of {shape.hidden}", partial(self._rms_norm, m)
            yield f"heads (norm, rotate, store), {m} rows", partial(self._heads, m)
        for rows in plan.sampled:
            for how, wish in _WISHES.items():
                yield f"{how} of {shape.vocab}, {rows} rows", partial(self._sample, wish, rows)

    def _line(
        self, what: str, calls: Sequence[Call], moved: float, flops: float, others: dict[str, Sequence[Call]]
    ) -> Line:
        seconds = self.watch.call_seconds(calls, self.plan.samples)
        beside = {name: self.watch.call_seconds(theirs, self.plan.samples) for name, theirs in others.items()}
        if flops / self.card.flops > moved / self.card.bandwidth:
            rate, limit, unit = flops / seconds / 1e12, self.card.flops / 1e12, "TFLOP/s"
        else:
            rate, limit, unit = moved / seconds / 1e9, self.card.bandwidth / 1e9, "GB/s"
        return Line(what=what, seconds=seconds, rate=rate, unit=unit, limit=limit, beside=beside)

    def _draw(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPE, device=self.kernels.device)

    def _copies(self, size: int) -> int:
        """Of something of `size` bytes."""
        return max(1, min(64, -(-self.plan.rotated // size)))

    def _cache(self, num_blocks: int, kv_heads: int, kernels: TritonKernels | None = None) -> KVCache:
        kernels = self.kernels if kernels is None else kernels
        cache = kernels.kv_cache(num_blocks, BLOCK, kv_heads, self.plan.head_dim, DTYPE)
        fill(cache)
        return cache

    def _decode(self, of: Decode, what: str) -> Line:
        d, device = self.plan.head_dim, self.kernels.device
        kernels = TritonKernels(device, max_positions=of.context, kv_dtype=of.kv_dtype)
        shape = Shape("", 0, 0, of.heads, of.kv_heads, d, 0)
        size = work(shape, Kernel("decode", "", (of.context,)), of.batch, DTYPE.itemsize)
        saved = 2 * of.kv_heads * d * DTYPE.itemsize - kernels.kv_bytes_per_token(of.kv_heads, d, DTYPE)
        moved = size.bytes - of.batch * of.context * saved
        cutter = kernels.cutter(of.heads, of.kv_heads, d, DTYPE)
        kernels.reserve(cutter.most_dealt * -(-of.context // SPAN), of.heads, d)
        blocks = -(-of.context // BLOCK)
        copies = self._copies(moved)
        cache = self._cache(copies * of.batch * blocks, of.kv_heads, kernels)
        # in no order, as blocks are after an hour of serving
        tables = torch.randperm(copies * of.batch * blocks).view(copies, of.batch, blocks).tolist()
        q = self._draw(of.batch, of.heads * d)
        calls: list[Call] = []
        for some in tables:
            parts = [(of.context - 1, 1, table) for table in some]
            layout = device_layout(parts, BLOCK, cutter, device)
            calls.append(partial(kernels.attention, q, cache, layout, scale=d**-0.5))
        return self._line(what, calls, moved, size.flops, {})

    def _prefill(self, what: str) -> Line:
        shape, m, d = self.plan.linear, self.plan.prompt, self.plan.head_dim
        of = work(shape, Kernel("prefill", ""), m, DTYPE.itemsize)
        blocks = -(-m // BLOCK)
        cache = self._cache(blocks, shape.kv_heads)
        cutter = self.kernels.cutter(shape.heads, shape.kv_heads, d, DTYPE)
        layout = device_layout([(0, m, range(blocks))], BLOCK, cutter, self.kernels.device)
        self.kernels.reserve(cutter.most_dealt * -(-m // SPAN), shape.heads, d)
        q = self._draw(m, shape.heads * d)
        call = partial(self.kernels.attention, q, cache, layout, scale=d**-0.5)
        by_head = q.view(1, m, shape.heads, d).transpose(1, 2).contiguous()
        k, v = (self._draw(1, shape.kv_heads, m, d) for _ in range(2))
        attend = partial(functional.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        return self._line(what, [call], of.bytes, of.flops, {"torch": [partial(attend, by_head, k, v)]})

    def _product(self, kernel: Kernel, m: int, what: str) -> Line:
        k, n = kernel.size
        matrices = 2 if kernel.kind == "gated" else 1
        of = work(self.plan.linear, kernel, m, DTYPE.itemsize)
        weights = [self._draw(matrices * n, k).mul_(k**-0.5) for _ in range(self._copies(of.weights))]
        x = self._draw(m, k)
        if kernel.kind == "gated":
            pairs = [weight.chunk(2) for weight in weights]
            ours = [self.kernels.gated(gate, up, None, None, "silu") for gate, up in pairs]
            torchs: list[Call] = [partial(_gated, x, weight) for weight in weights]
        else:
            ours = [self.kernels.linear([w], [None], wide=kernel.kind == "output") for w in weights]
            torchs = [partial(functional.linear, x, weight) for weight in weights]
        return self._line(what, [partial(one, x) for one in ours], of.bytes, of.flops, {"torch": torchs})

    def _coded_product(self, kernel: Kernel, m: int, code: Code, what: str) -> Line:
        k, n = kernel.size
        of = work(self.plan.linear, kernel, m, DTYPE.itemsize)
        kernels = TritonKernels(self.kernels.device, quantization=code, max_positions=1)
        x = self._draw(m, k)
        calls: list[Call] = []
        kept = 0  # bytes of one
        while not calls or len(calls) < self._copies(kept):
            first, *second = (self._draw(n, k).mul_(k**-0.5) for _ in range(2 if kernel.kind == "gated" else 1))
            if second:
                one = kernels.gated(first, *second, None, None, "silu")
            else:
                one = kernels.linear([first], [None], wide=kernel.kind == "output")
            calls.append(partial(one, x))
            kept = kernels.matrix_bytes // len(calls)
        return self._line(what, calls, of.bytes - of.weights + kept, of.flops, {})

    def _rms_norm(self, m: int, what: str) -> Line:
        hidden = self.plan.linear.hidden
        weight = self._draw(hidden)
        norm = self.kernels.rms_norm(weight, _EPS, plus_one=False)
        x, residual = self._draw(m, hidden), self._draw(m, hidden)

        def plain() -> Tensor:
            return residual + functional.rms_norm(x, weight.shape, weight, _EPS)

        moved = 3 * m * hidden * DTYPE.itemsize
        return self._line(what, [partial(norm, x, residual)], moved, 0, {"torch": [plain]})

    def _heads(self, m: int, what: str) -> Line:
        """Queries and keys are normed and rotated; of a prompt, but for a single row."""
        shape, d = self.plan.linear, self.plan.head_dim
        weight = torch.ones(d, dtype=DTYPE, device=self.kernels.device)
        rotary = Rotary(1e6 ** -(torch.arange(0, d, 2) / d))
        heads = self.kernels.heads(shape.heads, shape.kv_heads, d, weight, weight, _EPS, False, rotary)
        blocks = -(-m // BLOCK)
        cache = self._cache(blocks, shape.kv_heads)
        cutter = self.kernels.cutter(shape.heads, shape.kv_heads, d, DTYPE)
        layout = device_layout([(0, m, range(blocks))], BLOCK, cutter, self.kernels.device)
        qkv = self._draw(m, shape.qkv)
        return self._line(what, [partial(heads, qkv, layout, cache)], 2 * qkv.nbytes, 0, {})

    def _sample(self, wish: dict[str, float], rows: int, what: str) -> Line:
        device, vocab = self.kernels.device, self.plan.linear.vocab

        def every(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        wishes = Wishes(
            bases=torch.arange(rows, device=device),
            positions=every(800, torch.int32),
            temperatures=every(wish["temperature"], torch.float32),
            top_k=every(0, torch.int32),
            top_p=every(wish["top_p"], torch.float32),
            min_p=every(0.0, torch.float32),
        )
        scratch, tokens = Scratch.make(rows, vocab, device), torch.empty(rows, dtype=torch.int32, device=device)
        logits = torch.randn(rows, vocab, device=device).mul_(4)
        copies = [logits.clone() for _ in range(self._copies(logits.nbytes))]
        restricts = wish["top_p"] < 1
        calls = [partial(sample, one, wishes, tokens, scratch, truncates=restricts) for one in copies]
        plain = _greatest if wish["temperature"] == 0 else partial(_drawn, wish["temperature"])
        others = {} if restricts else {"torch": [partial(plain, one) for one in copies]}
        return self._line(what, calls, logits.nbytes, 0, others)


def fill(cache: KVCache) -> None:
    """Random values everywhere in a cache that nobody has written to, whatever it keeps them in."""
    if not isinstance(cache, PagedCache):
        raise TypeError(f"{type(cache).__name__} is no cache of a GPU")
    for values in (cache.k, cache.v):
        if cache.scales is None:
            values.normal_()
        else:
            values.random_(-127, 128)
    if cache.scales is not None:
        cache.scales.uniform_(0.0, 2 / 127)


def _gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = functional.linear(x, weight).chunk(2, dim=1)
    return functional.silu(gate) * up


def _greatest(logits: Tensor) -> Tensor:
    return logits.argmax(1)


def _drawn(temperature: float, logits: Tensor) -> Tensor:
    """As engines draw whose noise need not be the same again."""
    shares = (logits / temperature).softmax(1)
    return (shares / torch.empty_like(shares).exponential_()).argmax(1)
