"""Two tenants on a real server: one sends everything at once, the other a request now and then. Who gets what.

    python tools/random_checkpoint.py medium DIR
    python tools/two_tenants.py DIR --rounds 4

Servers of the same checkpoint with --policy default and fair wait side by side and are measured in turn, and so are
others that are named by --beside. A round is the same requests for each; the polite tenant's alone come first, on the
server that is fair. Both servers' step logs are replayed in the end by a scheduler that checks every invariant, which
also tells the service gap between the tenants beside its bound. Server and client want a core each; nothing else should
run on the machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
from serving import Serving

from orcaserve.bench import client, measures
from orcaserve.bench.client import Record, Server, servers_from
from orcaserve.bench.workloads import Item, Work, spec
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.step_log import read
from orcaserve.sim.replay import replay

POLICIES = ("default", "fair")
FLOOD, POLITE = "flood", "polite"
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31)  # Student's t, 95 %, for 2 to 9 rounds


def items(text: str, tenant: str, arguments: argparse.Namespace, seed: int) -> list[Item]:
    work = spec.make(text, vocab=arguments.vocab, seed=seed)
    return [msgspec.structs.replace(item, tenant=tenant) for item in work.items]


def measure(server: Server, requests: Sequence[Item]) -> list[Record]:
    work = Work("tenants", "load", tuple(sorted(requests, key=lambda item: item.at)))
    records = client.in_loop(client.run(server, work))
    for record in records:
        if record.error:
            raise SystemExit(f"{server.name}: {record.error}")
    return records


def first_tokens(records: Sequence[Record], tenant: str) -> list[float]:
    return measures.times("ttft", [record for record in records if record.tenant == tenant])


def seconds(values: Sequence[float]) -> str:
    return " | ".join(f"{measures.quantile(list(values), share) or 0:.2f}" for share in (0.5, 0.99))


def interval(ratios: Sequence[float]) -> str:
    mean = statistics.mean(ratios)
    if len(ratios) - 2 not in range(len(T95)):
        return f"{mean:.1%}"
    half = T95[len(ratios) - 2] * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{mean:.1%} (95 %: {mean - half:.1%} to {mean + half:.1%})"


def checked(path: Path) -> str:
    """What replaying a step log under all invariants says."""
    made: list[CheckedScheduler] = []

    def scheduler(config: SchedulerConfig) -> CheckedScheduler:
        made.append(CheckedScheduler(config))
        return made[-1]

    [log] = read(path.read_bytes())
    batches = replay(log, scheduler)
    gap = made[0].gap
    said = f"{len(batches)} batches replayed, every invariant kept"
    return said if gap is None else f"{said}; service gap at most {gap.widest:.0f}, bound {gap.bound:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--flood", default="burst:in=32-256,out=32-96,n=60", help="a workload")
    parser.add_argument("--polite", default="poisson:rate=0.5,in=256,out=16,n=20", help="a workload")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=URL", help="a server that is running")
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--threads", "1", "--kv-memory", "1GiB"])
    arguments = parser.parse_args()
    seen: dict[str, list[list[Record]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / f"{name}.jsonl" for name in POLICIES}
        with ExitStack() as stack:
            servers = list(servers_from(arguments.beside))
            for name, log in logs.items():
                running = Serving([arguments.checkpoint, *arguments.serve, "--policy", name], log)
                stack.callback(running.close)
                servers.insert(0, Server(name, running.url))
            warm = spec.make("burst:in=200,out=20,n=4", vocab=arguments.vocab, seed=99)
            servers = [client.in_loop(client.usable(server, warm)) for server in servers]
            alone: list[float] = []
            print(f"flood: {arguments.flood}; polite: {arguments.polite}\n")
            print("| round | server | polite TTFT p50, s | p99 | flood's p50 | p99 | tokens/s |")
            print("|---|---|---|---|---|---|---|")
            for number in range(1, arguments.rounds + 1):
                seed = arguments.seed + 10 * number
                flood = items(arguments.flood, FLOOD, arguments, seed)
                polite = items(arguments.polite, POLITE, arguments, seed + 1)
                found = first_tokens(measure(servers[0], items(arguments.polite, POLITE, arguments, seed + 2)), POLITE)
                print(f"| {number} | polite alone | {seconds(found)} | | | |")
                alone += found
                for server in servers:
                    records = measure(server, [*flood, *polite])
                    seen.setdefault(server.name, []).append(records)
                    shown = " | ".join(seconds(first_tokens(records, tenant)) for tenant in (POLITE, FLOOD))
                    print(f"| {number} | {server.name} | {shown} | {measures.total_rate(records):.0f} |", flush=True)
        print(f"\npolite alone: TTFT p50 and p99 {seconds(alone)} s")
        base = measures.quantile(alone, 0.99) or math.nan
        for name, rounds in seen.items():
            waits = [wait for records in rounds for wait in first_tokens(records, POLITE)]
            print(f"{name}: polite TTFT p50 and p99 {seconds(waits)} s; p99 {quantile99(waits) / base:.2f} times alone")
        rates = {name: [measures.total_rate(records) or 0.0 for records in rounds] for name, rounds in seen.items()}
        pairs = zip(rates["fair"], rates["default"], strict=True)
        print(f"fair by default, tokens/s: {interval([fair / default for fair, default in pairs])}")
        for name, log in logs.items():
            print(f"{name}: {checked(log)}")


def quantile99(values: Sequence[float]) -> float:
    return measures.quantile(list(values), 0.99) or math.nan


if __name__ == "__main__":
    main()
