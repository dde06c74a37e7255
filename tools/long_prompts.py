"""Streams that run beside long prompts, on a real server: the time between their tokens, by --max-itl.

    python tools/random_checkpoint.py medium DIR
    python tools/long_prompts.py DIR --max-itl 100

Streams begin, and from then on a long prompt comes every so many seconds. Servers of the same checkpoint, without a
limit, with the default one and with the one that is given, wait side by side and are measured in turn, and so are
others that are named by --beside. A prompt has 4000 tokens if our servers read that in half of the time until the next
one comes, else as many as they can. One that is not read until the end has waited until then, at least, and counts so.
Server and client want a core each; nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

from serving import Serving

from orcaserve.bench import client
from orcaserve.bench.client import INTERRUPTED, Record, Reply, Server, servers_from
from orcaserve.bench.measures import quantile
from orcaserve.bench.workloads import LOWEST_ID, Item

STREAM_PROMPT, LONGEST, OUTPUT = 64, 4000, 8
FREE = "none"
LEAD = 3.0  # seconds that streams have to begin


class Ids:
    """Prompts that no server has seen before. Owner of the chance in them."""

    def __init__(self, vocab: int, seed: int) -> None:
        self._rng = random.Random(seed)  # noqa: S311
        self._vocab = range(LOWEST_ID, vocab)

    def __call__(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.choices(self._vocab, k=count))


async def put(server: Server, items: Sequence[Item], seconds: float) -> list[Record]:
    """What came within so many seconds; streams that still run are cut off. Ends the program if another one failed."""
    replies = [Reply(item) for item in items]
    try:
        async with asyncio.timeout(seconds):
            await client.send(server, replies)
    except TimeoutError:
        pass
    records = [reply.record() for reply in replies]
    if failed := [record for record in records if record.error and record.error_kind != INTERRUPTED.kind]:
        raise SystemExit(
            f"{server.name}: {len(failed)} of {len(records)} requests failed; the first: {failed[0].error}"
        )
    return records


async def settle(server: Server, ids: Ids, every: float) -> int:
    """Warms a server up; the tokens of a prompt that it reads in half of `every` seconds, in hundreds."""
    length, seconds = 200, 0.0
    while True:
        [record] = await put(server, [Item(0.0, ids(length), 1)], 600)
        if record.error:
            raise SystemExit(f"{server.name} has not read {length} tokens in ten minutes")
        seconds = record.first - record.due
        if length >= LONGEST or seconds > every / 8:
            return max(100, min(LONGEST, int(length * every / 2 / seconds) // 100 * 100))
        length *= 2


def show(name: str, records: Sequence[Record], streams: int, span: tuple[float, float]) -> dict[str, float]:
    """Prints a row, and gives its figures. span: from when to when tokens count, in seconds."""
    began, ended = span
    gaps = [
        after - before
        for record in records[:streams]
        for before, after in itertools.pairwise(record.token_times)
        if began <= after <= ended
    ]
    read = [record for record in records[streams:] if record.token_times and record.first <= ended]
    output = sum(began <= time <= ended for record in records for time in record.token_times)
    waits = [(min(record.first, ended) if record.token_times else ended) - record.due for record in records[streams:]]
    figures = {
        "p50": 1e3 * (quantile(gaps, 0.5) or 0),
        "p99": 1e3 * (quantile(gaps, 0.99) or 0),
        "most": 1e3 * max(gaps),
        "tokens/s": (output + sum(record.prompt_tokens for record in read)) / (ended - began),
        "output/s": output / (ended - began),
        "ttft": quantile(waits, 0.5) or 0,
        "late": max(waits, default=0),
    }
    print(
        f"| {name} | {figures['p50']:.1f} | {figures['p99']:.1f} | {figures['most']:.1f} | {figures['tokens/s']:.0f} "
        f"| {figures['output/s']:.0f} | {len(read)} of {len(records) - streams} | {figures['ttft']:.2f} "
        f"| {figures['late']:.2f} |",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--max-itl", type=float, default=100.0, help="milliseconds")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two long prompts")
    parser.add_argument("--seconds", type=float, default=30.0, help="for which they come")
    parser.add_argument("--length", type=int, help="tokens of a long prompt; default: measured, see above")
    parser.add_argument("--context", type=int, default=4096, help="tokens that the model takes; streams use them all")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=URL", help="a server that is running")
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--threads", "1", "--kv-memory", "1GiB"])
    arguments = parser.parse_args()
    ids, count = Ids(arguments.vocab, arguments.seed), int(arguments.seconds / arguments.every)
    limit = f"{arguments.max_itl:g}"
    with tempfile.TemporaryDirectory() as folder:
        serving: dict[str, Serving] = {}
        try:
            for name, options in ((FREE, ["--max-itl", "0"]), ("default", []), (limit, ["--max-itl", limit])):
                serving[name] = Serving(
                    [arguments.checkpoint, *arguments.serve, *options], Path(folder) / f"{name}.jsonl"
                )
            servers = {
                name: client.in_loop(client.asked(Server(name, running.url))) for name, running in serving.items()
            }
            lengths = [client.in_loop(settle(server, ids, arguments.every)) for server in servers.values()]
            length = arguments.length or min(lengths)
            for other in servers_from(arguments.beside):
                servers[other.name] = client.in_loop(client.asked(other))
                client.in_loop(settle(servers[other.name], ids, arguments.every))
            print(
                f"{arguments.streams} streams; a prompt of {length} tokens every {arguments.every:g} s, {count} times\n"
            )
            print(
                "| max-itl | ITL p50, ms | p99 | greatest | tokens/s | of these generated | prompts read | TTFT p50, s "
                "| greatest |\n|---|---|---|---|---|---|---|---|---|"
            )
            span = (LEAD, LEAD + arguments.every * count)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
            for _ in range(arguments.rounds):
                for name, server in servers.items():
                    streams = [
                        Item(0.0, ids(STREAM_PROMPT), arguments.context - STREAM_PROMPT - 1)
                        for _ in range(arguments.streams)
                    ]
                    prompts = [Item(LEAD + arguments.every * i, ids(length), OUTPUT) for i in range(count)]
                    records = client.in_loop(put(server, [*streams, *prompts], span[1]))
                    found[name].append(show(name, records, arguments.streams, span))
        finally:
            for running in serving.values():
                running.close()
    off, on = (sum(one["tokens/s"] for one in found[name]) for name in (FREE, limit))
    late = max(one["p99"] for one in found[limit])
    print(
        f"\np99 is at most {late / arguments.max_itl:.2f} times the limit; throughput is {on / off:.1%} of that without"
    )


if __name__ == "__main__":
    main()
