"""Serves one checkpoint under several policies in turn and sends each the paper's workload, over HTTP.

    python tools/compare_policies.py DIR --policies static,orca,default --rounds 2

Workload (Orca, section 6): prompts U(32,512), outputs U(1,128), no end token; `--concurrency` clients, each of which
sends its next request when its last one is answered. Prints one row per policy: wall time, output tokens per second,
median normalised latency, median time to first token, and the wall time relative to the first policy of the same round.
Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path

import msgspec
from serving import Serving

from orcaserve.bench import client, measures, workloads
from orcaserve.bench.client import Server
from orcaserve.bench.workloads import Work


def measure(arguments: argparse.Namespace, policy: str, work: Work) -> dict[str, float]:
    size = str(arguments.max_batch_size)
    serving = Serving([str(arguments.model), "--policy", policy, "--max-batch-size", size, *arguments.serve])
    try:
        server = Server(policy, serving.url, concurrency=arguments.concurrency)
        warm = workloads.make("decode-2", vocab=arguments.vocab, seed=99, round=0)
        asyncio.run(client.run(server, warm))
        records = asyncio.run(client.run(server, work))
    finally:
        serving.close()
    for record in records:
        if record.error or record.output_tokens != record.max_tokens:
            raise SystemExit(record.error or f"{record.output_tokens} tokens instead of {record.max_tokens}")
    # Each client sends its next request when its last one is answered: a request's own time begins then.
    own = [msgspec.structs.replace(record, due=record.sent) for record in records]
    return {
        "wall_s": measures.wall(records),
        "output_tokens_per_s": measures.output_rate(records),
        "median_normalised_latency_s": measures.normalised_latency(own),
        "median_ttft_s": measures.ttft(own, 0.5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--policies", default="static,default")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="further options of `orcaserve serve`")
    arguments = parser.parse_args()
    arguments.vocab = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    work = workloads.make("trace", vocab=arguments.vocab, seed=arguments.seed, round=0, requests=arguments.requests)
    total_in, total_out = sum(len(item.prompt_ids) for item in work.items), sum(item.max_tokens for item in work.items)
    at_a_time = arguments.concurrency
    print(f"{arguments.requests} requests, {total_in} prompt and {total_out} output tokens, {at_a_time} at a time")
    policies = arguments.policies.split(",")
    runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    for _ in range(arguments.rounds):
        for policy in policies:
            print(policy, file=sys.stderr)
            runs[policy].append(measure(arguments, policy, work))
            print(f"  {runs[policy][-1]['wall_s']:.1f} s", file=sys.stderr)
    print("| policy | wall s | output tok/s | median s/token | median TTFT s | wall / first |")
    print("|---|---|---|---|---|---|")
    for policy, measured in runs.items():
        keys = ("wall_s", "output_tokens_per_s", "median_normalised_latency_s", "median_ttft_s")
        cells = [f"{statistics.median(run[key] for run in measured):.3g}" for key in keys]
        ratio = statistics.median(
            run["wall_s"] / first["wall_s"] for run, first in zip(measured, runs[policies[0]], strict=True)
        )
        print(f"| {policy} | {' | '.join(cells)} | {ratio:.2f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main()
