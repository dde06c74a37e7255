"""What orders gain, and what they cost the others, in virtual time."""

from __future__ import annotations

import random
import statistics

import pytest

from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import parse_policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.executor import LinearCost
from orcaserve.sim.run import Arrival, Record, simulate

COST = LinearCost(per_iteration=0.1, per_token=0.001)


def run(policy: str, arrivals: list[Arrival], scheduler=None, **changes: int) -> list[Record]:
    fields = {"max_batch_size": 8, "max_batch_tokens": 256, "num_blocks": 1000, "block_size": 16, "depth": 1}
    config = SchedulerConfig(policy=parse_policy(policy), **(fields | changes))
    if scheduler is None:
        return simulate(arrivals, config, COST)[0]
    return simulate(arrivals, config, COST, scheduler=scheduler)[0]


def waits(records: list[Record]) -> list[float]:
    return [record.token_times[0] - record.arrival for record in records]


def mixed(seed: int, count: int = 300) -> list[Arrival]:
    """More than it can do of two kinds of work, told apart by the prompt: short questions, and long reports."""
    rng = random.Random(seed)
    time, arrivals = 0.0, []
    for _ in range(count):
        time += rng.expovariate(1.6)
        is_short = rng.random() < 0.7
        shape = (rng.randint(10, 60), rng.randint(1, 20)) if is_short else (rng.randint(300, 600), rng.randint(80, 150))
        arrivals.append(Arrival(time, *shape))
    return arrivals


@pytest.mark.parametrize("seed", range(3))
def test_shortest_cuts_the_mean_and_nobody_waits_much_longer_than_twice(seed: int) -> None:
    arrivals = mixed(seed)
    fcfs, shortest = run("default", arrivals), run("shortest", arrivals)
    mean = [statistics.mean(record.latency for record in records) for records in (fcfs, shortest)]
    longest = [max(waits(records)) for records in (fcfs, shortest)]
    assert longest[0] > 10, "there is a queue"
    assert mean[1] < 0.8 * mean[0], mean
    assert longest[1] < 2.2 * longest[0], longest


@pytest.mark.parametrize("seed", range(2))
def test_fair_spares_a_polite_tenant_a_flood(seed: int) -> None:
    rng = random.Random(seed)
    flood = [Arrival(0.0, rng.randint(10, 200), rng.randint(1, 60), tenant="flood") for _ in range(200)]
    polite = [Arrival(5.0 + 6 * i, rng.randint(10, 100), rng.randint(1, 30), tenant="polite") for i in range(12)]
    kept: list[CheckedScheduler] = []

    def checked(config: SchedulerConfig) -> CheckedScheduler:
        kept.append(CheckedScheduler(config))
        return kept[-1]

    arrivals = flood + polite
    seen = {policy: run(policy, arrivals, checked) for policy in ("default", "fair")}
    polite_waits = {policy: max(waits(records[len(flood) :])) for policy, records in seen.items()}
    assert polite_waits["fair"] < polite_waits["default"] / 5, polite_waits
    ends = {policy: max(record.token_times[-1] for record in records) for policy, records in seen.items()}
    assert ends["fair"] < 1.05 * ends["default"]
    gap = kept[-1].gap
    assert gap is not None and 0 <= gap.widest <= gap.bound


def test_priority_and_deadlines_are_for_those_who_ask() -> None:
    rng = random.Random(4)
    work = mixed(4, 200)
    asked = [
        Arrival(
            one.time,
            one.num_prompt,
            one.num_output,
            priority=int(rng.random() > 0.2),
            deadline=rng.choice([2.0, 300.0]),
        )
        for one in work
    ]
    urgent = [i for i, one in enumerate(asked) if one.priority == 0]
    slow, quick = run("default", asked), run("priority", asked)
    assert max(waits([quick[i] for i in urgent])) < max(waits([slow[i] for i in urgent])) / 4
    equal = [Arrival(one.time, one.num_prompt, one.num_output, deadline=one.deadline) for one in asked]

    def met(policy: str) -> int:
        records = run(policy, equal)
        return sum(wait <= (one.deadline or 0) for wait, one in zip(waits(records), equal, strict=True))

    assert met("deadline") > 1.15 * met("default")


def test_every_order_serves_everybody_and_replays_from_its_arguments() -> None:
    arrivals = [
        Arrival(one.time, one.num_prompt, one.num_output, tenant="ab"[i % 2], priority=i % 3)
        for i, one in enumerate(mixed(5, 80))
    ]
    for policy in ("priority", "fair", "deadline", "shortest", "shortest,preempt=true", "mlfq"):
        records = run(policy, arrivals, num_blocks=100)
        assert [len(record.token_times) for record in records] == [arrival.num_output for arrival in arrivals]
        assert records == run(policy, arrivals, num_blocks=100)
