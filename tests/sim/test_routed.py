"""Several simulated engines behind a router: the same as one where there is one, and prefixes that are found."""

from __future__ import annotations

import random

from orcaserve.core.policy import POLICIES
from orcaserve.core.router import PrefixRouter, RoundRobin
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.executor import LinearCost
from orcaserve.sim.routed import simulate_routed
from orcaserve.sim.run import Arrival, simulate

CONFIG = SchedulerConfig(
    policy=POLICIES["default"], max_batch_size=8, max_batch_tokens=64, num_blocks=200, block_size=4
)
COST = LinearCost(per_iteration=0.01, per_token=0.001)


def chats(seed: int) -> list[Arrival]:
    """Ten chats of five turns."""
    rng = random.Random(seed)
    arrivals = []
    for chat in range(10):
        time, history = rng.random(), tuple(range(20))
        for _ in range(5):
            history += tuple(1000 * chat + rng.randrange(1000) for _ in range(rng.randint(5, 30)))
            arrivals.append(Arrival(time, len(history), rng.randint(1, 20), history))
            time += rng.expovariate(1.0)
    return sorted(arrivals, key=lambda arrival: arrival.time)


def test_one_replica_is_an_engine_alone() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    arrivals = chats(seed)
    alone, _ = simulate(arrivals, CONFIG, COST)
    assert list(simulate_routed(arrivals, CONFIG, [COST], RoundRobin()).records) == alone


def test_every_request_is_served_by_its_replica_alone() -> None:
    """Who was sent where decides everything: each replica's part, simulated by itself, gives the same times."""
    arrivals = chats(1)
    routed = simulate_routed(arrivals, CONFIG, [COST] * 3, PrefixRouter(4))
    assert len(set(routed.replicas)) > 1
    for replica in range(3):
        own = [i for i, chosen in enumerate(routed.replicas) if chosen == replica]
        alone, _ = simulate([arrivals[i] for i in own], CONFIG, COST)
        assert [routed.records[i] for i in own] == alone
    for index, loads in enumerate(routed.loads):
        for replica in range(3):
            open_there = [
                other
                for other in range(index)
                if routed.replicas[other] == replica and routed.records[other].token_times[-1] > arrivals[index].time
            ]
            assert loads[replica] == len(open_there)


def test_the_prefix_router_spares_more_than_turns_do() -> None:
    arrivals = chats(2)
    found = [
        sum(simulate_routed(arrivals, CONFIG, [COST] * 3, router).prefix_hits)
        for router in (RoundRobin(), PrefixRouter(4))
    ]
    assert found[1] > 1.3 * found[0]
