"""Who makes way for one that comes before it, and who reads before whom: nobody in vain, and decodes first."""

from __future__ import annotations

from ledger_world import World
from order_world import world

from orcaserve.core.request import NewRequest, SamplingParams


def test_rows_that_are_in_flight_are_no_reason_for_anybody_to_make_way() -> None:
    """With overlap they are not in the next batch, unless they go ahead of their tokens: it has room for two more."""
    scheduler = world("priority", depth=2, overlap=True).scheduler
    decisions = scheduler.listen()
    for id, priority in ((1, 5), (2, 5), (3, 0)):
        params = SamplingParams(logprobs=0)  # so that nobody goes ahead
        new = NewRequest(id=id, token_ids=(1, id), num_prompt=2, max_tokens=9, params=params, priority=priority)
        scheduler.add(new)
        if id > 1:
            batch = scheduler.schedule()
            assert batch is not None and [row.id for row in batch.rows] == ([1, 2] if id == 2 else [3])
    assert decisions.take() == ()


def test_nobody_is_preempted_for_one_that_would_get_no_token_now() -> None:
    """The decode that is to go leaves all tokens to a prompt that comes before both: it goes when that is read."""
    w = world("priority", max_batch_size=8, max_batch_tokens=8, num_blocks=8)
    least = w.submit((1,) * 6, 9, priority=5)
    w.step()
    most = w.submit(tuple(range(15)), 9, priority=0)
    w.step()
    between = w.submit((9,) * 10, 2, priority=1)
    w.step()
    assert (w.rows[-1], w.scheduler.num_preemptions) == ([least, most], 0)
    w.step()
    assert (w.rows[-1], w.scheduler.num_preemptions) == ([most, between], 1)
    w.drain()


def lives(policy: str, **changes: int) -> World:
    """A prompt that arrives when one request decodes and another reads, and comes before both in its order."""
    w = world(policy, max_batch_tokens=8, **changes)
    w.submit((1, 2), 9, priority=5)
    w.step(2)
    w.submit((3,) * 30, 2, priority=5)
    w.step()
    w.submit((4,) * 30, 2, priority=0)
    return w


def test_a_decode_goes_before_a_prompt_of_one_that_waits_and_is_more_urgent() -> None:
    w = lives("priority,preempt=false", max_batch_size=3)
    w.step()
    assert w.rows[-1] == [1, 3], "the tokens that the decode leaves are of the more urgent prompt"
    w.drain()


def test_nobody_is_let_in_before_one_that_reads_where_all_rows_are_taken() -> None:
    w = lives("priority,preempt=false", max_batch_size=2)
    w.step()
    assert w.rows[-1] == [1, 2]
    w.drain()
