"""Where a request's time went, against the same worked out from the batches: as intervals, without phases."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from ledger_world import World, random_config, random_request

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.decisions import Decision, Preempted
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import NewRequest
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.core.timing import Timing
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit


class Row(msgspec.Struct):
    """A row of a batch: the scheduler's times when it was made and when it was back. in_vain: it had ended by then."""

    made: float
    back: float
    start: int
    end: int
    samples: bool
    mates: int
    in_vain: bool


class Timed(World):
    """A ledger world whose clock goes on at every look, and which writes down what the loop does."""

    def __init__(self, config: SchedulerConfig, rng: random.Random, eager: bool = True) -> None:
        self.rng = rng
        self.time = 0.0  # the clock's; `now` is the scheduler's
        super().__init__(config, eager)
        self.loop = EngineLoop(self.scheduler, self.executor, self, self, self.clock, self)
        self.arrived: dict[int, float] = {}
        self.has_run: set[int] = set()
        self.news: dict[int, NewRequest] = {}
        self.rows: dict[int, list[Row]] = defaultdict(list)
        self.flying: list[tuple[float, Batch]] = []
        self.preempted_at: dict[int, list[tuple[float, int]]] = defaultdict(list)
        self.num_preempted = 0  # those included who were let in for a moment and never ran
        self.timings: dict[int, list[Timing | None]] = defaultdict(list)
        self.ended: dict[int, Timing] = {}
        self.cached: dict[int, int] = {}
        self.filled: set[int] = set()  # blocks that were copied back, and whose request has not run since
        self.brought: dict[int, int] = defaultdict(int)  # tokens of such blocks, by request

    def clock(self) -> float:
        self.time += self.rng.choice([0.001, 0.25])
        return self.time

    def put(self, step: Step) -> None:
        for output in step.outputs:
            if output.id not in self.requests:
                continue
            self.timings[output.id].append(output.timing)
            self.cached[output.id] = self.cached.get(output.id) or output.num_cached
            if output.finish_reason is not None:
                assert output.timing is not None
                self.ended[output.id] = output.timing
        super().put(step)

    # Witness
    def took(self, now: float, commands: Sequence[Command]) -> None:
        self.now = now
        for command in commands:
            if isinstance(command, Submit):
                self.arrived[command.request.id] = now
                self.news[command.request.id] = command.request

    def decided(self, now: float, decisions: Sequence[Decision]) -> None:
        for decision in decisions:
            self.num_preempted += isinstance(decision, Preempted)
            comes_back = len(self.news[decision.id].token_ids) > self.news[decision.id].num_prompt
            if isinstance(decision, Preempted) and (decision.id in self.has_run or comes_back):
                self.preempted_at[decision.id].append((self.now, decision.tokens))

    def submitted(self, now: float, batch: Batch) -> None:
        self.has_run |= {row.id for row in batch.rows}
        self._see_copies(batch)
        self.flying.append((self.now, batch))

    def _see_copies(self, batch: Batch) -> None:
        """Copies fill a stretch of a block table; what is beyond its first row's start was not computed yet."""
        size = self.scheduler.kv.block_size
        self.filled |= {block for swap in batch.swaps if not swap.out for block in swap.blocks}
        starts = {row.id: row.start for row in batch.rows}
        for new in batch.new:
            table = self.scheduler.requests[new.id].block_table
            for i, block in enumerate(table):
                if block in self.filled:
                    self.brought[new.id] += max(0, min(size, starts[new.id] - i * size))
            self.filled -= set(table)

    def returned(self, now: float, batch: Batch, result: StepResult) -> None:
        made, _ = self.flying.pop(0)
        self.now = now
        for row in batch.rows:
            end = row.start + row.num_tokens
            in_vain = row.id in self.ended
            self.rows[row.id].append(Row(made, now, row.start, end, row.samples, len(batch.rows) - 1, in_vain))


def life(seed: int, policy: str | None = None) -> Timed:
    rng = random.Random(seed)
    world = Timed(random_config(rng, policy), rng, eager=rng.random() < 0.5)
    for _ in range(rng.randint(1, 20)):
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            world.submit(**random_request(rng, world), timed=rng.random() < 0.3)
        if world.requests and rng.random() < 0.15:
            world.abort(rng.choice(sorted(world.requests)))
        world.step(rng.randint(0, 12))
    world.drain()
    return world


