"""Simulates a KV memory that is too small: what admission, victims and the order of eviction are worth.

    python tools/kv_memory.py admission --trace azure_2023_conversation.csv
    python tools/kv_memory.py eviction --trace mooncake_conversation.jsonl

`admission` runs a trace of Azure's, or a workload as `orcaserve bench` writes it, on the paper's 13B and an A100-40GB
(costs from data sheets) with a share of the KV memory that it takes where there is enough. Requests declare --limit
tokens and end where the workload says, which the scheduler does not know; only `reserve-exact` is told. `cheapest`
preempts who takes the least time to compute again, not who came last. Swapped blocks travel at --copy-bandwidth.

`eviction` runs a trace of Mooncake's, its blocks of 512 tokens made blocks of 16, or a workload as `orcaserve bench`
writes it. It prints what the prefix cache spares, for caches of several sizes and several ways to choose the block that
is forgotten: the share of the prompts' tokens, and of the time that it takes to compute them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from pathlib import Path

import msgspec

from orcaserve.bench.workloads import spec, traces
from orcaserve.core.batch import Batch
from orcaserve.core.block_pool import BlockPool
from orcaserve.core.config import SwapSpace
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.policy import DEFAULT, ORCA, Policy
from orcaserve.core.request import NewRequest, Request
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.sim.cost import Seconds
from orcaserve.sim.executor import LinearCost, SimExecutor, VirtualClock
from orcaserve.sim.hardware import HARDWARE, Parallel, derive
from orcaserve.sim.run import Arrival, Record, World
from orcaserve.sim.shape import SHAPES

END = 1
BLOCK = 16
ROWS = 64
DEAR = 60  # blocks (of 512 tokens in the trace) before a token whose attention takes as long as its linear maps: an 8B


class Declaring(World):
    """Requests that declare a limit and end with an end token before it."""

    def __init__(self, arrivals: Sequence[Arrival], clock: VirtualClock, limit: int | None) -> None:
        super().__init__(arrivals, clock)
        self._limit = limit

    def _request(self, id: int) -> NewRequest:
        new = super()._request(id)
        if self._limit is None:
            return new
        return msgspec.structs.replace(new, max_tokens=max(new.max_tokens, self._limit), end_token_ids=(END,))

    def sample(self, id: int, position: int) -> int:
        arrival = self._arrivals[id]
        return END if position - arrival.num_prompt == arrival.num_output - 1 else 0


def seconds(num_tokens: int) -> float:
    """What a prompt's beginning takes to compute, in tokens of an empty context: a token at DEAR takes two."""
    return num_tokens + num_tokens * num_tokens / (2 * DEAR * BLOCK)


class Cheapest(Scheduler):
    """Preempts, among those that come after, who takes the least time to compute again."""

    def _make_room(self, request: Request, num_tokens: int, now: float) -> bool:
        while not self.kv.grow(request, num_tokens):
            place = self._place(request)
            behind = [other for other in self.running if not other.num_in_flight and self._place(other) > place]
            if not behind:
                return False
            self._preempt(min(reversed(behind), key=self._lost), now)
        return True

    def _lost(self, request: Request) -> float:
        """What others hold, too, stays in the prefix cache."""
        shared = sum(self.kv.pool.counts[block] > 1 for block in request.block_table) * self.kv.block_size
        return seconds(request.num_computed) - seconds(min(shared, request.num_computed))


class Run(msgspec.Struct, frozen=True):
    """peak: most blocks held at a time. computed: tokens."""

    records: list[Record]
    scheduler: Scheduler
    peak: int
    computed: int


def run(
    arrivals: Sequence[Arrival],
    scheduler: Scheduler,
    cost: Callable[[Batch], Seconds],
    limit: int | None = None,
) -> Run:
    clock = VirtualClock()
    world = Declaring(arrivals, clock, limit)
    peak = computed = 0

    def seen(batch: Batch) -> Seconds:
        nonlocal peak, computed
        peak = max(peak, scheduler.kv.pool.num_held)
        computed += batch.num_tokens
        return cost(batch)

    copy_seconds = scheduler.config.swap.copy_seconds if scheduler.config.swap else 0.0
    executor = SimExecutor(seen, clock, None, world.sample, copy_seconds)
    loop = EngineLoop(scheduler, executor, world, world, clock)
    while world.is_open:
        loop.step()
    return Run(world.records(), scheduler, peak, computed)


