"""Compares ways to choose a replica, in virtual time: each request goes through the real router and scheduler.

    python tools/routers.py --workload mooncake:path=FILE,speed=0.5 --replicas 4

Prints a row per router: the share of prompt tokens that prefix caches spared, TTFT, and how unequal the replicas were.
The imbalance is the busiest replica's load over the mean, at every arrival at which that was at least 4 requests.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping

from orcaserve.bench import measures, simulation
from orcaserve.bench.workloads import spec
from orcaserve.core.policy import POLICIES
from orcaserve.core.router import FACTOR, Keys, PrefixRouter, RoundRobin, Router, weight
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.model.shape import read_shape
from orcaserve.sim.hardware import Parallel, derive, hardware, kv_tokens
from orcaserve.sim.routed import Routed, simulate_routed
from orcaserve.sim.run import Arrival
from orcaserve.sim.shape import ModelShape

BLOCK = 16
VOCAB = 151936
LLAMA_3_8B = ModelShape(
    name="8B",
    layers=32,
    hidden=4096,
    intermediate=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab=128256,
    matrices=3,
)


class LeastLoaded(RoundRobin):
    """The replica with the least to do; among equals, in turn."""

    def choose(self, keys: Keys, loads: Mapping[int, int]) -> int:
        return min(loads, key=lambda replica: (loads[replica], replica <= self.last, replica))


class Rendezvous(PrefixRouter):
    """Without a memory: rendezvous hashing of the key of one block, with the load bound."""

    def __init__(self, block: int, factor: float = FACTOR) -> None:
        super().__init__(BLOCK, factor)
        self._block = block

    def choose(self, keys: Keys, loads: Mapping[int, int]) -> int:
        share = math.ceil(self._factor * (sum(loads.values()) + 1) / len(loads))
        name = keys[min(self._block, len(keys) - 1)] if self._block >= 0 else keys[-1]
        within = [replica for replica, load in loads.items() if load < share]
        return max(within, key=lambda replica: weight(name, replica))


class Longest(PrefixRouter):
    """The longest prefix, whatever is forgotten for it."""

    def gain(self, keys: Keys, replica: int) -> int:
        return self.held(keys, replica)


class Unbounded(PrefixRouter):
    """The greatest gain, whatever the load."""

    def __init__(self) -> None:
        super().__init__(BLOCK, float("inf"))

    def choose(self, keys: Keys, loads: Mapping[int, int]) -> int:
        name = keys[-1]
        return max(loads, key=lambda replica: (self.gain(keys, replica), -loads[replica], weight(name, replica)))


ROUTERS: dict[str, Callable[[], Router]] = {
    "round robin": RoundRobin,
    "least loaded": LeastLoaded,
    "hash of the first block, bound 1.25": lambda: Rendezvous(0),
    "hash of the block at token 1024, bound 1.25": lambda: Rendezvous(1024 // BLOCK),
    "hash of the whole prompt, bound 1.25": lambda: Rendezvous(-1),
    "longest prefix, bound 1.25": lambda: Longest(BLOCK),
    "gain, no bound": Unbounded,
    "gain, bound 1.1": lambda: PrefixRouter(BLOCK, 1.1),
    "gain, bound 1.25 (prefix)": lambda: PrefixRouter(BLOCK),
    "gain, bound 1.5": lambda: PrefixRouter(BLOCK, 1.5),
    "gain, bound 2": lambda: PrefixRouter(BLOCK, 2.0),
}
LOADS: dict[str, Callable[[Arrival], int]] = {
    "requests": lambda arrival: 1,
    "tokens": lambda arrival: arrival.num_prompt,
}


def imbalance(routed: Routed, least: int) -> tuple[str, str]:
    """Greatest and mean of the busiest replica's load over the mean, where that is at least so much."""
    shares = []
    for loads in routed.loads:
        if sum(loads) >= least * len(loads):
            shares.append(max(loads) * len(loads) / sum(loads))
    return (f"{max(shares):.2f}", f"{sum(shares) / len(shares):.2f}") if shares else ("—", "—")


def _shape(name: str) -> ModelShape:
    return LLAMA_3_8B if name == LLAMA_3_8B.name else read_shape(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", required=True, help="as of orcaserve bench serve")
    parser.add_argument("--hardware", default="H100")
    parser.add_argument("--model", default="8B", help="8B (Llama 3's), or as of orcaserve simulate")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--max-batch-size", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--blocks", type=int, help="KV blocks of a replica; default: what fits")
    parser.add_argument("--load", choices=sorted(LOADS), default="requests", help="what the bound is about")
    parser.add_argument("--only", help="routers, joined by +")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arrivals = simulation.arrivals_of(spec.make(arguments.workload, vocab=VOCAB, seed=arguments.seed))
    device, shape, parallel = hardware(arguments.hardware), _shape(arguments.model), Parallel()
    config = SchedulerConfig(
        policy=POLICIES["default"],
        max_batch_size=arguments.max_batch_size,
        max_batch_tokens=arguments.max_batch_tokens,
        num_blocks=arguments.blocks or kv_tokens(device, shape, parallel) // BLOCK,
        block_size=BLOCK,
    )
    cost = derive(device, shape, parallel)
    tokens = sum(arrival.num_prompt for arrival in arrivals)
    print(
        f"{arguments.workload}: {len(arrivals)} requests, {tokens} prompt tokens; {arguments.replicas} x "
        f"{cost.made_from}, {config.num_blocks} blocks each; bound of {arguments.load}\n"
    )
    print("| router | spared | TTFT p50 | TTFT p99 | seconds in all | imbalance, greatest | mean |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.only.split("+") if arguments.only else ROUTERS:
        costs = [cost.noisy(arguments.seed + number) for number in range(arguments.replicas)]
        routed = simulate_routed(arrivals, config, costs, ROUTERS[name](), LOADS[arguments.load])
        first = [record.token_times[0] - record.arrival for record in routed.records]
        median, late = measures.quantile(first, 0.5), measures.quantile(first, 0.99)
        greatest, mean = imbalance(routed, 4 if arguments.load == "requests" else 1)
        cells = (
            f"{sum(record.num_cached for record in routed.records) / tokens:.1%}",
            f"{median or 0:.3f} s",
            f"{late or 0:.3f} s",
            f"{max(record.token_times[-1] for record in routed.records):.0f}",
            greatest,
            mean,
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