def expected(world: Timed, id: int) -> Timing:
    """By intervals: from each loss until the first row that goes beyond all that had been computed before it."""
    new = world.news[id]
    rows = world.rows[id]
    sampling = [i for i, row in enumerate(rows) if row.samples]
    last = sampling[-1] if sampling else next(i for i, row in enumerate(rows) if row.end == len(new.token_ids))
    rows = rows[: last + 1]  # what a static batch computes after the end does not count
    comes_back = len(new.token_ids) > new.num_prompt
    losses = [(world.arrived[id], len(new.token_ids) - 1)] if comes_back else []
    losses += world.preempted_at[id]
    lost: list[tuple[float, float]] = []
    recomputed = reached = 0
    for at, computed in losses:
        reached = max(reached, computed)
        until = next(row.back for row in rows if row.made >= at and row.end > reached)
        lost.append((at, until))
    for row in rows:
        known = max((computed for at, computed in losses if at <= row.made), default=0)
        recomputed += max(0, min(row.end, known) - row.start)
    merged: list[tuple[float, float]] = []
    for begin, end in lost:
        if merged and begin < merged[-1][1]:
            begin = merged[-1][1]
        if end > begin:
            merged.append((begin, end))

    def without_loss(begin: float, end: float) -> float:
        return end - begin - sum(max(0.0, min(end, b) - max(begin, a)) for a, b in merged)

    arrived, began = world.arrived[id], rows[0].made
    ended = next(row.back for row in reversed(rows) if not row.in_vain)
    first_token = merged[0][1] if comes_back else rows[sampling[0]].back if sampling else ended
    return Timing(
        queue_seconds=0.0 if comes_back else began - arrived,
        prefill_seconds=0.0 if comes_back else without_loss(began, first_token),
        decode_seconds=without_loss(first_token, ended),
        lost_seconds=sum(end - begin for begin, end in merged),
        preemptions=len(world.preempted_at[id]),
        recomputed_tokens=recomputed,
        swapped_tokens=world.brought[id],
        cached_tokens=0 if comes_back else world.cached[id],
        iterations=len(rows),
        mates=sum(row.mates for row in rows),
        most_mates=max(row.mates for row in rows),
    )


@pytest.mark.parametrize("policy", [None, "orca", "static", "stacked"])
def test_random_worlds_spend_their_time_as_the_batches_show(policy: str | None) -> None:
    base = random.SystemRandom().randrange(10**9)
    seen: dict[str, float] = defaultdict(float)
    names = [name for name in Timing.__struct_fields__ if name != "ids"]
    for number in range(800 if policy is None else 25):  # one world in twenty swaps
        if number >= 80 and all(seen[name] for name in names):
            break
        seed = base + number
        world = life(seed, policy)
        for id, timing in world.ended.items():
            wanted = expected(world, id)
            for name in Timing.__struct_fields__:
                got, want = getattr(timing, name), getattr(wanted, name)
                where = f"seed {seed}, request {id}, {name}: {timing}, not {wanted}"
                assert got == pytest.approx(want, abs=1e-6), where
                seen[name] += sum(got) if isinstance(got, tuple) else got
            ended = world.arrived[id] + timing.seconds
            assert any(row.back == pytest.approx(ended, abs=1e-6) for row in world.rows[id])
        assert world.num_preempted == world.scheduler.num_preemptions, f"seed {seed}"
    if policy is None:
        assert all(seen[name] for name in names), dict(seen)


def test_only_who_wants_it_is_told_before_the_end_and_its_times_only_grow() -> None:
    base = random.SystemRandom().randrange(10**9)
    compared = 0
    for seed in range(base, base + 60):
        world = life(seed)
        for id in world.ended:
            told = world.timings[id]
            if not world.news[id].timed:
                assert all(timing is None for timing in told[:-1])
                continue
            fields = [name for name in Timing.__struct_fields__ if name != "ids"]
            for before, after in pairwise(told):
                assert before is not None and after is not None, f"seed {seed}"
                compared += 1
                assert all(getattr(before, name) <= getattr(after, name) + 1e-9 for name in fields), f"seed {seed}"
    assert compared > 100


def test_a_story_in_numbers() -> None:
    """Two at once; the younger one is preempted for the older one's next token and computed again."""
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=2, max_batch_tokens=40, num_blocks=5, block_size=4
    )
    world = Timed(config, random.Random(0))
    world.loop = EngineLoop(world.scheduler, world.executor, world, world, lambda: world.time, world)
    world.submit((1,) * 7, 12)
    world.submit((2,) * 3, 12)
    while world.requests:
        world.step()
        world.time += 1.0
    older, younger = world.ended[1], world.ended[2]
    assert older.preemptions == 0 and older.lost_seconds == 0 and older.iterations == 12
    assert younger.preemptions == 1 and younger.recomputed_tokens > 0
    [(at, tokens)] = world.preempted_at[2]
    back = next(row for row in world.rows[2] if row.made >= at and row.end > tokens)
    assert younger.lost_seconds == back.back - at
    assert older.most_mates == 1 and older.mates < older.iterations


def test_time_in_the_inbox_is_time_in_the_queue() -> None:
    world = Timed(
        SchedulerConfig(policy=POLICIES["default"], max_batch_size=2, max_batch_tokens=40, num_blocks=50, block_size=4),
        random.Random(0),
    )
    world.submit((1, 2), 3)
    world.submit((3, 4), 3)
    world.commands[1] = Submit(world.commands[1].request, waited=2.5)
    world.drain()
    assert world.ended[2].queue_seconds == pytest.approx(world.ended[1].queue_seconds + 2.5)
    assert world.ended[2].seconds == pytest.approx(world.ended[1].seconds + 2.5)


def test_two_lives_are_one() -> None:
    names = [name for name in Timing.__struct_fields__ if name not in ("ids", "most_mates")]
    one = Timing(ids=(3,), most_mates=3, **{name: 1 + number for number, name in enumerate(names)})
    two = Timing(ids=(9,), most_mates=1, **{name: 10 * (1 + number) for number, name in enumerate(names)})
    both = one + two
    assert (both.ids, both.most_mates) == ((3, 9), 3)
    assert [getattr(both, name) for name in names] == [11 * (1 + number) for number in range(len(names))]
    assert both.seconds == 11 * (1 + 2 + 3 + 4)
    assert both.mean_mates == both.mates / both.iterations
    assert Timing().mean_mates == 0
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(both), type=Timing) == both
