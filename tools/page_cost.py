"""What the live page costs: tokens a second without it, and with one or twenty who look on, in turn.

    python tools/page_cost.py --rounds 250

Two servers of one checkpoint wait side by side: one keeps no events for the page, the other is as it always is. A round
is the same burst of requests for each kind, the order turned from round to round; those who look on come just before a
burst and leave after it. Engines have one core, and all that is not an engine another: which two of three processes
share a core would else be drawn anew for every burst. Said are the median rate of tokens, and by the server without the
page the mean of the rounds' ratios, of the rates and of the seconds that the engine's process computed, with their 95 %
intervals (Student's t, of logarithms). Bursts are short: the pace of a shared machine differs by a tenth from second to
second and from minute to minute alike, and only many pairs average that out. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
from serving import Serving

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
KINDS = {"without the page": -1, "one looks on": 1, "twenty look on": 20}
T95 = 2.09  # Student's t for 20 rounds; for more it is a little less


def engine_of(serving: Serving) -> psutil.Process:
    [engine] = psutil.Process(serving.pid).children()
    return engine


def place(serving: Serving) -> None:
    """The engine on the second core, the rest on the first."""
    for pid, core in ((engine_of(serving).pid, 1), (serving.pid, 0)):
        for thread in psutil.Process(pid).threads():
            os.sched_setaffinity(thread.id, {core})


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


async def measure(server: Server, engine: psutil.Process, work: Work, count: int) -> tuple[float, float]:
    """Of one burst: output tokens a second, and seconds that the engine computed."""
    async with watched(server.url, count) as got:
        before, spent = list(got), engine.cpu_times()
        records = await client.run(server, work)
        now = engine.cpu_times()
        if any(after == then for after, then in zip(got, before, strict=True)):
            raise SystemExit("somebody who looked on saw nothing")
    for record in records:
        if record.error or record.output_tokens != record.max_tokens:
            raise SystemExit(record.error or f"{record.output_tokens} tokens instead of {record.max_tokens}")
    return measures.output_rate(records) or 0.0, now.user + now.system - spent.user - spent.system


def ratio(values: list[float], base: list[float]) -> str:
    logs = [math.log(value / other) for value, other in zip(values, base, strict=True)]
    mean = statistics.mean(logs)
    half = T95 * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(mean):.3f} ({math.exp(mean - half):.3f}–{math.exp(mean + half):.3f})"


def said(name: str, found: dict[str, list[tuple[float, float]]]) -> str:
    rates, seconds = map(list, zip(*found[name], strict=True))
    base_rates, base_seconds = map(list, zip(*found["without the page"], strict=True))
    return f"| {name} | {statistics.median(rates):.0f} | {ratio(rates, base_rates)} | {ratio(seconds, base_seconds)} |"


async def rounds(arguments: argparse.Namespace, running: dict[str, Serving]) -> dict[str, list[tuple[float, float]]]:
    work = spec.make(arguments.workload, vocab=arguments.vocab, seed=arguments.seed)
    servers = {name: await client.usable(Server(name, one.url), work) for name, one in running.items()}
    engines = {name: engine_of(one) for name, one in running.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    names = list(KINDS)
    for number in range(arguments.rounds):
        turn = number % len(names)
        order = names[turn:] + names[:turn]
        for name in order if number // len(names) % 2 == 0 else reversed(order):
            which = "without" if KINDS[name] < 0 else "with"
            found[name].append(await measure(servers[which], engines[which], work, KINDS[name]))
        print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--workload", default="burst:in=16,out=32,n=64")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write every rate as JSON")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--threads", "1", "--max-batch-size", "64"])
    arguments = parser.parse_args()
    if arguments.rounds < 20:
        parser.error("an interval takes 20 rounds or more")
    running: dict[str, Serving] = {}
    try:
        for name, program in (("without", ("-c", WITHOUT)), ("with", ("-m", "orcaserve"))):
            running[name] = Serving(arguments.serve, program=program)
            place(running[name])
        os.sched_setaffinity(0, {0})
        found = client.in_loop(rounds(arguments, running))
    finally:
        for one in running.values():
            one.close()
    print("| | output tokens/s, median | by the one without the page | seconds of the engine by the one without |")
    print("|---|---|---|---|")
    for name in found:
        print(said(name, found))
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
