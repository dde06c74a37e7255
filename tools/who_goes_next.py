"""Compares orders in virtual time: who waits how long, and what it costs the others.

    python tools/who_goes_next.py --azure azure_2023_conversation.csv --rounds 3

One H100 with Llama 3 8B by data sheets, batches of at most 64 requests and 512 tokens. Loads are shares of what the
engine does in a second of the same requests when all are there from the start. A round has its own part of the trace,
or its own seed. Figures are means over the rounds, with the least and the greatest where rounds differ by more than a
tenth.

  trace     a part of Azure's conversation trace at 90 % load, one tenant: latencies, and the longest wait
  flood     one tenant sends everything at once, another a request now and then: what the polite one sees;
            every invariant is checked after every step, so that this takes minutes
  urgent    a fifth of the requests has priority 0, the others 1, at 95 % load in bursts
  due       first tokens are due after 1, 5 or 60 seconds, at 95 % load in bursts
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from orcaserve.bench.measures import quantile
from orcaserve.bench.workloads import traces
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import parse_policy
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.sim.hardware import Parallel, derive, hardware, kv_tokens
from orcaserve.sim.run import Arrival, Record, simulate
from orcaserve.sim.shape import ModelShape

BLOCK = 16
SHAPE = ModelShape(
    name="8B", layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, matrices=3
)
Figures = dict[str, float]


class Engine:
    """What all runs have in common."""

    def __init__(self, max_batch_size: int, blocks: int | None) -> None:
        device, parallel = hardware("H100"), Parallel()
        self.cost = derive(device, SHAPE, parallel)
        self.max_batch_size = max_batch_size
        self.num_blocks = blocks or kv_tokens(device, SHAPE, parallel) // BLOCK

    def run(
        self, policy: str, arrivals: Sequence[Arrival], scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler
    ) -> list[Record]:
        config = SchedulerConfig(
            policy=parse_policy(policy),
            max_batch_size=self.max_batch_size,
            max_batch_tokens=512,
            num_blocks=self.num_blocks,
            block_size=BLOCK,
        )
        cost = self.cost.noisy(0)
        return simulate(arrivals, config, cost, self.cost.host, keep_iterations=False, scheduler=scheduler)[0]

    def at_load(self, arrivals: Sequence[Arrival], load: float) -> list[Arrival]:
        """The same requests, stretched over the time in which the engine does `load` of what it can."""
        records = self.run("default", [msgspec.structs.replace(arrival, time=0.0) for arrival in arrivals])
        seconds = max(record.token_times[-1] for record in records)
        factor = seconds / load / max(arrival.time for arrival in arrivals)
        return [msgspec.structs.replace(arrival, time=arrival.time * factor) for arrival in arrivals]


def waits(records: Sequence[Record]) -> list[float]:
    return [record.token_times[0] - record.arrival for record in records]


def rate(records: Sequence[Record]) -> float:
    """Output tokens a second, until the last one."""
    return sum(len(record.token_times) for record in records) / max(record.token_times[-1] for record in records)


def p99(values: Sequence[float]) -> float:
    return quantile(list(values), 0.99) or 0.0


def bursts(rng: random.Random, count: int) -> list[Arrival]:
    """Lengths as in Azure's conversations (log-normal; Azure 2023: median 1020 and 129), Gamma gaps of cv 2."""
    time, found = 0.0, []
    for _ in range(count):
        time += rng.gammavariate(0.25, 4.0)
        prompt = min(4096, max(1, round(rng.lognormvariate(6.93, 0.8))))
        output = min(1024, max(1, round(rng.lognormvariate(4.86, 1.0))))
        found.append(Arrival(time, prompt, output))
    return found


def trace(engine: Engine, arguments: argparse.Namespace, number: int) -> Callable[[str], Figures]:
    rows = traces.azure(arguments.azure)[number * arguments.requests : (number + 1) * arguments.requests]
    begin = rows[0].at
    arrivals = engine.at_load(
        [Arrival(row.at - begin, row.input_length, max(1, row.output_length)) for row in rows], arguments.load
    )

    def run(policy: str) -> Figures:
        records = engine.run(policy, arrivals)
        latencies = [record.latency for record in records]
        return {
            "latency, mean": statistics.mean(latencies),
            "p50": quantile(latencies, 0.5) or 0.0,
            "p99": p99(latencies),
            "TTFT, mean": statistics.mean(waits(records)),
            "longest wait": max(waits(records)),
            "tokens/s": rate(records),
        }

    return run


