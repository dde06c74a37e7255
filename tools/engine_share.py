"""How near a whole server comes to the limits of its machine: memory for decodes, arithmetic for Orca's trace.

    python tools/random_checkpoint.py qwen3-0.6b DIR
    python tools/engine_share.py DIR [--quantization int8]

In each round the server does decode-1, decode-16 and the trace of `bench compare` over HTTP, and then the kernels of a
layer are measured beside the ceilings of the machine, with the server idle. Prints, as medians of the rounds' shares:

- bytes of weights that a token of decode-1 reads, times tokens a second, over the read bandwidth;
- time of the products of an iteration of sixteen rows, by the time that decode-16 takes for one;
- time of the trace's products at the peak, by the time it took; and with the time that reading keys, values and the
  weights of iterations without a prompt takes at that bandwidth, which is the nearer limit where memory is slow;
- the most anonymous memory of all the server's processes while the trace ran.

Nothing else should run on the machine. Kernels and ceilings are those of unquantised weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from serving import Serving

from orcaserve.bench import client, measures, workloads
from orcaserve.bench.client import Record, Server
from orcaserve.bench.kernels import OURS, SHAPES, Sample
from orcaserve.bench.workloads import Work
from orcaserve.ops.benchmark import Benchmark, Effort

PRODUCTS = ("qkv", "o", "gated", "down")  # of a layer


def anonymous(pid: int) -> int:
    """Bytes of a process and all below it that lie in no file."""
    total = 0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
    return total


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """What `anonymous` says, twice a second."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            seen.append(anonymous(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def of_layer(samples: list[Sample], m: int, layers: int, field: str) -> float:
    """Sum over the products of all layers at m rows."""
    chosen = [s for s in samples if s.runner == OURS and s.m == m and s.kernel.split()[0] in PRODUCTS]
    return layers * sum(float(getattr(s, field)) for s in chosen)


def output(samples: list[Sample], m: int) -> Sample:
    [found] = [s for s in samples if s.runner == OURS and s.m == m and s.kernel.startswith("output")]
    return found


def shares(
    samples: list[Sample], layers: int, token: int, logits: int, kv_token: int, records: dict[str, list[Record]]
) -> dict[str, float]:
    """token: FLOPs of a token in all layers; logits: of one that samples; kv_token: bytes that one leaves in the KV."""
    bandwidth = statistics.median(s.bandwidth for s in samples if s.bandwidth is not None)
    peak = statistics.median(s.peak for s in samples if s.peak is not None)
    one, sixteen = measures.decode_rate(records["decode-1"]), measures.decode_rate(records["decode-16"])
    if one is None or sixteen is None:
        raise SystemExit("a decode took no time")
    read = of_layer(samples, 1, layers, "bytes") + output(samples, 1).bytes
    products = of_layer(samples, 16, layers, "seconds") + output(samples, 16).seconds
    trace = records["trace"]
    generated = sum(r.output_tokens for r in trace)
    prompts = sum(r.prompt_tokens for r in trace)
    floor = ((prompts + generated) * token + generated * logits) / peak
    contexts = sum(r.output_tokens * (r.prompt_tokens + r.output_tokens / 2) for r in trace)
    memory = (generated / 16 * read + contexts * kv_token) / bandwidth
    wall = measures.wall(trace)
    return {
        "read bandwidth, GB/s": bandwidth / 1e9,
        "peak, GFLOP/s": peak / 1e9,
        "decode-1, tokens/s": one,
        "decode-1: weights read, share of the bandwidth": read * one / bandwidth,
        "decode-16, tokens/s": sixteen,
        "decode-16: products, share of an iteration": products * sixteen / 16,
        "trace, s": wall,
        "trace: products at the peak, share of its time": floor / wall,
        "trace: prompts at the peak and decodes at the bandwidth, share": (prompts * token / peak + memory) / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-memory", default="2GiB")
    known, options = parser.parse_known_args()
    config = json.loads((known.checkpoint / "config.json").read_text())
    shape, layers = SHAPES[known.shape], int(config["num_hidden_layers"])
    across = shape.heads * shape.head_dim
    token = 2 * layers * shape.hidden * (shape.qkv + across + 3 * shape.mlp)
    logits = 2 * shape.hidden * shape.vocab
    kv_token = 2 * 2 * layers * shape.kv_heads * shape.head_dim
    bench = Benchmark(shape, torch.bfloat16, known.threads, None, Effort((1, 16, 512), 320 << 20, 0.02))
    server = Serving([str(known.checkpoint), "--max-batch-size", "16", "--kv-memory", known.kv_memory, *options])
    found: list[dict[str, float]] = []
    most = 0
    try:
        asked = client.in_loop(client.asked(Server("ours", server.url)))

        def do(name: str, round: int) -> list[Record]:
            work: Work = workloads.make(name, vocab=shape.vocab, seed=1, round=round, requests=32)
            records = client.in_loop(client.run(asked, work))
            if bad := [r.error for r in records if r.error]:
                raise SystemExit(bad[0])
            return records

        do("trace", 0)  # so that memory has been touched and code is there
        for round in range(1, known.rounds + 1):
            records = {name: do(name, round) for name in ("decode-1", "decode-16")}
            with watched(server.pid) as seen:
                records["trace"] = do("trace", round)
            most = max(most, *seen)
            time.sleep(0.5)
            samples = [s for s in bench.samples(1) if s.runner == OURS]
            found.append(shares(samples, layers, token, logits, kv_token, records))
            print(f"round {round}:", ", ".join(f"{key} {value:.3g}" for key, value in found[-1].items()), flush=True)
    finally:
        server.close()
    for key in found[0]:
        print(f"{key}: {statistics.median(one[key] for one in found):.3g}")
    print(f"anonymous memory of all processes, at most: {most / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
