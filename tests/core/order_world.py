"""A small world whose batches are kept, to see in what order requests get their turn."""

from __future__ import annotations

from ledger_world import World

from orcaserve.core.batch import Batch
from orcaserve.core.policy import parse_policy
from orcaserve.core.scheduler import SchedulerConfig


def world(policy: str, **changes: int) -> World:
    fields = {"max_batch_size": 2, "max_batch_tokens": 64, "num_blocks": 64, "block_size": 4, "depth": 1} | changes
    world = World(SchedulerConfig(policy=parse_policy(policy), **fields))
    world.rows = []
    schedule = world.scheduler.schedule

    def spy(now: float = 0.0) -> Batch | None:
        batch = schedule(now)
        if batch is not None:
            world.rows.append([row.id for row in batch.rows])
        return batch

    world.scheduler.schedule = spy
    return world


def started(world: World) -> list[int]:
    """Requests in the order in which they first had a row."""
    return list(dict.fromkeys(id for rows in world.rows for id in rows))
