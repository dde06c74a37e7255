"""Compares limits on the time of iterations that read prompts beside streams, in virtual time.

    python tools/time_limits.py --cost cost.json --max-itl 50,100,200

Prints a row for each limit under each load: none; so many milliseconds (--max-itl); so many times what the decodes
beside the prompts take alone (--times); the same, times the number of requests that wait and one (--elastic). Loads are
a burst, and shares of the requests a second that the burst came to without a limit. The cost is one that `orcaserve
simulate fit` wrote, or a device's and model's data sheets.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from orcaserve.bench import simulation
from orcaserve.bench.measures import quantile
from orcaserve.bench.simulation import Fitted
from orcaserve.bench.workloads import spec
from orcaserve.core.pace import Pace
from orcaserve.core.policy import DEFAULT
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.model.shape import read_shape
from orcaserve.sim.cost import CostModel
from orcaserve.sim.executor import SimExecutor, VirtualClock
from orcaserve.sim.hardware import Parallel, derive, hardware
from orcaserve.sim.run import Arrival, Record, World

BLOCK = 16
VOCAB = 16000
LENGTHS = ("in=32-512,out=1-128,n=300", "in=1000,out=100-300,n=120", "in=2000-4000,out=20-80,n=60")


class Relative(Pace):
    """Iterations that read prompts take at most so many times what their decodes take alone."""

    def __init__(self, times: float, scheduler: Scheduler) -> None:
        super().__init__(1.0, scheduler.config.depth)
        self._times = times
        self._scheduler = scheduler

    def _left(self, alone: float) -> float:
        return (self._times - 1) * alone


class Elastic(Relative):
    """The more wait, the longer."""

    def _left(self, alone: float) -> float:
        return (self._times * (1 + len(self._scheduler.waiting)) - 1) * alone


Limit = Callable[[Scheduler], Pace | None]


def run(arrivals: Sequence[Arrival], config: SchedulerConfig, cost: CostModel, limit: Limit, seed: int) -> list[Record]:
    """As `sim.run.simulate`, with this limit."""
    clock = VirtualClock()
    world = World(arrivals, clock)
    scheduler = Scheduler(config)
    scheduler.budget.pace = limit(scheduler)
    executor = SimExecutor(cost.noisy(seed), clock, cost.host, world.sample)
    loop = EngineLoop(scheduler, executor, world, world, clock)
    while world.is_open:
        loop.step()
    return world.records()


def row(name: str, arrivals: Sequence[Arrival], records: Sequence[Record], best: float | None) -> float:
    """Prints a limit's figures; gives its seconds in all. best: those without a limit."""
    seconds = max(record.token_times[-1] for record in records) - arrivals[0].time
    tokens = sum(arrival.num_prompt + arrival.num_output for arrival in arrivals)
    gaps = [b - a for record in records for a, b in itertools.pairwise(record.token_times)]
    first = [record.token_times[0] - record.arrival for record in records]
    cells = [f"{1e3 * (quantile(gaps, share) or 0):.1f}" for share in (0.5, 0.99)]
    cells += [f"{quantile(first, share) or 0:.2f}" for share in (0.5, 0.99)]
    print(f"| {name} | {tokens / seconds:.0f} | {(best or seconds) / seconds:.1%} | {' | '.join(cells)} |", flush=True)
    return seconds


def limits(max_itl: str, times: str, elastic: str) -> dict[str, Limit]:
    """By their names."""
    found: dict[str, Limit] = {"none": lambda scheduler: None}
    for text in filter(None, max_itl.split(",")):
        found[f"{text} ms"] = lambda of, ms=float(text): Pace(ms / 1e3, of.config.depth)
    for text in filter(None, times.split(",")):
        found[f"{text} x decodes"] = lambda of, many=float(text): Relative(many, of)
    for text in filter(None, elastic.split(",")):
        found[f"{text} x decodes x (waiting + 1)"] = lambda of, many=float(text): Elastic(many, of)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", type=Path, help="what simulate fit wrote")
    parser.add_argument("--hardware", default="zen4-core")
    parser.add_argument("--model", help="as of orcaserve simulate")
    parser.add_argument(
        "--lengths", action="append", help="in, out and n of a workload, as of bench serve; several times"
    )
    parser.add_argument("--loads", default="0.5,0.8", help="shares of what the burst came to")
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=20_000)
    parser.add_argument("--max-itl", default="", help="milliseconds, joined by commas")
    parser.add_argument("--times", default="4,8,16")
    parser.add_argument("--elastic", default="2,4")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.cost:
        cost = msgspec.json.decode(arguments.cost.read_bytes(), type=Fitted).cost
    else:
        cost = derive(hardware(arguments.hardware), read_shape(arguments.model), Parallel())
    config = SchedulerConfig(
        policy=DEFAULT,
        max_batch_size=arguments.max_batch_size,
        max_batch_tokens=arguments.max_batch_tokens,
        num_blocks=arguments.blocks,
        block_size=BLOCK,
        depth=len(cost.stages),
    )
    print(f"{cost.made_from}; at most {config.max_batch_size} requests and {config.max_batch_tokens} tokens")
    for lengths in arguments.lengths or LENGTHS:
        capacity = 0.0
        for load in ("burst", *filter(None, arguments.loads.split(","))):
            text = f"burst:{lengths}" if load == "burst" else f"poisson:rate={float(load) * capacity:.4f},{lengths}"
            arrivals = simulation.arrivals_of(spec.make(text, vocab=VOCAB, seed=arguments.seed))
            print(f"\n`{text}`\n")
            print("| limit | tokens/s | of none | ITL p50, ms | ITL p99 | TTFT p50, s | TTFT p99 |")
            print("|---|---|---|---|---|---|---|")
            best: float | None = None
            for name, limit in limits(arguments.max_itl, arguments.times, arguments.elastic).items():
                seconds = row(name, arrivals, run(arrivals, config, cost, limit, arguments.seed), best)
                best = best or seconds
            capacity = capacity or len(arrivals) / (best or 1.0)


if __name__ == "__main__":
    main()
