"""What the live page costs: tokens a second without it, and with nobody, one or twenty who look on, in turn.

    python tools/page_cost.py --rounds 40

Two servers of one checkpoint wait side by side: one keeps no events for the page, the other is as it always is. A round
is the same burst of requests for each kind, the order turned from round to round; those who look on come just before a
burst and leave after it. Said are the medians, and by the server without the page the mean of the rounds' ratios with
its 95 % interval (Student's t, of logarithms). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import httpx
from compare_policies import free_port

from orcaserve.bench import client, measures
from orcaserve.bench.client import Server
from orcaserve.bench.workloads import Work, spec

# `orcaserve serve` whose pool writes down nothing for the page.
WITHOUT = """
from orcaserve.serve import server
pool = server.Pool
server.Pool = lambda *rest, **named: pool(*rest, **{**named, "timeline": None})
from orcaserve.cli import main
main()
"""
KINDS = {"without the page": -1, "nobody looks on": 0, "one looks on": 1, "twenty look on": 20}
T95 = 2.09  # Student's t for 20 rounds; for more it is a little less


class Running:
    """A server; owner of its process. program: what Python runs."""

    def __init__(self, *program: str, options: list[str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, *program, "serve", *options, "--port", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
        while not self._is_ready():
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {self._process.returncode}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


@asynccontextmanager
async def watched(url: str, count: int) -> AsyncIterator[list[int]]:
    """So many read the feed meanwhile; gives how many bytes each has got."""
    got = [0] * max(0, count)

    async def look(session: aiohttp.ClientSession, place: int) -> None:
        async with session.get(f"{url}/page/events") as response:
            async for data in response.content.iter_any():
                got[place] += len(data)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        looking = [asyncio.create_task(look(session, place)) for place in range(len(got))]
        while not all(got) and not any(task.done() for task in looking):
            await asyncio.sleep(0.01)  # the first event is what there is already
        yield got
        for task in looking:
            task.cancel()
        for ended in await asyncio.gather(*looking, return_exceptions=True):
            if not isinstance(ended, asyncio.CancelledError):
                raise SystemExit(f"somebody who looked on was cut off: {ended}")


async def measure(server: Server, work: Work, count: int) -> float:
    """Output tokens a second of one burst."""
    async with watched(server.url, count) as got:
        before = list(got)
        records = await client.run(server, work)
        if any(now == then for now, then in zip(got, before, strict=True)):
            raise SystemExit("somebody who looked on saw nothing")
    for record in records:
        if record.error or record.output_tokens != record.max_tokens:
            raise SystemExit(record.error or f"{record.output_tokens} tokens instead of {record.max_tokens}")
    return measures.output_rate(records) or 0.0


def said(name: str, rates: list[float], base: list[float]) -> str:
    logs = [math.log(rate / other) for rate, other in zip(rates, base, strict=True)]
    mean = statistics.mean(logs)
    half = T95 * statistics.stdev(logs) / math.sqrt(len(logs))
    ratio = "1" if rates is base else f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f}–{math.exp(mean + half):.3f})"
    return f"| {name} | {statistics.median(rates):.0f} | {min(rates):.0f}–{max(rates):.0f} | {ratio} |"


async def rounds(arguments: argparse.Namespace, urls: dict[str, str]) -> dict[str, list[float]]:
    work = spec.make(arguments.workload, vocab=arguments.vocab, seed=arguments.seed)
    servers = {name: await client.usable(Server(name, url), work) for name, url in urls.items()}
    found: dict[str, list[float]] = {name: [] for name in KINDS}
    names = list(KINDS)
    for number in range(arguments.rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number // len(names) % 2 == 0 else reversed(order):
            server = servers["without" if KINDS[name] < 0 else "with"]
            found[name].append(await measure(server, work, KINDS[name]))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--workload", default="burst:in=16,out=64,n=64")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write every rate as JSON")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--threads", "1", "--max-batch-size", "64"])
    arguments = parser.parse_args()
    if arguments.rounds < 20:
        parser.error("an interval takes 20 rounds or more")
    running: dict[str, Running] = {}
    try:
        for name, program in (("without", ("-c", WITHOUT)), ("with", ("-m", "orcaserve"))):
            running[name] = Running(*program, options=arguments.serve)
        urls = {name: one.url for name, one in running.items()}
        found = client.in_loop(rounds(arguments, urls))
    finally:
        for one in running.values():
            one.close()
    print("| | output tokens/s, median | lowest and highest | by the one without the page |")
    print("|---|---|---|---|")
    for name, rates in found.items():
        print(said(name, rates, found["without the page"]))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
