"""Holds `orcaserve bench serve` against aiperf on a server whose delays are fixed, and both against those delays.

python tools/check_load.py AIPERF [--requests 200] [--rate 10] [--tokens 48]

AIPERF is its executable, of an environment of its own (`make clients` makes one). Request i of a run gets its first
token after 0.1 to 0.3 s and each further one after 10 to 18 ms, by i alone, so that every percentile is known; none of
TTFT and TPOT lies between two values, where tools differ in what they call it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import uvicorn
from serving import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from orcaserve.bench.measures import quantile
from orcaserve.builtin import MODEL_DIR

SHARES = (0.5, 0.9, 0.99)
NAMES = ("TTFT", "TPOT", "latency")


def delays(i: int) -> tuple[float, float]:
    """Seconds to request i's first token, and between two."""
    return 0.1 + 0.025 * (i % 9), 0.01 + 0.002 * (i % 7 % 5)


def serve(port: int, tokens: int) -> None:
    count = itertools.count()

    async def complete(request: Request) -> StreamingResponse:
        began = time.perf_counter()
        body = await request.json()
        return StreamingResponse(
            stream(began, *delays(next(count)), len(body["prompt"])), media_type="text/event-stream"
        )

    async def stream(began: float, first: float, step: float, prompt: int) -> AsyncIterator[str]:
        kind = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "fixed"}
        for i in range(tokens):
            await asyncio.sleep(began + first + i * step - time.perf_counter())
            yield f"data: {json.dumps(kind | {'choices': [{'index': 0, 'text': ' word', 'finish_reason': None}]})}\n\n"
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        yield f"data: {json.dumps(kind | {'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    async def models(_: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "fixed"}]})

    routes = [Route("/v1/completions", complete, methods=["POST"]), Route("/v1/models", models)]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="warning")


@contextlib.contextmanager
def fixed(tokens: int) -> Iterator[str]:
    """A server in a process of its own; its address."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(port, tokens))
    process.start()
    try:
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/v1/models")
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join()


def ours(args: argparse.Namespace, out: Path) -> dict[str, list[float]]:
    workload = f"poisson:rate={args.rate},in=32,out={args.tokens},n={args.requests}"
    with fixed(args.tokens) as url:
        command = [sys.executable, "-m", "orcaserve", "bench", "serve", "--url", url, "--vocab", "3072"]
        subprocess.run([*command, "--warm-up", "0", "--workload", workload, "--out", str(out)], check=True)  # noqa: S603
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for line in (out / "requests.jsonl").read_text().splitlines():
        record = json.loads(line)
        times = record["token_times"]
        found["TTFT"].append(times[0] - record["sent"])  # as aiperf has it: from sending, not from when it was due
        found["TPOT"].append((times[-1] - times[0]) / (len(times) - 1))
        found["latency"].append(times[-1] - record["sent"])
    return found


def theirs(args: argparse.Namespace, out: Path) -> dict[str, dict[str, float]]:
    with fixed(args.tokens) as url:
        words = [args.aiperf, "profile", "--ui", "none", "--streaming", "--url", url, "--model", "fixed"]
        words += ["--endpoint-type", "completions", "--tokenizer", str(MODEL_DIR), "--use-server-token-count"]
        words += ["--request-rate", str(args.rate), "--request-count", str(args.requests), "--artifact-dir", str(out)]
        words += ["--synthetic-input-tokens-mean", "32", "--synthetic-input-tokens-stddev", "0"]
        words += ["--output-tokens-mean", str(args.tokens), "--output-tokens-stddev", "0"]
        subprocess.run(words, check=True, stdout=sys.stderr)  # noqa: S603
    [path] = out.rglob("profile_export_aiperf.json")
    report = json.loads(path.read_text())
    of = dict(zip(NAMES, ("time_to_first_token", "inter_token_latency", "request_latency"), strict=True))
    return {
        name: {f"p{round(100 * share)}": report[key][f"p{round(100 * share)}"] / 1000 for share in SHARES}
        for name, key in of.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("aiperf")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mine, other = ours(args, Path(folder) / "ours"), theirs(args, Path(folder) / "theirs")
    true: dict[str, list[float]] = {name: [] for name in NAMES}
    for first, step in map(delays, range(args.requests)):
        true["TTFT"].append(first)
        true["TPOT"].append(step)
        true["latency"].append(first + (args.tokens - 1) * step)
    print(f"{'seconds':<14}{'fixed':>10}{'bench serve':>14}{'aiperf':>10}{'difference':>12}")
    worst = 0.0
    for name in NAMES:
        for share in SHARES:
            at = f"p{round(100 * share)}"
            a, b, c = quantile(true[name], share), quantile(mine[name], share), other[name][at]
            worst = max(worst, abs(b / c - 1))
            print(f"{name} {at:<{13 - len(name)}}{a:>10.5f}{b:>14.5f}{c:>10.5f}{100 * (b / c - 1):>11.2f}%")
    print(f"the largest difference between the two: {100 * worst:.2f} %")


if __name__ == "__main__":
    main()
