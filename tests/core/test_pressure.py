"""When KV memory is short: swapping, what admission leaves free, and prompts that are computed only once."""

from __future__ import annotations

import msgspec
import pytest
from ledger_world import World

from orcaserve.core.batch import Batch, Swap
from orcaserve.core.config import SwapSpace
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.order import OrderError
from orcaserve.core.policy import DEFAULT, Policy, parse_policy
from orcaserve.core.pressure import swap_pays
from orcaserve.core.request import NewRequest, Request, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig

FREE = SwapSpace(num_slots=100, copy_seconds=0.0, token_seconds=1.0)  # copies cost nothing


class Seen(World):
    """A ledger world that keeps its batches."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.batches: list[Batch] = []
        run = self.executor.run

        def spy(batch: Batch):
            self.batches.append(batch)
            return run(batch)

        self.executor.run = spy

    @property
    def swaps(self) -> list[Swap]:
        return [swap for batch in self.batches for swap in batch.swaps]

    @property
    def num_computed(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    def rows_of(self, id: int) -> list[tuple[int, int]]:
        return [(row.start, row.num_tokens) for batch in self.batches for row in batch.rows if row.id == id]


def world(policy: Policy = DEFAULT, swap: SwapSpace | None = None, **changes: int) -> Seen:
    fields = {"max_batch_size": 4, "max_batch_tokens": 40, "num_blocks": 5, "block_size": 4, "depth": 1} | changes
    return Seen(SchedulerConfig(policy=policy, swap=swap, **fields))


# -- swapping


@pytest.mark.parametrize(
    ("num_lost", "num_copies", "pays"), [(10, 4, True), (10, 5, False), (10, 6, False), (0, 0, False)]
)
def test_what_takes_less_time_is_done(num_lost: int, num_copies: int, pays: bool) -> None:
    """Ten tokens take a second, a copy a fifth; where both take as long, nothing is copied."""
    space = SwapSpace(num_slots=1, copy_seconds=0.25, token_seconds=0.125)
    assert swap_pays(num_lost, num_copies, space) is pays


def test_a_swapped_request_computes_nothing_twice() -> None:
    w = world(swap=FREE, max_batch_size=2)
    w.submit((1,) * 7, 12)
    w.submit((2,) * 3, 12)
    w.drain()  # compares with the oracle
    assert w.scheduler.num_preemptions == w.scheduler.kv.swap.num_swapped > 0
    assert w.num_computed == 7 + 11 + 3 + 11, "the last tokens need no K and V"
    outs, backs = ([swap for swap in w.swaps if swap.out is way] for way in (True, False))
    assert [swap.slots for swap in backs] == [swap.slots for swap in outs]
    again = [new for batch in w.batches for new in batch.new if new.id == 2][1]
    assert len(again.token_ids) > 3 and again.num_prompt == 3


def test_where_copies_are_dear_or_there_is_no_room_it_is_computed_again() -> None:
    for space in (
        SwapSpace(num_slots=100, copy_seconds=9.0, token_seconds=1.0),
        msgspec.structs.replace(FREE, num_slots=1),
    ):
        w = world(msgspec.structs.replace(DEFAULT, prefix_cache=False), swap=space, max_batch_size=2)
        w.submit((1,) * 7, 12)
        w.submit((2,) * 7, 12)
        w.drain()
        assert w.scheduler.num_preemptions > 0
        assert w.swaps == []
        assert w.num_computed > 2 * (7 + 11)


@pytest.mark.parametrize(("num_slots", "is_moved"), [(2, False), (3, True)])
def test_the_swap_space_is_used_to_its_last_slot(num_slots: int, is_moved: bool) -> None:
    swap = msgspec.structs.replace(FREE, num_slots=num_slots)
    kv = KVCacheManager(8, 4, prefix_cache=False, swap=swap)
    new = NewRequest(id=1, token_ids=(1,) * 12, num_prompt=12, max_tokens=4, params=SamplingParams())
    request = Request(new, 0)
    assert kv.admit(request, 12)
    request.num_computed = 9
    assert kv.swap_out(request) is is_moved
    assert (kv.swap.slots.num_held, len(request.block_table)) == ((3, 0) if is_moved else (0, 3))


def test_the_room_of_who_is_aborted_while_swapped_out_is_free() -> None:
    w = world(swap=FREE, max_batch_size=2)
    w.submit((1,) * 7, 12)
    second = w.submit((2,) * 3, 12)
    while not w.scheduler.kv.swap.num_swapped:
        w.step()
    assert w.scheduler.kv.swap.slots.num_held > 0
    w.abort(second)
    w.step()
    assert w.scheduler.kv.swap.slots.num_held == 0
    w.drain()


def test_who_has_been_swapped_out_comes_back_before_those_behind_it() -> None:
    w = world(swap=FREE, max_batch_size=2)
    w.submit((1,) * 7, 12)
    w.submit((2,) * 3, 12)
    while not w.scheduler.kv.swap.num_swapped:
        w.step()
    w.submit((3,), 2)
    w.drain()
    rows = [row.id for batch in w.batches for row in batch.rows]
    assert rows.index(3) > max(i for i, id in enumerate(rows) if id == 2 and rows[i - 1] == 1)


def test_a_shared_prefix_is_in_the_swap_space_once() -> None:
    """Two that share three blocks make way for a third."""
    w = world(swap=FREE, num_blocks=16, max_batch_size=3)
    w.submit((1,) * 9, 40)
    for last in (7, 8):
        w.submit((*(5,) * 12, last), 40)
    seen = []
    while w.scheduler.requests or w.commands:
        w.step()
        seen += [[one.swap_slots for one in w.scheduler.waiting]]
    [first, second] = max(seen, key=len)
    assert first[:3] == second[:3] and not set(first[3:]) & set(second[3:])
    assert len(first) > 3 and len(second) > 3


def test_scores_of_a_prompt_outlive_a_swap() -> None:
    """The oracle wants each prompt position once: those scored before are kept, and not computed again."""
    w = world(swap=FREE, max_batch_tokens=2, num_blocks=8, max_batch_size=2)
    w.submit((1,) * 4, 26)
    scored = w.submit(tuple(range(16)), 4, params=SamplingParams(prompt_logprobs=0))
    w.drain()
    assert w.scheduler.kv.swap.num_swapped == 1
    assert sum(count for _, count in w.rows_of(scored)) == 16 + 3


# -- admission by expected length


def learned(risk: float | None, leavers: int = 0) -> Seen:
    """After twenty answers of 24 tokens, and some whose clients left after three."""
    policy = msgspec.structs.replace(DEFAULT, risk=risk, prefix_cache=False)
    w = world(policy, num_blocks=24, max_batch_size=24, max_batch_tokens=100)
    for token in range(20):
        w.submit((token,) * 4, 24)
    w.drain()
    for token in range(leavers):
        leaver = w.submit((token,) * 4, 24)
        w.step(3)
        w.abort(leaver)
        w.step()
    return w


@pytest.mark.parametrize(("risk", "leavers", "at_once"), [(None, 0, 12), (0.1, 0, 3), (0.1, 40, 3)])
def test_admission_counts_on_the_length_of_the_answers_before(risk: float | None, leavers: int, at_once: int) -> None:
    """Each is to become 28 tokens in 7 of 24 blocks; who left taught nothing."""
    w = learned(risk, leavers)
    before = w.scheduler.num_preemptions
    for token in range(12):
        w.submit((token,) * 4, 24)
    w.step()
    assert len(w.scheduler.running) == at_once
    w.drain()
    assert (w.scheduler.num_preemptions == before) == (risk is not None)


def test_with_nothing_learnt_a_block_is_left_for_each() -> None:
    policy = msgspec.structs.replace(DEFAULT, risk=0.1, prefix_cache=False)
    w = world(policy, num_blocks=24, max_batch_size=24, max_batch_tokens=100)
    for token in range(13):
        w.submit((token,) * 4, 24)
    w.step()
    assert len(w.scheduler.running) == 12
    w.drain()


@pytest.mark.parametrize("text", ["default,risk=0", "default,risk=1", "default,risk=much", "orca,risk=0.1"])
def test_a_risk_that_is_none_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(OrderError, match="risk") as caught:
        parse_policy(text)
    assert "\n" not in str(caught.value)


def test_a_risk_is_an_option_of_a_policy() -> None:
    assert parse_policy("default,risk=0.25").risk == 0.25
    assert parse_policy("fcfs, risk = 0.25").risk == 0.25
    assert parse_policy("default").risk is None


# -- prompts that are being computed


def test_sixteen_choices_compute_their_prompt_once() -> None:
    w = world(max_batch_size=16, max_batch_tokens=512, num_blocks=400, block_size=16)
    prompt = tuple(token % 40 for token in range(2000))
    for choice in range(16):
        w.submit(prompt, 5, choice=choice)
    w.drain()
    alone = 2000 + 4
    rest = 16 + 4  # from the last full block before the prompt's last token
    assert w.num_computed == alone + 15 * rest


def test_others_go_on_while_one_waits_for_a_prefix() -> None:
    w = world(max_batch_tokens=8, num_blocks=64)
    w.submit(tuple(range(15)), 3)
    twin = w.submit(tuple(range(15)), 3)
    other = w.submit((30, 31), 3)
    w.step(2)
    assert w.rows_of(twin) == [] and w.rows_of(other) == [(0, 1)]
    w.step()
    assert w.rows_of(twin) == [(12, 3)]
    w.drain()


def test_one_that_reads_is_aborted_and_who_waits_for_it_reads_itself() -> None:
    w = world(max_batch_tokens=8, num_blocks=64)
    reader = w.submit(tuple(range(31)), 3)
    twin = w.submit(tuple(range(31)), 3)
    w.step(2)
    assert w.rows_of(twin) == []
    w.abort(reader)
    w.step()
    assert w.rows_of(twin) == [(16, 8)]
    w.drain()


def test_one_that_reads_is_preempted_and_nobody_waits_for_ever() -> None:
    """The reader makes way for an older one; its twin is not held back by one that does not run."""
    w = world(max_batch_tokens=4, num_blocks=12)
    for token in (1, 2):
        w.submit((token,) * 3, 20)
    w.step(4)
    for _ in range(2):
        w.submit(tuple(range(20)), 4)
    w.drain()
    assert w.scheduler.num_preemptions > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_prefix_of_part_of_a_prompt_is_waited_for_only_as_far_as_it_goes(depth: int) -> None:
    w = world(max_batch_tokens=8, num_blocks=64, depth=depth)
    w.submit(tuple(range(32)), 2)
    half = w.submit((*range(16), 39, 38, 37, 36, 35), 2)
    w.drain()
    assert w.rows_of(half)[0][0] == 16


def test_other_salts_are_not_waited_for() -> None:
    w = world(max_batch_tokens=40, num_blocks=64)
    w.submit(tuple(range(15)), 3)
    other = w.submit(tuple(range(15)), 3, cache_salt="another")
    w.step()
    assert w.rows_of(other) == [(0, 15)]
    w.drain()