def admission(arguments: argparse.Namespace) -> None:
    on, shape, parallel = HARDWARE["A100-40GB"], SHAPES["13B"], Parallel(1, 1)
    if arguments.workload is None:
        rows = traces.azure(arguments.trace)[: arguments.requests]
        arrivals = [Arrival(row.at, row.input_length, max(1, row.output_length)) for row in rows]
    else:
        arrivals = written(arguments.workload)
    tokens = sum(arrival.num_prompt + arrival.num_output for arrival in arrivals)
    model = derive(on, shape, parallel)
    copy = shape.kv_bytes_per_token * BLOCK / arguments.copy_bandwidth

    def config(policy: Policy, num_blocks: int, swap: bool = False) -> SchedulerConfig:
        space = SwapSpace(num_slots=10 * num_blocks, copy_seconds=copy, token_seconds=model.stages[0].per_token)
        return SchedulerConfig(
            policy=policy,
            max_batch_size=ROWS,
            max_batch_tokens=512,
            num_blocks=num_blocks,
            block_size=BLOCK,
            swap=space if swap else None,
        )

    roomy = run(arrivals, Scheduler(config(DEFAULT, 1 << 20)), model, arguments.limit)
    blocks = round(roomy.peak * arguments.share)
    print(
        f"{len(arrivals)} requests, {ROWS} at a time; KV for {blocks * BLOCK} tokens, {arguments.share:.0%} of the "
        f"{roomy.peak * BLOCK} that they take; a block is copied in {copy * 1e3:.2f} ms, and computed in "
        f"{model.stages[0].per_token * BLOCK * 1e3:.2f} ms"
    )
    print(f"{'':24} {'tokens/s':>9} {'preempted':>9} {'swapped':>8} {'computed':>9} {'latency p50':>12} {'p99':>8}")

    def line(name: str, found: Run) -> None:
        latency = sorted(record.latency for record in found.records)
        rate = tokens / max(record.token_times[-1] for record in found.records)
        swapped = found.scheduler.kv.swap.num_swapped if found.scheduler.kv.swap else 0
        print(
            f"{name:24} {rate:9.0f} {found.scheduler.num_preemptions:9} {swapped:8} "
            f"{found.computed / roomy.computed:9.3f} {latency[len(latency) // 2]:12.2f} "
            f"{latency[len(latency) * 99 // 100]:8.2f}",
            flush=True,
        )

    line("enough memory", roomy)
    line("reserve-max", run(arrivals, Scheduler(config(ORCA, blocks)), model, arguments.limit))
    line("reserve-exact", run(arrivals, Scheduler(config(ORCA, blocks)), model))
    for risk in (None, 0.9, 0.5, 0.3, 0.1, 0.03):
        policy = msgspec.structs.replace(DEFAULT, risk=risk)
        name = "paged" if risk is None else f"paged, risk {risk:g}"
        line(name, run(arrivals, Scheduler(config(policy, blocks)), model, arguments.limit))
    line("paged, cheapest", run(arrivals, Cheapest(config(DEFAULT, blocks)), model, arguments.limit))
    line("paged, swap", run(arrivals, Scheduler(config(DEFAULT, blocks, swap=True)), model, arguments.limit))
    line("paged, swap, cheapest", run(arrivals, Cheapest(config(DEFAULT, blocks, swap=True)), model, arguments.limit))
    risky = msgspec.structs.replace(DEFAULT, risk=0.5)
    line("paged, swap, risk 0.5", run(arrivals, Scheduler(config(risky, blocks, swap=True)), model, arguments.limit))


class ByWorth(BlockPool):
    """Forgets the free prefix that is worth least. Blocks without a prefix go first, as in BlockPool.

    worth(pool, block): the greater the longer it stays. Greedy-Dual (Cao and Irani, USITS 1997): what has been
    forgotten raises the floor from which worth counts, so that what is not used again goes in the end.

    ends_first: a block is worth no less than the one after it, which is of no use without it.
    """

    def __init__(self, num_blocks: int, worth: Callable[[ByWorth, int], float], *, ends_first: bool = False) -> None:
        super().__init__(num_blocks)
        self.ends_first = ends_first
        self._last = (0, 0.0)  # depth and value of the block that was freed last
        self.uses = [0] * num_blocks
        self.depth = [0] * num_blocks
        self._worth = worth
        self._floor = 0.0
        self._now = 0
        self._heap: list[tuple[float, int, int]] = []
        self._entry = [-1] * num_blocks

    def take(self) -> int:
        if self.prefixes[next(iter(self.free))] is not None:
            while True:
                value, stamp, block = heappop(self._heap)
                if self._entry[block] == stamp and block in self.free:
                    break
            self._floor = value
            self.free.move_to_end(block, last=False)
        block = super().take()
        self.uses[block] = 0
        return block

    def hold(self, block: int) -> None:
        super().hold(block)
        self.uses[block] += 1

    def release(self, block: int) -> None:
        super().release(block)
        if self.counts[block] == 0 and self.prefixes[block] is not None:
            self._now += 1
            self._entry[block] = self._now
            value = self._floor + self._worth(self, block)
            if self.ends_first and self.depth[block] == self._last[0] - 1:
                value = max(value, self._last[1])
            self._last = (self.depth[block], value)
            heappush(self._heap, (value, self._now, block))
            if len(self._heap) > 4 * self.num_blocks:
                self._heap = [e for e in self._heap if self._entry[e[2]] == e[1] and e[2] in self.free]
                heapify(self._heap)


