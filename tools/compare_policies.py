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
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx


def workload(count: int, vocab_size: int, seed: int) -> list[tuple[list[int], int]]:
    rng = random.Random(seed)  # noqa: S311
    return [
        ([rng.randrange(300, vocab_size) for _ in range(rng.randint(32, 512))], rng.randint(1, 128))
        for _ in range(count)
    ]


async def ask(client: httpx.AsyncClient, prompt: list[int], output: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds to the last, tokens received."""
    body = {"prompt": prompt, "max_tokens": output, "ignore_eos": True, "temperature": 0, "stream": True}
    body |= {"return_token_ids": True}
    start = time.perf_counter()
    first, tokens = 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            new = len(chunk["choices"][0].get("token_ids") or ())
            if new and not tokens:
                first = time.perf_counter() - start
            tokens += new
    return first, time.perf_counter() - start, tokens


async def load(url: str, requests: list[tuple[list[int], int]], concurrency: int) -> list[tuple[float, float, int]]:
    todo = iter(requests)
    results = []
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:  # noqa: S113

        async def one_client() -> None:
            for prompt, output in todo:
                results.append(await ask(client, prompt, output))
                print(f"\r  {len(results)}/{len(requests)} requests", end="", file=sys.stderr, flush=True)
                if results[-1][2] != output:
                    raise RuntimeError(f"{results[-1][2]} tokens instead of {output}")

        await asyncio.gather(*(one_client() for _ in range(concurrency)))
    print(file=sys.stderr)
    return results


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(arguments: argparse.Namespace, policy: str, requests: list[tuple[list[int], int]]) -> dict[str, float]:
    port = free_port()
    command = [sys.executable, "-m", "orcaserve", "serve", str(arguments.model), "--port", str(port)]
    command += ["--policy", policy, "--max-batch-size", str(arguments.max_batch_size), *arguments.serve]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            if server.poll() is not None:
                raise SystemExit(f"the server ended with exit code {server.returncode}")
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        asyncio.run(load(url, workload(2, arguments.vocab, 99), 2))  # warm
        start = time.perf_counter()
        results = asyncio.run(load(url, requests, arguments.concurrency))
        wall = time.perf_counter() - start
    finally:
        server.terminate()
        server.wait(60)
    tokens = sum(count for _, _, count in results)
    return {
        "wall_s": wall,
        "output_tokens_per_s": tokens / wall,
        "median_normalised_latency_s": statistics.median(last / count for _, last, count in results),
        "median_ttft_s": statistics.median(first for first, _, _ in results),
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
    requests = workload(arguments.requests, arguments.vocab, arguments.seed)
    total_in, total_out = sum(len(prompt) for prompt, _ in requests), sum(output for _, output in requests)
    print(
        f"{len(requests)} requests, {total_in} prompt and {total_out} output tokens, {arguments.concurrency} at a time"
    )
    policies = arguments.policies.split(",")
    runs: dict[str, list[dict[str, float]]] = {policy: [] for policy in policies}
    for _ in range(arguments.rounds):
        for policy in policies:
            print(policy, file=sys.stderr)
            runs[policy].append(measure(arguments, policy, requests))
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
