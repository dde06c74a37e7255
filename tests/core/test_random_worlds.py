"""The real scheduler, KV manager and loop in random and in small worlds, against the sequential oracle.

A sample of both: R12 of `make torture` walks ten million steps, and through every small world.
"""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import HealthCheck, settings
from ledger_world import ORDERS, Life, pressed_life, random_life, small_arrivals, small_configs, small_life

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import Output, Request
from orcaserve.core.scheduler import SchedulerConfig

STEPS_IN_CI = 15_000


def test_many_steps() -> None:
    """Every invariant after every call, every answer equal to the oracle's, every world drained, preemptions seen."""
    base = random.SystemRandom().randrange(10**9)
    steps = preemptions = hits = swapped = 0
    for seed in itertools.count(base):
        try:
            world = random_life(seed)
        except BaseException:
            print(f"seed {seed}")
            raise
        steps += world.steps
        preemptions += world.scheduler.num_preemptions
        hits += world.scheduler.kv.num_hits
        swapped += world.loop.stats().num_swapped
        if steps >= STEPS_IN_CI:
            break
    print(f"seeds {base} … {seed}: {steps} steps, {preemptions} preemptions, {swapped} swaps, {hits} cached tokens")
    assert preemptions > 20
    assert hits > 250


def test_little_memory_and_a_swap_space() -> None:
    """As above, where nearly everybody is preempted, and swapped or not."""
    base = random.SystemRandom().randrange(10**9)
    preemptions = swapped = 0
    for seed in range(base, base + 60):
        try:
            world = pressed_life(seed)
        except BaseException:
            print(f"seed {seed}")
            raise
        stats = world.loop.stats()
        preemptions, swapped = preemptions + stats.num_preemptions, swapped + stats.num_swapped
    print(f"seeds {base} …: {preemptions} preemptions, {swapped} swaps")
    assert swapped > 20
    assert preemptions - swapped > 20


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("policy", [policy for policy in (*sorted(POLICIES), *ORDERS) if "static" not in policy])
def test_every_policy_with_overlap(policy: str) -> None:
    """As above, and the same calls make the same batches."""
    base = random.SystemRandom().randrange(10**9)
    for seed in range(base, base + 4):
        try:
            one = random_life(seed, Noting, policy, overlap=1)
            other = random_life(seed, Noting, policy, overlap=1)
        except BaseException:
            print(f"seed {seed}")
            raise
        assert one.scheduler.config.overlap
        assert one.scheduler.batches == other.scheduler.batches, f"seed {seed}"


class Noting(CheckedScheduler):
    """Keeps the batches that it has made."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.batches: list[Batch] = []

    def schedule(self, now: float = 0.0) -> Batch | None:
        batch = super().schedule(now)
        if batch is not None:
            self.batches.append(batch)
        return batch


@pytest.mark.parametrize(
    ("policy", "depth", "overlap"),
    [(policy, depth, False) for policy in sorted(POLICIES) for depth in (1, 2, 3)]
    + [(policy, 2, True) for policy in sorted(POLICIES) if policy != "static"],
)
def test_small_worlds(policy: str, depth: int, overlap: bool) -> None:
    """Three requests of every small size, arriving at every small distance: every twentieth world."""
    first = random.SystemRandom().randrange(20)
    print(f"every twentieth from {first} on")
    for config in small_configs(policy, depth, overlap):
        for arrivals in itertools.islice(small_arrivals(3), first, None, 20):
            small_life(config, arrivals)


class Recorded(CheckedScheduler):
    """Remembers what it made and said; whether any row was quiet."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.said: list[tuple[Batch, tuple[Output, ...]]] = []
        self.was_quiet = False

    def update(self, batch: Batch, result: StepResult, now: float = 0.0) -> tuple[Output, ...]:
        self.was_quiet |= any(row.start < self.requests[row.id].quiet_below for row in batch.rows)
        outputs = super().update(batch, result, now)
        self.said.append((batch, outputs))
        return outputs


class NeverQuiet(Recorded):
    """Looks at every result whole."""

    def _quiet_below(self, request: Request) -> int:
        return 0


def test_quiet_rows_are_only_quicker() -> None:
    quiet = 0
    for seed in range(25):
        quick, slow = (random_life(seed, scheduler=scheduler) for scheduler in (Recorded, NeverQuiet))
        assert quick.scheduler.said == slow.scheduler.said, f"seed {seed}"
        quiet += quick.scheduler.was_quiet
    assert quiet > 5
