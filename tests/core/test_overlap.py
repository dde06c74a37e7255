"""Overlap: a request goes on while its newest token is on the device, and nothing else changes."""

from __future__ import annotations

import random

import msgspec
import pytest
from ledger_world import VOCAB, World
from test_scheduler import shapes, world

from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.core.decisions import Waits
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import DEFAULT, STATIC, Policy, parse_policy
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.ledger import ledger_answer
from orcaserve.engine.loop import EngineLoop

PLAIN = SamplingParams()
HOSTED = (
    SamplingParams(logprobs=0),
    SamplingParams(prompt_logprobs=0),
    SamplingParams(grammar="{}"),
    SamplingParams(min_tokens=1),
    SamplingParams(presence_penalty=0.1),
    SamplingParams(frequency_penalty=0.1),
    SamplingParams(repetition_penalty=1.1),
    SamplingParams(logit_bias=((1, 2.0),)),
)


def overlapped(policy: Policy = DEFAULT, **changes: int) -> World:
    return world(policy, **({"depth": 2, "overlap": True, "max_batch_tokens": 40} | changes))


def batches_of(world: World, id: int) -> list[int]:
    """Which batches it was in."""
    return [i for i, batch in enumerate(world.batches) if any(row.id == id for row in batch.rows)]


def test_who_decodes_is_in_every_batch_and_ends_without_one_too_many() -> None:
    w = overlapped()
    for id in range(4):
        w.submit((id + 1,) * (id + 1), 5 + id, params=PLAIN)
    w.drain()
    assert shapes(w)[:3] == [
        [(1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 0, 4)],
        [(1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 4, 1)],
        [(1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 5, 1)],
    ]
    for id in range(1, 5):
        assert batches_of(w, id) == list(range(4 + id)), "an iteration a token: no bubble, no overshoot"


def test_tokens_are_told_in_order_once_and_a_batch_late() -> None:
    w = overlapped()
    new = w.requests[w.submit((1, 2), 6, params=PLAIN)]
    w.drain()
    rows = [row for batch in w.batches for row in batch.rows]
    assert [len(row.token_ids) for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [token for row in rows for token in row.token_ids] == ledger_answer(new, VOCAB)[0][:4]
    assert all(row.samples for row in rows)


@pytest.mark.parametrize("params", HOSTED, ids=repr)
def test_who_needs_the_host_goes_on_when_it_has_the_token(params: SamplingParams) -> None:
    assert not params.is_plain
    w = overlapped()
    w.submit((1, 2), 30, params=PLAIN)
    hosted = w.submit((3, 4), 5, params=params)
    w.drain()
    assert batches_of(w, 1) == list(range(30))
    assert batches_of(w, hosted) == [0, 2, 4, 6, 8], "every other batch, beside one that is in all of them"


def test_alone_it_is_in_every_batch_again() -> None:
    w = overlapped()
    w.submit((3, 4), 5, params=HOSTED[0])
    w.drain()
    assert [row.start for batch in w.batches for row in batch.rows] == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "params",
    [
        PLAIN,
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.1, seed=4),
        SamplingParams(n=2, stop=("x",), stop_token_ids=(1,), ignore_eos=True, max_tokens=3),
    ],
    ids=repr,
)
def test_what_is_plain(params: SamplingParams) -> None:
    assert params.is_plain


def stopping(count: int, **fields: int) -> tuple[World, NewRequest]:
    """A request that an end token ends after so many tokens."""
    free = NewRequest(id=1, token_ids=(5, 6, 7), num_prompt=3, max_tokens=20, params=PLAIN)
    for seed in range(1000):
        tokens = ledger_answer(msgspec.structs.replace(free, seed=seed), VOCAB)[0]
        if tokens[count - 1] not in tokens[: count - 1]:
            break
    w = overlapped(**fields)
    w.submit((5, 6, 7), 20, params=PLAIN, seed=seed, end_token_ids=(tokens[count - 1],))
    return w, w.requests[1]


def test_one_position_after_an_end_is_computed_for_nothing_and_not_published() -> None:
    w, _ = stopping(5, block_size=4)
    w.step(5)
    assert w.last.outputs[-1].finish_reason == "stop"
    assert [row.start for row in w.batches[-1].rows] == [7], "was ahead, and is in flight"
    assert w.scheduler.kv.pool.num_held == 2
    w.step()
    assert w.last.outputs == () and not w.scheduler.requests
    assert w.scheduler.kv.pool.num_held == 0
    published = [prefix for prefix in w.scheduler.kv.pool.prefixes if prefix is not None]
    assert len(published) == 1, "the second block was filled by what came too late"


def test_a_place_is_free_when_an_end_is_certain() -> None:
    w = overlapped(max_batch_size=1)
    w.submit((1, 2), 3, params=PLAIN)
    w.submit((3, 4), 3, params=PLAIN)
    w.drain()
    assert shapes(w) == [[(1, 0, 2)], [(1, 2, 1)], [(1, 3, 1)], [(2, 0, 2)], [(2, 2, 1)], [(2, 3, 1)]]


def test_an_abort_frees_the_kv_when_both_batches_have_retired() -> None:
    w = overlapped()
    scheduler = w.scheduler
    for id in (1, 2):
        scheduler.add(NewRequest(id=id, token_ids=(5, 6), num_prompt=2, max_tokens=9, params=PLAIN))
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.abort(1)
    assert [output.id for output in scheduler.update(first, w.executor.run(first))] == [2]
    assert 1 in scheduler.requests and scheduler.kv.pool.num_held == 2
    third = scheduler.schedule()
    assert [output.id for output in scheduler.update(second, w.executor.run(second))] == [2]
    assert list(scheduler.requests) == [2] and scheduler.kv.pool.num_held == 1
    assert [row.id for row in third.rows] == [2]


