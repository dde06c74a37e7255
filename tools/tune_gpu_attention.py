"""Times attention on a GPU under all that changes speed and no bits: stages, rows, and how many tiles there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import torch

from orcaserve.bench.gpu.plan import FULL, Decode
from orcaserve.ops.gpu.attention import Scratch, Tuning, attention, concurrent_programs
from orcaserve.ops.gpu.benchmark import BLOCK, device_layout
from orcaserve.ops.gpu.layout import SPAN
from orcaserve.ops.gpu.pieces import Cutter
from orcaserve.ops.gpu.stopwatch import Stopwatch, stopwatch

D = 128
DECODES = (*FULL.decodes, Decode(256, 800, 32, 8))


STAGES = (2, 3, 4)
SHARES = (0.5, 1.0, 2.0, 4.0)  # of what the programs that run at a time can take each: as if there were more of them


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
    group = of.heads // of.kv_heads
    usual = Tuning.of(D, group, q.dtype)
    programs = concurrent_programs(device)
    scratch = Scratch.empty(of.batch * -(-of.context // SPAN), of.heads, D, device)
    tables = torch.randperm(num_blocks).view(copies, of.batch, blocks).tolist()
    print(f"decode of {of.batch} at {of.context}, {of.heads}/{of.kv_heads} heads")
    for share, stages in itertools.product(SHARES, STAGES):
        cutter = Cutter(usual.tile_tokens(group), of.kv_heads, int(programs * share))
        layouts = [
            device_layout([(of.context - 1, 1, table) for table in some], BLOCK, cutter, device) for some in tables
        ]
        tuning = replace(usual, stages=stages)
        calls = [partial(attention, q, k, v, one, scratch, scale=D**-0.5, tuning=tuning) for one in layouts]
        seconds = watch.call_seconds(calls, 10)
        count, rate = layouts[0].tiles.shape[0], num_bytes / seconds / 1e9
        print(f"  {count} tiles ({share} x), {stages} stages: {1e6 * seconds:.1f} us, {rate:.0f} GB/s", flush=True)


def time_prefill(m: int, heads: int, kv_heads: int, watch: Stopwatch, device: torch.device) -> None:
    blocks = -(-m // BLOCK)
    k, v = (torch.randn(blocks, kv_heads, BLOCK, D, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(m, heads * D, dtype=torch.bfloat16, device=device)
    scratch = Scratch.empty(1, heads, D, device)
    flops = 4 * m * m / 2 * heads * D
    for rows, stages in itertools.product((64, 128, 256), STAGES):
        tuning = Tuning(stages, rows)
        cutter = Cutter(tuning.tile_tokens(heads // kv_heads), kv_heads, concurrent_programs(device))
        try:
            layout = device_layout([(0, m, range(blocks))], BLOCK, cutter, device)
            seconds = watch.call_seconds(
                [partial(attention, q, k, v, layout, scratch, scale=D**-0.5, tuning=tuning)], 5
            )
        except Exception as error:
            print(f"prefill of {m}: {rows} rows, {stages} stages: {error}"[:120])
            continue
        print(f"prefill of {m}: {rows} rows, {stages} stages: {flops / seconds / 1e12:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    main()
