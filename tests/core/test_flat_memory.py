"""Iterations leave nothing behind, not even in the interpreter's own stores."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import pytest
from ledger_world import World

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.policy import DEFAULT
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.serve.flight_recorder import FlightRecorder, RecordingExecutor
from orcaserve.worker.worker import in_order

ROWS, TIMES = 12, 400
ENOUGH = TIMES // 4  # blocks of memory: where every time leaves one, it is TIMES


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    """A collection empties what the interpreter keeps, in the middle of which nobody could say what has grown."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def growth(act: Callable[[], object]) -> int:
    """Blocks of memory that are in use after so many times more than before."""
    for _ in range(TIMES // 4):
        act()
    before = sys.getallocatedblocks()
    for _ in range(TIMES):
        act()
    return sys.getallocatedblocks() - before


def test_a_loop_that_is_recorded() -> None:
    config = SchedulerConfig(policy=DEFAULT, max_batch_size=ROWS, max_batch_tokens=256, num_blocks=256, block_size=16)
    world = World(config, scheduler=Scheduler)
    recorder = FlightRecorder.create()
    executor = RecordingExecutor(world.executor, recorder)
    loop = EngineLoop(world.scheduler, executor, world, world, world.clock)

    def live() -> None:
        for token in range(ROWS):
            world.submit((token,) * 3, 6)
        while world.requests:
            loop.step()
        world.outputs.clear()

    try:
        assert growth(live) < ENOUGH
    finally:
        recorder.close()


def test_results_of_a_batch() -> None:
    batch = Batch(step=0, rows=tuple([ScheduledRequest(id, 0, 1, (1,), (), True) for id in range(ROWS)]))
    assert growth(lambda: in_order(batch, {})) < ENOUGH
