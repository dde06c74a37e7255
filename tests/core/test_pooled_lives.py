"""Prompts that are wanted as one vector, where memory is short: means are computed whole, whatever is preempted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from ledger_world import World

from orcaserve.core.config import SwapSpace
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import Request, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig

LIVES = 60


def life(seed: int, scheduler: type[Scheduler] = CheckedScheduler) -> World:
    """Answers that grow beside prompts that are pooled, of few beginnings, in a cache that is too small for both."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2])
    config = SchedulerConfig(
        policy=POLICIES["default"],
        max_batch_size=4,
        max_batch_tokens=4,
        num_blocks=20 // block_size,
        block_size=block_size,
        depth=rng.choice([1, 1, 2]),
        swap=SwapSpace(num_slots=40, copy_seconds=0.1, token_seconds=1.0),
    )
    world = World(config, scheduler=scheduler)
    for _ in range(12):
        prompt = (rng.choice([1, 2]),) * rng.randint(1, 14)
        if rng.random() < 0.5:
            world.submit(prompt[:2], rng.randint(5, 10))
        else:
            world.submit(prompt, 0, params=SamplingParams(pooling=rng.choice(["mean", "mean", "last"])))
        world.step(rng.randint(0, 3))
    world.drain()
    return world


def without_mean(function: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """The same, not knowing that a mean is wanted."""

    def careless(request: Request) -> Any:
        new = request.new
        if new.params.pooling == "mean":
            request.new = msgspec.structs.replace(new, params=msgspec.structs.replace(new.params, pooling="last"))
        try:
            return function(request)
        finally:
            request.new = new

    return careless


class FindsAPart(CheckedScheduler):
    """The prefix cache spares a part of a mean."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.kv._cached_prefix = without_mean(self.kv._cached_prefix)


class SwapsAHalf(CheckedScheduler):
    """Half a mean comes back from the swap space to workers that have forgotten it."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.kv.swap_out = without_mean(self.kv.swap_out)


def test_vectors_are_those_of_the_oracle() -> None:
    worlds = [life(seed) for seed in range(LIVES)]
    assert sum(world.scheduler.num_preemptions for world in worlds) > 20
    assert sum(world.scheduler.kv.num_hits for world in worlds) > 100
    assert sum(world.loop.stats().num_swapped for world in worlds) > 10


@pytest.mark.parametrize("mutant", [FindsAPart, SwapsAHalf])
def test_a_mean_that_is_not_whole_is_noticed(mutant: type[Scheduler]) -> None:
    with pytest.raises(AssertionError):
        for seed in range(LIVES):
            life(seed, mutant)