class Deep(KVCacheManager):
    """Tells a ByWorth pool how deep in its sequence a block lies, from which its cost follows."""

    pool: ByWorth

    def publish(self, request: Request, num_tokens: int) -> None:
        for i in range(request.num_published, num_tokens // self.block_size):
            self.pool.depth[request.block_table[i]] = i
        super().publish(request, num_tokens)


WAYS: dict[str, Callable[[int], BlockPool]] = {
    "LRU (as it is)": BlockPool,
    "used twice stays longer": lambda count: ByWorth(count, lambda pool, block: float(pool.uses[block] > 0)),
    "by uses (GDSF)": lambda count: ByWorth(count, lambda pool, block: 1.0 + pool.uses[block]),
    "by cost": lambda count: ByWorth(count, lambda pool, block: 1.0 + pool.depth[block] / DEAR),
    "by uses and cost": lambda count: ByWorth(
        count, lambda pool, block: (1.0 + pool.uses[block]) * (1.0 + pool.depth[block] / DEAR)
    ),
    "by uses and cost, ends first": lambda count: ByWorth(
        count, lambda pool, block: (1.0 + pool.uses[block]) * (1.0 + pool.depth[block] / DEAR), ends_first=True
    ),
    "beginnings stay longer": lambda count: ByWorth(count, lambda pool, block: 1.0 / (1.0 + pool.depth[block])),
}


def written(workload: str) -> list[Arrival]:
    items = spec.make(workload, vocab=50000, seed=0).items
    return [Arrival(item.at, len(item.prompt_ids), item.max_tokens, item.prompt_ids) for item in items]


def prompts(arguments: argparse.Namespace) -> list[Arrival]:
    if arguments.workload is not None:
        return written(arguments.workload)
    arrivals = []
    for row in traces.mooncake(arguments.trace, random.Random(0))[: arguments.requests]:  # noqa: S311
        length = max(1, row.input_length * BLOCK // traces.BLOCK)
        ids = tuple(2 + name for name in row.hash_ids for _ in range(BLOCK))[:length]
        arrivals.append(Arrival(row.at, length, max(1, row.output_length * BLOCK // traces.BLOCK), ids))
    return arrivals


def eviction(arguments: argparse.Namespace) -> None:
    arrivals = prompts(arguments)
    total = sum(arrival.num_prompt for arrival in arrivals)
    whole = sum(seconds(arrival.num_prompt) for arrival in arrivals)
    cost = LinearCost(per_iteration=0.005, per_token=arguments.load * arrivals[-1].time / total)

    def spared(num_blocks: int, pool: Callable[[int], BlockPool]) -> tuple[float, float]:
        config = SchedulerConfig(
            policy=DEFAULT, max_batch_size=ROWS, max_batch_tokens=512, num_blocks=num_blocks, block_size=BLOCK
        )
        scheduler = Scheduler(config)
        if pool is not BlockPool:
            scheduler.kv = Deep(num_blocks, BLOCK, prefix_cache=True)
        scheduler.kv.pool = pool(num_blocks)
        cached = [record.num_cached for record in run(arrivals, scheduler, cost).records]
        return sum(cached) / total, sum(map(seconds, cached)) / whole

    tokens, time = spared(1 << 20, BlockPool)
    print(
        f"{len(arrivals)} requests, {total} prompt tokens; a cache without bounds spares {tokens:.1%} of them", end=""
    )
    print(f" and {time:.1%} of their time")
    print(f"{'with blocks:':28}" + "".join(f"{size:16}" for size in arguments.blocks))
    for name, pool in WAYS.items():
        found = (spared(size, pool) for size in arguments.blocks)
        print(f"{name:28}" + "".join(f"{tokens:9.1%}{time:7.1%}" for tokens, time in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("admission")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path)
    source.add_argument("--workload")
    one.add_argument("--requests", type=int, default=1500)
    one.add_argument("--limit", type=int, default=1024, help="tokens that every request declares")
    one.add_argument("--share", type=float, default=0.25, help="of the memory that it takes")
    one.add_argument("--copy-bandwidth", type=float, default=20e9, help="bytes a second to the swap space and back")
    one.set_defaults(do=admission)
    two = commands.add_parser("eviction")
    source = two.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path)
    source.add_argument("--workload")
    two.add_argument("--requests", type=int, default=12031)
    two.add_argument(
        "--load", type=float, default=0.5, help="share of the time that prompts would take without a cache"
    )
    two.add_argument("--blocks", type=int, nargs="+", default=[2000, 5000, 10000, 20000, 50000, 100000])
    two.set_defaults(do=eviction)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
