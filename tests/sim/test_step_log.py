"""A recorded engine's life, replayed: the scheduler must make the same batches of it, one for one."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import msgspec
import pytest
from core.ledger_world import VOCAB, World, press, pressed_config, random_config, random_request

from orcaserve.core.batch import Batch
from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.ledger import LedgerExecutor
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.step_log import Header, StepLog, Submitted, log_clock, read
from orcaserve.sim.replay import ReplayError, replay


class Recorded(World):
    """A ledger world that writes a step log; its clock goes on whenever it is read."""

    def __init__(self, config: SchedulerConfig, eager: bool = True) -> None:
        super().__init__(config, eager)
        self.data = bytearray()
        self.pace = 0.001
        log = StepLog(Header(config=config), self.data.extend, b"key")
        self.loop = EngineLoop(self.scheduler, self.executor, self, self, log_clock(self.clock), log)


def recorded_life(seed: int) -> Recorded:
    """A random life with everything in it: prefixes shared, preemption, stops, aborts, crashes come back from."""
    rng = random.Random(seed)
    world = Recorded(random_config(rng), eager=rng.random() < 0.5)
    world.pace = rng.choice([0.001, 0.1])
    for _ in range(rng.randint(1, 25)):
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            world.submit(**random_request(rng, world))
        if world.requests and rng.random() < 0.3:
            world.abort(rng.choice(sorted(world.requests)))
        world.step(rng.randint(0, 12))
    world.drain()
    return world


def batches(data: bytes) -> list:
    return [event.rows for log in read(data) for event in log.events if isinstance(event, Submitted)]


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_lives_are_replayed_batch_for_batch(first: int) -> None:
    seen = {"preempted": 0, "cached": 0, "stopped": 0}
    for seed in range(first, first + 40):
        world = recorded_life(seed)
        [log] = read(bytes(world.data))
        assert replay(log) == batches(world.data), f"seed {seed}"
        seen["preempted"] += world.scheduler.num_preemptions
        seen["cached"] += world.scheduler.kv.num_hits
        seen["stopped"] += world.data.count(b"stopped")
    assert all(seen.values()), seen


class Jumpy(Recorded):
    """Its clock stands still, goes on, or jumps."""

    def __init__(self, config: SchedulerConfig, rng: random.Random) -> None:
        self.rng = rng
        super().__init__(config)

    def clock(self) -> float:
        self.now += self.rng.choice([0.0, 1e-7, 1e-4, 1e-3, 0.011, 3.0])
        return self.now


def test_a_time_limit_is_replayed_with_all_that_it_learned() -> None:
    differ = 0
    for seed in range(15):
        rng = random.Random(seed)
        config = msgspec.structs.replace(random_config(rng, "default"), max_itl=rng.choice([1e-4, 1e-3, 0.02]))
        world = Jumpy(config, rng)
        for _ in range(rng.randint(5, 25)):
            for _ in range(rng.choice([0, 1, 1, 2, 5])):
                world.submit(**random_request(rng, world))
            world.step(rng.randint(0, 12))
        world.drain()
        [log] = read(bytes(world.data))
        assert replay(log) == batches(world.data), f"seed {seed}"
        free = msgspec.structs.replace(log.header, config=msgspec.structs.replace(config, max_itl=None))
        try:
            replay(msgspec.structs.replace(log, header=free))
        except ReplayError:
            differ += 1
    assert differ > 2, "it was meant to cut"


def test_swaps_are_replayed_copy_for_copy() -> None:
    lives = []
    for seed in range(30):
        rng = random.Random(seed)
        world = Recorded(pressed_config(rng), eager=rng.random() < 0.5)
        press(world, rng)
        [log] = read(bytes(world.data))
        assert replay(log) == batches(world.data), f"seed {seed}"
        if any(event.swaps for event in log.events if isinstance(event, Submitted)):
            lives.append(log)
    assert len(lives) > 4
    for log in lives:
        dear = msgspec.structs.replace(log.header.config.swap, copy_seconds=1e9)
        other = msgspec.structs.replace(log.header, config=msgspec.structs.replace(log.header.config, swap=dear))
        with pytest.raises(ReplayError, match="differs: the log has"):
            replay(msgspec.structs.replace(log, header=other))


def test_a_log_holds_no_token() -> None:
    """Two engines with the same load but other tokens write the same lines, the names of blocks aside."""
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=4, max_batch_tokens=16, num_blocks=9, block_size=4
    )
    logs = []
    for base in (0, 20):
        world = Recorded(config)
        for number in range(5):
            world.submit(tuple(base + token for token in (1, 2, 3, 4, 5, number)), 9)
        world.drain()
        logs.append(re.sub(r"(?<=[\[,])\d{6,}(?=[\],])", "name", world.data.decode()))
    assert logs[0] == logs[1]
    assert "name" in logs[0]


def test_equal_beginnings_have_equal_names_and_salts_tell_them_apart() -> None:
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=4, max_batch_tokens=64, num_blocks=90, block_size=2
    )
    world = Recorded(config)
    world.submit((1, 2, 3, 4, 5), 1)
    world.submit((1, 2, 3, 5, 5), 1)
    world.submit((9, 9, 3, 4, 5), 1)
    world.submit((1, 2, 3, 4, 5), 1, cache_salt="other")
    world.drain()
    names = [event.blocks for event in read(bytes(world.data))[0].events if hasattr(event, "prompt")]
    assert names[0][0] == names[1][0] and names[0][1] != names[1][1]
    assert names[2][1] != names[0][1], "a name covers what is before its block, too"
    assert not set(names[3]) & set(names[0])


def test_another_scheduler_is_told_where_it_differs() -> None:
    world = Recorded(
        SchedulerConfig(policy=POLICIES["default"], max_batch_size=4, max_batch_tokens=8, num_blocks=50, block_size=4)
    )
    for number in range(6):
        world.submit((number,) * 11, 5)
    world.drain()
    [log] = read(bytes(world.data))

    class Hasty(Scheduler):
        """Takes its third batch one row short."""

        def schedule(self, now: float = 0.0) -> Batch | None:
            batch = super().schedule(now)
            if batch is not None and batch.step == 3:
                return msgspec.structs.replace(batch, rows=batch.rows[:-1])
            return batch

    with pytest.raises(ReplayError, match="batch 3 differs: the log has"):
        replay(log, Hasty)
    narrow = msgspec.structs.replace(log.header.config, max_batch_size=2)
    with pytest.raises(ReplayError, match="batch 3 differs"):
        replay(msgspec.structs.replace(log, header=Header(config=narrow)))


def test_a_log_cut_off_anywhere_is_replayed_as_far_as_it_goes() -> None:
    world = recorded_life(3)
    whole = batches(world.data)
    lines = bytes(world.data).splitlines(keepends=True)
    for count in range(1, len(lines)):
        [log] = read(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        got = replay(log)
        assert got == whole[: len(got)]


def test_errors_are_recorded_as_what_they_are() -> None:
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=4, max_batch_tokens=8, num_blocks=50, block_size=4
    )
    world = Recorded(config)
    run = world.executor.run

    def failing(batch: Batch):
        result = run(batch)
        rows = tuple(
            msgspec.structs.replace(got, token_id=None) if got.id == 2 and got.token_id is not None else got
            for got in result.rows
        )
        return msgspec.structs.replace(result, rows=rows)

    world.executor.run = failing
    world.submit((1, 2, 3), 5)
    world.submit((1, 2, 4), 5)
    world.requests.pop(2)
    world.drain()
    [log] = read(bytes(world.data))
    assert [event.failed for event in log.events if getattr(event, "failed", ())] == [(2,)]
    assert replay(log) == batches(world.data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "without a line"),
        (b'{"type":"abort","at":1,"id":2}\n', "first line of a step log names the engine"),
        (b"what?\n{}\n", "line 1 is none of a step log"),
    ],
)
def test_what_is_no_log_is_said_in_one_line(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_time_runs_forwards_and_versions_are_known() -> None:
    world = recorded_life(3)
    lines = bytes(world.data).splitlines(keepends=True)
    with pytest.raises(ValueError, match="time runs backwards"):
        read(b"".join([lines[0], lines[-1], *lines[1:]]))
    header = json.loads(lines[0]) | {"version": 99}
    with pytest.raises(ValueError, match="of version 99"):
        read(json.dumps(header).encode() + b"\n" + lines[1])
    assert len(read(bytes(world.data) * 2)) == 2, "the engine that follows a crash appends its own life"


def test_requests_that_only_score_are_let_go() -> None:
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=2, max_batch_tokens=4, num_blocks=50, block_size=4
    )
    data = bytearray()
    executor = LedgerExecutor(config.num_blocks, config.block_size, VOCAB)
    world = World(config)
    log = StepLog(Header(config=config), data.extend)
    world.loop = EngineLoop(world.scheduler, executor, world, world, lambda: 0.0, log)
    world.executor = executor
    world.submit((1, 2, 3, 4, 5, 6, 7), 0)
    world.submit((1, 2, 3, 4, 5, 6, 8), 3)
    world.drain()
    assert not log._open
    [found] = read(bytes(data))
    assert replay(found) == batches(bytes(data))


def test_a_life_recorded_before_is_still_replayed() -> None:
    """The built-in model's server with too little KV memory: chunks, preemption, prefix hits, ends and aborts.

    If the scheduler is meant to decide otherwise from now on, record it again: tests/e2e/test_recorded_server.py.
    """
    data = Path(__file__).with_name("recorded.jsonl").read_bytes()
    [log] = read(data)
    assert replay(log) == batches(data)
    assert len(batches(data)) > 100
