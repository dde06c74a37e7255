"""Times attention on a GPU under every `Tuning` worth trying: what changes speed and no bits. Takes half a minute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from orcaserve.bench.gpu.plan import FULL, Decode
from orcaserve.ops.gpu.attention import Scratch, Tuning, attention
from orcaserve.ops.gpu.benchmark import BLOCK, device_layout
from orcaserve.ops.gpu.layout import SPAN, DeviceLayout
from orcaserve.ops.gpu.stopwatch import Stopwatch, stopwatch

D = 128
DECODES = (*FULL.decodes, Decode(256, 800, 32, 8))
Call = Callable[[], Tensor]


def tunings() -> Iterator[Tuning]:
    for stages, programs in itertools.product((2, 3, 4), (1, 2, 3, 4)):
        if stages * programs <= 9:  # what the memory of a processor holds
            yield Tuning(decode_stages=stages, decode_programs=programs)


def main() -> None:
    device = torch.device("cuda")
    watch = stopwatch(device)
    for decode in DECODES:
        time_decode(decode, watch, device)
    time_prefill(FULL.prompt, 32, 8, watch, device)


def time_decode(of: Decode, watch: Stopwatch, device: torch.device) -> None:
    num_bytes = 2 * 2 * of.batch * of.context * of.kv_heads * D
    copies, blocks = max(1, (256 << 20) // num_bytes), -(-of.context // BLOCK)
    num_blocks = copies * of.batch * blocks
    k, v = (torch.randn(num_blocks, of.kv_heads, BLOCK, D, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(of.batch, of.heads * D, dtype=torch.bfloat16, device=device)
    scratch = Scratch.empty(of.batch * -(-of.context // SPAN), of.heads, D, device)
    tables = torch.randperm(num_blocks).view(copies, of.batch, blocks).tolist()
    layouts = [
        device_layout([(of.context - 1, 1, table) for table in some], BLOCK, of.heads // of.kv_heads, D, device)
        for some in tables
    ]

    def calls(tuning: Tuning) -> list[Call]:
        return [partial(attention, q, k, v, one, scratch, scale=D**-0.5, tuning=tuning) for one in layouts]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda tuning: calls(tuning)[0](), tunings()))
    found = {one: watch.call_seconds(calls(one), 10) for one in tunings()}
    print(f"decode of {of.batch} at {of.context}, {of.heads}/{of.kv_heads} heads")
    for one, seconds in sorted(found.items(), key=lambda pair: pair[1])[:6]:
        rate = num_bytes / seconds / 1e9
        print(f"  {one.decode_stages} stages, {one.decode_programs} programs: {1e6 * seconds:.1f} us, {rate:.0f} GB/s")
    usual = found.get(Tuning())
    print(f"  as it is: {1e6 * usual:.1f} us" if usual else "", flush=True)


def time_prefill(m: int, heads: int, kv_heads: int, watch: Stopwatch, device: torch.device) -> None:
    blocks = -(-m // BLOCK)
    k, v = (torch.randn(blocks, kv_heads, BLOCK, D, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(m, heads * D, dtype=torch.bfloat16, device=device)
    scratch = Scratch.empty(1, heads, D, device)
    flops = 4 * m * m / 2 * heads * D
    for rows, stages in itertools.product((64, 128, 256), (2, 3, 4)):
        tuning = Tuning(prefill_rows=rows, prefill_stages=stages)
        try:
            layout = _prompt(m, blocks, heads // kv_heads, tuning, device)
            seconds = watch.call_seconds(
                [partial(attention, q, k, v, layout, scratch, scale=D**-0.5, tuning=tuning)], 5
            )
        except Exception as error:
            print(f"prefill of {m}: {rows} rows, {stages} stages: {error}"[:120])
            continue
        print(f"prefill of {m}: {rows} rows, {stages} stages: {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)


def _prompt(m: int, blocks: int, group: int, tuning: Tuning, device: torch.device) -> DeviceLayout:
    return device_layout([(0, m, range(blocks))], BLOCK, group, D, device, tuning)


if __name__ == "__main__":
    main()