def flood(engine: Engine, arguments: argparse.Namespace, number: int) -> Callable[[str], Figures]:
    rng = random.Random(f"flood {number}")  # noqa: S311
    many = [msgspec.structs.replace(one, time=0.0, tenant="flood") for one in bursts(rng, arguments.requests // 4)]
    polite, time = [], 0.0
    for one in bursts(rng, 60):
        time += rng.expovariate(2.0)
        polite.append(msgspec.structs.replace(one, time=time, tenant="polite"))
    alone = p99(waits(engine.run("default", polite)))
    both = sorted([*many, *polite], key=lambda arrival: arrival.time)

    def run(policy: str) -> Figures:
        kept: list[CheckedScheduler] = []

        def checked(config: SchedulerConfig) -> CheckedScheduler:
            kept.append(CheckedScheduler(config))
            return kept[0]

        records = engine.run(policy, both, checked)
        own = [record for record, arrival in zip(records, both, strict=True) if arrival.tenant == "polite"]
        seen = {"polite TTFT p99": p99(waits(own)), "over alone": p99(waits(own)) / alone, "tokens/s": rate(records)}
        gap = kept[0].gap
        return seen | ({} if gap is None else {"gap": gap.widest, "bound": gap.bound})

    return run


def urgent(engine: Engine, arguments: argparse.Namespace, number: int) -> Callable[[str], Figures]:
    rng = random.Random(f"urgent {number}")  # noqa: S311
    arrivals = engine.at_load(
        [msgspec.structs.replace(one, priority=int(rng.random() > 0.2)) for one in bursts(rng, arguments.requests)],
        0.95,
    )

    def run(policy: str) -> Figures:
        records = engine.run(policy, arrivals)
        by = {
            level: [record for record, arrival in zip(records, arrivals, strict=True) if arrival.priority == level]
            for level in (0, 1)
        }
        return {
            "TTFT p99 of 0": p99(waits(by[0])),
            "of 1": p99(waits(by[1])),
            "latency, mean, of 0": statistics.mean(record.latency for record in by[0]),
            "of 1 ": statistics.mean(record.latency for record in by[1]),
            "tokens/s": rate(records),
        }

    return run


def due(engine: Engine, arguments: argparse.Namespace, number: int) -> Callable[[str], Figures]:
    rng = random.Random(f"due {number}")  # noqa: S311
    arrivals = engine.at_load(
        [
            msgspec.structs.replace(one, deadline=rng.choice([1.0, 5.0, 60.0]))
            for one in bursts(rng, arguments.requests)
        ],
        0.95,
    )

    def run(policy: str) -> Figures:
        records = engine.run(policy, arrivals)
        met: dict[float, list[bool]] = {1.0: [], 5.0: [], 60.0: []}
        for record, arrival in zip(records, arrivals, strict=True):
            within = arrival.deadline or 0.0
            met[within].append(record.token_times[0] - record.arrival <= within)
        shares = {f"met of {within:g} s, %": 100 * statistics.mean(of) for within, of in met.items()}
        everything = [one for of in met.values() for one in of]
        return {"deadlines met, %": 100 * statistics.mean(everything), **shares, "tokens/s": rate(records)}

    return run


WORKLOADS: dict[str, tuple[Callable[[Engine, argparse.Namespace, int], Callable[[str], Figures]], list[str]]] = {
    "trace": (
        trace,
        [
            "default",
            "shortest",
            "shortest,preempt=true",
            "shortest,guard=0.5",
            "shortest,guard=2",
            "shortest,output=1",
            "shortest,output=32",
            "mlfq",
            "mlfq,preempt=false",
        ],
    ),
    "flood": (flood, ["default", "fair", "fair,weights=flood:1+polite:4", "shortest"]),
    "urgent": (urgent, ["default", "priority", "priority,preempt=false", "priority,ageing=inf"]),
    "due": (due, ["default", "deadline", "deadline,preempt=true", "shortest"]),
}


def cell(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    shown = f"{mean:.3g}" if abs(mean) < 1000 else f"{mean:.0f}"
    if max(values) - min(values) <= 0.1 * abs(mean):
        return shown
    return f"{shown} ({min(values):.3g} … {max(values):.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--azure", type=Path, help="the trace, for the workload of that name")
    parser.add_argument("--workloads", default="trace,flood,urgent,due")
    parser.add_argument("--policies", help="joined by +; default: those that a workload is about")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--load", type=float, default=0.9, help="of the trace")
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--blocks", type=int, help="KV blocks; default: what fits")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    engine = Engine(arguments.max_batch_size, arguments.blocks)
    for name in arguments.workloads.split(","):
        if name == "trace" and arguments.azure is None:
            continue
        make, policies = WORKLOADS[name]
        policies = arguments.policies.split("+") if arguments.policies else policies
        rounds = [make(engine, arguments, number) for number in range(arguments.rounds)]
        print(f"\n{name}: {arguments.rounds} rounds", flush=True)
        head: list[str] = []
        for policy in policies:
            seen = [run(policy) for run in rounds]
            if not head:
                head = list(seen[0])
                print(f"| policy | {' | '.join(head)} | … |\n|{'---|' * (len(head) + 2)}")
            cells = [f"{'' if key in head else key + ' '}{cell([one[key] for one in seen])}" for key in seen[0]]
            print(f"| {policy} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
