"""What each policy promises, said with small examples."""

from __future__ import annotations

import itertools

import pytest
from ledger_world import VOCAB, World

from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.core.policy import DEFAULT, ORCA, POLICIES, STATIC, Policy
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import RequestTooLarge, Scheduler, SchedulerConfig
from orcaserve.engine.ledger import ledger_answer


def world(policy: Policy = DEFAULT, **changes: int) -> World:
    fields = {"max_batch_size": 4, "max_batch_tokens": 8, "num_blocks": 64, "block_size": 4, "depth": 1} | changes
    world = World(SchedulerConfig(policy=policy, **fields))
    world.batches = []
    schedule = world.scheduler.schedule

    def spy(now: float = 0.0) -> Batch | None:
        batch = schedule(now)
        if batch is not None:
            world.batches.append(batch)
        return batch

    world.scheduler.schedule = spy
    return world


def shapes(world: World) -> list[list[tuple[int, int, int]]]:
    return [[(row.id, row.start, row.num_tokens) for row in batch.rows] for batch in world.batches]


def test_a_new_request_joins_after_one_iteration_and_an_ended_one_leaves_at_once() -> None:
    w = world()
    w.submit((1, 2, 3), 3)
    w.step()
    w.submit((4, 5), 1)
    w.step(2)
    assert shapes(w) == [[(1, 0, 3)], [(1, 3, 1), (2, 0, 2)], [(1, 4, 1)]]
    w.drain()


def test_the_papers_worked_example_is_one_batch_of_seven_tokens() -> None:
    """x1 at its 4th token, x2 at its 2nd, x3 new with 2, x4 new with 3: one iteration of [7, H]."""
    w = world(ORCA)
    w.submit((1, 1, 1), 5)
    w.submit((2,), 5)
    w.step()
    w.submit((3, 3), 5)
    w.submit((4, 4, 4), 5)
    w.step()
    assert shapes(w)[1] == [(1, 3, 1), (2, 1, 1), (3, 0, 2), (4, 0, 3)]
    assert w.batches[1].num_tokens == 7
    w.drain()


def test_decodes_go_first_and_prompts_are_cut_to_the_budget() -> None:
    w = world()
    w.submit((1, 2), 9)
    w.step()
    w.submit(tuple(range(20)), 2)
    w.step(4)
    assert shapes(w)[1:] == [
        [(1, 2, 1), (2, 0, 7)],
        [(1, 3, 1), (2, 7, 7)],
        [(1, 4, 1), (2, 14, 6)],
        [(1, 5, 1), (2, 20, 1)],
    ]
    w.drain()


def test_a_static_batch_is_closed_burns_rows_and_returns_everything_at_its_end() -> None:
    w = world(STATIC)
    w.submit((1, 2), 1)
    w.submit((3,), 4)
    w.step()
    late = w.submit((4,), 1)
    w.step(2)
    assert w.last.outputs == ()
    w.step()
    assert {output.id for output in w.last.outputs} == {1, 2}
    assert shapes(w) == [
        [(1, 0, 2), (2, 0, 1)],
        [(1, 1, 1), (2, 1, 1)],
        [(1, 1, 1), (2, 2, 1)],
        [(1, 1, 1), (2, 3, 1)],
    ]
    w.step()
    assert shapes(w)[-1] == [(late, 0, 1)]
    w.drain()


def test_static_batch_goes_on_when_its_last_running_member_is_aborted() -> None:
    w = world(STATIC)
    w.submit((1, 2), 1)
    w.submit((3,), 50)
    w.step(3)
    w.abort(2)
    w.drain()


def test_orca_stops_at_the_first_that_does_not_fit() -> None:
    w = world(ORCA, num_blocks=4)  # 16 slots
    w.submit((1, 1), 8)
    w.submit((2, 2), 9)  # does not fit beside the first
    w.submit((3,), 1)  # would
    w.step(3)
    assert [len(batch.rows) for batch in w.batches] == [1, 1, 1]
    w.drain()


def test_the_youngest_is_preempted_and_its_stream_goes_on() -> None:
    w = world(num_blocks=5, max_batch_tokens=40, max_batch_size=2)
    w.submit((1,) * 7, 12)
    w.submit((2,) * 3, 12)
    w.drain()  # compares with the oracle
    assert w.scheduler.num_preemptions > 0
    again = [new for batch in w.batches for new in batch.new if new.id == 2][1]
    assert len(again.token_ids) > 3
    assert again.num_prompt == 3


