"""Puts a server under more load than it can bear, and says what became of the requests.

    python tools/overload.py [MODEL] [-- options of serve]

Starts `orcaserve serve` pinned to one core; this program keeps off it. Measures how many requests a second the server
can answer (a closed loop of `--clients`), then sends Poisson arrivals at 1, 2, 5 and 10 times that rate, `--seconds`
each, whatever is answered. Each request says by when its first token is due (x-slo-ttft-ms), unless `--silent`.

Goodput counts responses whose first token came within `--ttft`, from when the request was due, and whose tokens came at
`--tpot` each or faster. A refusal's time is from when it was sent until all of it was there. After each load a request
is sent every quarter of a second: all is normal again with the first of three in a row whose first token takes at most
twice as long as on the idle server, and 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import httpx
import msgspec
from compare_policies import free_port

from orcaserve.bench import client, measures
from orcaserve.bench.client import Record, Reply, Server
from orcaserve.bench.workloads import Item, Work, spec

PROBE_SECONDS = 0.25
NORMAL_IN_A_ROW = 3
PATIENCE = 60.0  # seconds after which a server that is not normal again is given up


class Row(NamedTuple):
    """What came of one load."""

    factor: float
    sent: int
    answered: int
    good: int
    refusals: list[float]
    expired: int
    server_errors: int
    others: int
    recovery: float | None
    late: float
    client_cpu: float


def work(arguments: argparse.Namespace, rate: float, count: int, seed: int) -> Work:
    text = f"poisson:rate={rate:.4f},in={arguments.prompt},out={arguments.output},n={count}"
    return spec.make(text, vocab=arguments.vocab, seed=seed)


async def capacity(arguments: argparse.Namespace, server: Server) -> float:
    """Requests a second that are answered while every client sends the next one when the last one is answered."""
    closed = msgspec.structs.replace(server, concurrency=arguments.clients)
    count = 4 * arguments.clients
    while True:
        items = [msgspec.structs.replace(item, at=0.0) for item in work(arguments, 1, count, seed=count).items]
        records = await client.run(closed, Work("capacity", "load", tuple(items)))
        if wrong := next((record.error for record in records if record.error), None):
            raise SystemExit(f"the server cannot do the workload: {wrong}")
        ends = sorted(record.last for record in records)
        if ends[-1] >= arguments.seconds / 2:
            # While the last ones end the server is not busy any more.
            busy = [end for end in ends[: -arguments.clients] if end > ends[0]]
            return len(busy) / (busy[-1] - ends[0])
        count *= 2


async def first_token(server: Server, item: Item, headers: dict[str, str]) -> float | None:
    """Seconds to the first token of a request that is sent now; None if it is refused."""
    reply = Reply(item)
    await client.send(server, [reply], headers=headers)
    record = reply.record()
    return None if record.error or not record.token_times else record.first - record.due


async def recovery(server: Server, items: list[Item], headers: dict[str, str], normal: float) -> float | None:
    """Seconds from now until requests are answered as by an idle server; None: it takes too long."""
    began = time.perf_counter()
    since: float | None = None
    in_a_row = 0
    for item in items:
        sent = time.perf_counter() - began
        seconds = await first_token(server, item, headers)
        if seconds is None or seconds > normal:
            in_a_row, since = 0, None
        else:
            in_a_row, since = in_a_row + 1, sent if since is None else since
        if in_a_row == NORMAL_IN_A_ROW:
            return since
        if sent > PATIENCE:
            break
        await asyncio.sleep(max(0.0, sent + PROBE_SECONDS - (time.perf_counter() - began)))
    return None


async def overload(arguments: argparse.Namespace, server: Server, rate: float, factor: float, normal: float) -> Row:
    headers = {} if arguments.silent else {"x-slo-ttft-ms": f"{1000 * arguments.ttft:.0f}"}
    replies = [
        Reply(item)
        for item in work(arguments, factor * rate, int(2 * factor * rate * arguments.seconds), int(factor * 1000)).items
        if item.at <= arguments.seconds
    ]
    probes = [msgspec.structs.replace(item, at=0.0) for item in work(arguments, 1, 300, seed=7).items]
    cpu = time.process_time()
    load = asyncio.create_task(client.send(server, replies, headers=headers))
    await asyncio.sleep(arguments.seconds)
    cpu = (time.process_time() - cpu) / arguments.seconds
    recovered = await recovery(server, probes, headers, normal)
    await load
    return summed(factor, [reply.record() for reply in replies], recovered, cpu, arguments)


def summed(
    factor: float, records: list[Record], recovered: float | None, cpu: float, arguments: argparse.Namespace
) -> Row:
    limits = {"ttft": arguments.ttft, "tpot": arguments.tpot}
    kinds = [record.error_kind for record in records]
    refused = [record for record in records if record.error_kind == "HTTP 429"]
    server_errors = sum(kind is not None and kind.startswith("HTTP 5") for kind in kinds)
    answered, expired = kinds.count(None), kinds.count("HTTP 408")
    return Row(
        factor=factor,
        sent=len(records),
        answered=answered,
        good=sum(measures.meets(record, limits) for record in records),
        refusals=[(record.ended or record.sent) - record.sent for record in refused],
        expired=expired,
        server_errors=server_errors,
        others=len(records) - answered - len(refused) - expired - server_errors,
        recovery=recovered,
        late=measures.quantile([record.sent - record.due for record in records], 0.99) or 0.0,
        client_cpu=cpu,
    )


def show(rows: list[Row], seconds: float) -> None:
    peak = max(row.good for row in rows) / seconds
    print("| load | sent/s | answered/s | goodput/s | of peak | 429 | p50 | p99 | 408 | 5xx | other | normal after |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        p50, p99 = (measures.quantile(row.refusals, share) for share in (0.5, 0.99))
        cells = (
            f"{row.factor:g} ×",
            f"{row.sent / seconds:.1f}",
            f"{row.answered / seconds:.2f}",
            f"{row.good / seconds:.2f}",
            f"{row.good / seconds / peak:.0%}" if peak else "—",
            f"{len(row.refusals)}",
            "—" if p50 is None else f"{1000 * p50:.1f} ms",
            "—" if p99 is None else f"{1000 * p99:.1f} ms",
            f"{row.expired}",
            f"{row.server_errors}",
            f"{row.others}",
            "never" if row.recovery is None else f"{row.recovery:.1f} s",
        )
        print(f"| {' | '.join(cells)} |")
    print(
        f"\nThe client sent requests {1000 * max(row.late for row in rows):.0f} ms late (p99) at the worst load, ",
        end="",
    )
    print(f"and took {max(row.client_cpu for row in rows):.0%} of a core.")


async def drive(arguments: argparse.Namespace, url: str) -> None:
    server = await client.asked(Server("orcaserve", url))
    idle_items = work(arguments, 1, 5, seed=1).items
    waits = [await first_token(server, msgspec.structs.replace(item, at=0.0), {}) for item in idle_items]
    idle = statistics.median([wait for wait in waits if wait is not None])
    rate = await capacity(arguments, server)
    print(
        f"capacity {rate:.2f} requests/s with {arguments.clients} clients; first token of an idle server {idle:.3f} s"
    )
    print(f"prompts {arguments.prompt}, outputs {arguments.output} tokens; {arguments.seconds:g} s each; ", end="")
    print(f"goodput: ttft ≤ {arguments.ttft:g} s, tpot ≤ {arguments.tpot:g} s\n", flush=True)
    rows = []
    for factor in arguments.factors:
        rows.append(await overload(arguments, server, rate, factor, 2 * idle + 0.05))
        print(f"{factor:g} × done", file=sys.stderr, flush=True)
    show(rows, arguments.seconds)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="orcaserve-tiny")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--factors", type=lambda text: [float(part) for part in text.split(",")], default=[1, 2, 5, 10])
    parser.add_argument("--ttft", type=float, default=1.0)
    parser.add_argument("--tpot", type=float, default=0.2)
    parser.add_argument("--prompt", default="32-256", help="tokens, as in the workloads of bench serve")
    parser.add_argument("--output", default="64-256")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop that measures the capacity")
    parser.add_argument("--vocab", type=int, default=3072)
    parser.add_argument("--core", type=int, default=0, help="where the server runs")
    parser.add_argument("--silent", action="store_true", help="requests do not say by when they are wanted")
    parser.add_argument("serve", nargs="*", help="after --: options of orcaserve serve")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse()
    port = free_port()
    pinned = ["taskset", "-c", str(arguments.core)]
    command = [*pinned, sys.executable, "-m", "orcaserve", "serve", arguments.model, "--port", str(port)]
    command += ["--threads", "1", "--log-level", "warning", *arguments.serve]
    if others := os.sched_getaffinity(0) - {arguments.core}:
        os.sched_setaffinity(0, others)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        url = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        else:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        client.in_loop(drive(arguments, url))
    finally:
        process.terminate()
        process.wait(60)