def test_an_error_ends_a_request_when_what_was_ahead_is_back() -> None:
    w = overlapped()
    scheduler = w.scheduler
    scheduler.add(NewRequest(id=1, token_ids=(5, 6), num_prompt=2, max_tokens=9, params=PLAIN))
    first, second = scheduler.schedule(), scheduler.schedule()
    [output] = scheduler.update(first, StepResult((RowResult(id=1, error="NaN"),)))
    assert (output.finish_reason, output.error) == ("error", "NaN")
    assert scheduler.kv.pool.num_held > 0 and scheduler.schedule() is None
    assert scheduler.update(second, StepResult((RowResult(id=1, token_id=7),))) == ()
    assert not scheduler.requests and scheduler.kv.pool.num_held == 0


def test_chunks_are_not_dealt_out_and_rows_never_more_than_max_batch_size() -> None:
    w = overlapped(max_batch_size=2, max_batch_tokens=16)
    w.submit((1,), 9, params=PLAIN)
    w.submit(tuple(range(40)), 3, params=PLAIN)
    w.drain()
    assert shapes(w)[:4] == [
        [(1, 0, 1), (2, 0, 15)],
        [(1, 1, 1), (2, 15, 15)],
        [(1, 2, 1), (2, 30, 10)],
        [(1, 3, 1), (2, 40, 1)],
    ]


class Listening(World):
    """A world whose scheduler says why requests wait, and keeps its batches."""

    def __init__(self, policy: Policy = DEFAULT, **changes: int) -> None:
        fields = {"max_batch_size": 4, "max_batch_tokens": 40, "num_blocks": 64, "block_size": 4}
        super().__init__(SchedulerConfig(policy=policy, depth=2, overlap=True, **(fields | changes)))
        self.loop = EngineLoop(self.scheduler, self.executor, self, self, self.clock, is_watched=lambda: True)
        self.decisions: list[list] = []

    def put(self, step) -> None:
        self.decisions.append(list(step.decisions))
        super().put(step)


def test_the_last_in_order_yields_to_the_first_that_lacks_memory() -> None:
    """Else it would go on until it lacks a block itself, since it is always in flight."""
    policy = msgspec.structs.replace(DEFAULT, prefix_cache=False)
    w = Listening(policy, num_blocks=6, block_size=4)
    w.submit((1, 2, 3), 12, params=PLAIN)
    w.submit((4,), 12, params=PLAIN)
    w.submit((5,), 12, params=PLAIN)
    w.drain()
    said = [decision for decisions in w.decisions for decision in decisions]
    assert any(isinstance(one, Waits) and one.why == "yields" and one.runs and one.by == 1 for one in said), said
    assert w.scheduler.num_preemptions > 0


@pytest.mark.parametrize("seed", range(60))
def test_the_first_never_waits_for_two_batches_in_a_row(seed: int) -> None:
    rng = random.Random(seed)
    config = SchedulerConfig(
        policy=msgspec.structs.replace(DEFAULT, prefix_cache=False),
        max_batch_size=rng.randint(2, 6),
        max_batch_tokens=rng.choice([6, 9, 40]),
        num_blocks=rng.randint(6, 20),
        block_size=rng.choice([1, 2, 3, 4]),
        depth=2,
        overlap=True,
    )
    missed: list[bool] = []

    class Watched(CheckedScheduler):
        def schedule(self, now: float = 0.0) -> Batch | None:
            batch = super().schedule(now)
            if batch is not None and self.running:
                first = min(self.running, key=lambda request: request.arrival)
                missed.append(first.due == 1 and first.id not in {row.id for row in batch.rows})
                assert not all(missed[-2:]) or len(missed) < 2
            return batch

    w = World(config, scheduler=Watched)
    for _ in range(12):
        for _ in range(rng.randint(0, 3)):
            prompt = rng.randint(1, min(w.scheduler.kv.num_slots - 1, 9))
            tokens = tuple(rng.choices(range(VOCAB), k=prompt))
            w.submit(tokens, rng.randint(1, w.scheduler.kv.num_slots - prompt), params=PLAIN)
        w.step(rng.randint(0, 12))
    w.drain()


def test_who_is_urgent_takes_a_place_one_batch_later() -> None:
    w = Listening(parse_policy("priority,ageing=inf"), max_batch_size=2)
    batches = []
    schedule = w.scheduler.schedule
    w.scheduler.schedule = lambda now=0.0: batches.append(schedule(now)) or batches[-1]
    w.submit((1, 2), 20, params=PLAIN, priority=5)
    w.submit((3, 4), 20, params=PLAIN, priority=5)
    w.step(3)
    made = len(batches)
    urgent = w.submit((5, 6), 2, params=PLAIN, priority=0)
    w.step(2)
    assert [row.id for row in batches[made].rows] == [1, urgent], "the place of the last, who yields it"
    w.drain()


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="depth must be 2, not 1"):
        overlapped(depth=1)
    with pytest.raises(ValueError, match="depth must be 2, not 3"):
        overlapped(depth=3)
    with pytest.raises(ValueError, match="schedules iterations, not 'static'"):
        overlapped(STATIC)


def test_without_overlap_nobody_goes_ahead() -> None:
    w = world(depth=2)
    w.submit((1, 2), 9, params=PLAIN)
    assert isinstance(w.scheduler, Scheduler)
    w.step(3)
    assert [len(batch.rows) for batch in w.batches] == [1, 1, 1]
    assert [row.num_in_flight for row in w.scheduler.running] == [0]
    w.drain()