def test_who_waits_for_a_prefix_finds_all_of_it() -> None:
    """Nine tokens are two full blocks and one to compute; who needs the same two waits until both are there."""
    w = world(max_batch_tokens=4)
    prompt = tuple(range(9))
    for _ in range(2):
        w.submit(prompt, 2)
    w.submit((30,), 9)
    w.step(2)
    assert shapes(w) == [[(1, 0, 4)], [(1, 4, 4)]]
    w.step()
    assert shapes(w)[2] == [(1, 8, 1), (2, 8, 1), (3, 0, 1)], "both blocks are there"
    w.drain()


def test_nobody_waits_for_the_block_of_its_last_token_which_it_computes_itself() -> None:
    w = world(max_batch_tokens=5)
    for _ in range(2):
        w.submit(tuple(range(8)), 2)
    w.step(2)
    assert shapes(w) == [[(1, 0, 5)], [(1, 5, 3), (2, 4, 2)]]
    w.drain()


def test_who_waits_for_a_prefix_lets_others_pass() -> None:
    w = world(max_batch_tokens=12)
    for prompt in (tuple(range(9)), tuple(range(5)), (30,)):
        w.submit(prompt, 2)
    w.step(2)
    assert shapes(w) == [[(1, 0, 9), (3, 0, 1)], [(1, 9, 1), (3, 1, 1), (2, 4, 1)]]
    w.drain()


def test_a_prompt_shorter_than_a_block_waits_for_nobody_and_is_found_when_it_has_grown() -> None:
    w = world(max_batch_tokens=14)
    w.submit((1, 2, 3, 4) * 5, 1)
    w.step()
    w.submit((1, 2, 3), 9)
    w.step()
    assert shapes(w)[1] == [(1, 14, 6), (2, 0, 3)]
    grown = (1, 2, 3, *ledger_answer(w.requests[2], VOCAB)[0])
    w.drain()
    id = w.submit(grown, 1)
    w.step()
    assert [output.num_cached for output in w.last.outputs if output.id == id] == [8]
    w.drain()


def test_equal_prefixes_are_shared_only_under_the_same_salt() -> None:
    prompt = tuple(range(13))
    w = world(max_batch_tokens=40)
    for salt, cached in [("", 0), ("", 12), ("tenant", 0), ("tenant", 12), ("", 12)]:
        id = w.submit(prompt, 1, cache_salt=salt)
        w.step()
        assert [output.num_cached for output in w.last.outputs if output.id == id] == [cached]
    w.drain()
    assert (w.scheduler.kv.num_queries, w.scheduler.kv.num_hits) == (5 * 13, 3 * 12)


def test_who_wants_prompt_logprobs_writes_the_prefix_cache_but_does_not_read_it() -> None:
    w = world(max_batch_tokens=40)
    wants = SamplingParams(prompt_logprobs=0)
    for params, cached in [(wants, 0), (wants, 0), (SamplingParams(), 8)]:
        w.submit(tuple(range(10)), 1, params=params)
        w.step()
        assert w.last.outputs[0].num_cached == cached


def test_scoring_ends_with_the_prompt() -> None:
    w = world()
    w.submit(tuple(range(10)), 0, params=SamplingParams(prompt_logprobs=0))
    w.step(2)
    assert w.last.outputs[0].finish_reason == "length"
    assert len(w.last.outputs[0].prompt_logprobs) == 9
    w.drain()


def test_a_request_that_can_never_fit_is_refused_and_the_others_go_on() -> None:
    w = world(num_blocks=2)
    w.submit((1,) * 5, 4)
    w.requests.clear()
    other = w.submit((1,), 2)
    w.step()
    assert other in w.scheduler.requests
    w.drain()
    scheduler = Scheduler(w.scheduler.config)
    new = NewRequest(id=1, token_ids=(1,) * 5, num_prompt=5, max_tokens=4, params=SamplingParams())
    with pytest.raises(RequestTooLarge, match="9 tokens, but the KV cache holds 8"):
        scheduler.add(new)


def test_rows_are_dealt_out_over_the_stages() -> None:
    w = world(depth=2, max_batch_tokens=100)
    for token in range(4):
        w.submit((token,), 30)
    w.step(10)
    assert [len(batch.rows) for batch in w.batches[-6:]] == [2] * 6
    w.drain()


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 3])
def test_an_abort_frees_the_kv_when_its_batches_have_retired(policy: str, depth: int) -> None:
    w = world(POLICIES[policy], depth=depth)
    for token in range(4):
        w.submit((token, 9), 50)
    w.step(4)
    for id in list(w.requests):
        w.abort(id)
    w.step(depth + 1)
    assert w.scheduler.kv.pool.num_held == 0
    assert not w.scheduler.requests


