"""A loop that is watched says why requests wait, with the next iteration's results; and decides nothing else."""

from __future__ import annotations

import random

import pytest
from ledger_world import World, random_config, random_request

from orcaserve.core.batch import ScheduledRequest
from orcaserve.core.decisions import Decision, Waits
from orcaserve.core.policy import DEFAULT
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Step


class Watched(World):
    """A ledger world that may be watched. `told` has the decisions of every message, `rows` each iteration's."""

    def __init__(self, config: SchedulerConfig, **more: bool) -> None:
        super().__init__(config, **more)
        self.is_watched = False
        self.told: list[tuple[Decision, ...]] = []
        self.rows: list[tuple[ScheduledRequest, ...]] = []
        self.loop = EngineLoop(
            self.scheduler, self.executor, self, self, self.clock, is_watched=lambda: self.is_watched
        )

    def put(self, step: Step) -> None:
        super().put(step)
        self.told.append(step.decisions)
        self.rows.append(step.rows)


def one_at_a_time() -> Watched:
    world = Watched(SchedulerConfig(policy=DEFAULT, max_batch_size=1, max_batch_tokens=8, num_blocks=64, block_size=4))
    for token in range(3):
        world.submit((token,) * 3, 4)
    return world


def test_it_says_nothing_while_nobody_looks_on() -> None:
    world = one_at_a_time()
    world.drain()
    assert not any(world.told)
    assert world.scheduler.decisions is None


def test_it_begins_and_ends_in_the_middle() -> None:
    world = one_at_a_time()
    world.step(2)
    world.is_watched = True
    world.step()
    assert world.told == [(), (), (Waits(id=2, why="rows"),)]
    world.is_watched = False
    world.drain()
    assert not any(world.told[3:])
    assert world.scheduler.decisions is None, "it no longer costs anything"


def test_a_message_has_its_own_batch() -> None:
    world = one_at_a_time()
    world.step()
    assert [(row.id, row.start, row.num_tokens) for row in world.rows[0]] == [(1, 0, 3)]
    assert world.last is not None
    assert world.last.freed == ()
    world.step(4)
    assert world.last.freed == (1,), "the workers are told that it has ended"
    world.drain()


@pytest.mark.parametrize("seed", range(40))
def test_it_decides_the_same(seed: int) -> None:
    lives = []
    for is_watched in (False, True):
        rng = random.Random(seed)
        world = Watched(random_config(rng), eager=rng.random() < 0.5)
        switch = random.Random(seed)
        for _ in range(rng.randint(1, 12)):
            for _ in range(rng.choice([0, 1, 1, 2, 5])):
                world.submit(**random_request(rng, world))
            if world.requests and rng.random() < 0.2:
                world.abort(rng.choice(sorted(world.requests)))
            world.is_watched = is_watched and switch.random() < 0.7
            world.step(rng.randint(0, 12))
        world.drain()
        lives.append(world.rows)
    assert lives[0] == lives[1], f"seed {seed}"