def test_a_row_that_fails_ends_alone() -> None:
    w = world()
    run = w.executor.run

    def fail(batch: Batch):
        result = run(batch)
        rows = [type(got)(id=got.id, error="NaN") if got.id == 1 else got for got in result.rows]
        return type(result)(tuple(rows))

    w.submit((1, 2), 5)
    w.submit((3, 4), 5)
    w.executor.run = fail
    del w.requests[1]  # it has no oracle's answer
    w.step()
    assert 1 not in w.scheduler.requests
    w.drain()


@pytest.mark.parametrize(
    "changes", [{"max_batch_size": 0}, {"depth": 0}, {"max_batch_tokens": 3}, {"block_size": 0}, {"num_blocks": 0}]
)
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        world(**changes)


def test_chunks_of_one_prompt_travel_in_all_batches_in_flight() -> None:
    """They need nothing of each other's results, so that no stage waits; what follows the last one needs its token."""
    w = world(max_batch_tokens=64, num_blocks=128, depth=2)
    scheduler = w.scheduler
    scheduler.add(NewRequest(id=1, token_ids=(5,) * 100, num_prompt=100, max_tokens=3, params=SamplingParams()))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shapes(w) == [[(1, 0, 50)], [(1, 50, 50)]], "dealt out evenly over the depth"
    assert (first.step, second.step, scheduler.num_steps) == (1, 2, 2)
    assert [row.samples for batch in (first, second) for row in batch.rows] == [False, True]
    assert scheduler.schedule() is None, "the next token is not there yet"


def test_an_error_in_a_chunk_ends_the_request_when_the_later_chunks_are_back() -> None:
    w = world(max_batch_tokens=64, num_blocks=128, depth=2)
    scheduler = w.scheduler
    scheduler.add(NewRequest(id=1, token_ids=(5,) * 100, num_prompt=100, max_tokens=3, params=SamplingParams()))
    first, second = scheduler.schedule(), scheduler.schedule()
    [output] = scheduler.update(first, StepResult((RowResult(id=1, error="NaN"),)))
    assert (output.finish_reason, output.error) == ("error", "NaN")
    assert scheduler.kv.pool.num_held > 0, "a batch in flight still writes there"
    assert scheduler.update(second, StepResult((RowResult(id=1, token_id=7),))) == ()
    assert not scheduler.requests and scheduler.kv.pool.num_held == 0


def test_batches_in_flight_are_about_equally_long() -> None:
    """A stage waits wherever a batch is longer than its neighbour: a prompt is spread out, and fades in and out."""
    w = world(max_batch_size=8, max_batch_tokens=512, num_blocks=1000, depth=2)
    for id in range(6):
        w.submit((id + 1,) * 3, 50)
    w.step(4)
    w.submit(tuple(range(1, 401)), 5)
    w.drain()
    sizes = [batch.num_tokens for batch in w.batches]
    while sizes and sizes[0] > 3:  # the first prompts, of three tokens each
        sizes.pop(0)
    steps = [abs(after - before) for before, after in itertools.pairwise(sizes)]
    assert sum(sizes) > 400 and max(sizes) < 100, sizes
    assert sum(steps) <= 2 * max(sizes) + 6, sizes  # up once and down once, but for single rows


def test_a_prompt_beside_which_nobody_decodes_is_read_in_one_turn() -> None:
    w = world(max_batch_size=8, max_batch_tokens=512, num_blocks=1000, depth=2)
    w.submit(tuple(range(1, 401)), 5)
    w.drain()
    assert [batch.num_tokens for batch in w.batches][:3] == [200, 200, 1]


def test_a_full_batch_takes_a_chunk_of_somebody_elses_prompt() -> None:
    """Rows that another batch in flight carries do not count: else the batch that reads would be the longer one."""
    w = world(max_batch_size=4, max_batch_tokens=512, num_blocks=1000, depth=2)
    for id in range(7):
        w.submit((id + 1,) * 3, 50)
    w.step(4)
    w.submit(tuple(range(1, 401)), 5)
    w.step(2)
    rows = {batch.step: len(batch.rows) for batch in w.batches if batch.num_tokens > 30}
    assert sorted(rows.values()) == [4, 5], "the reader's own batch, and the other, which was full"
    w.drain()
