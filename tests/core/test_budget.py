"""How many rows and tokens a batch gets of several in flight: decodes at once, prompts over some turns of the pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import pytest

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.budget import TURNS, Budget
from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.order import Waiting
from orcaserve.core.pace import SMALLEST_CHUNK, Pace
from orcaserve.core.policy import DEFAULT
from orcaserve.core.request import NewRequest, Request, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig

ROWS, TOKENS = 4, 1000  # of a batch


def request(id: int, prompt: int, lag: int | None = None) -> Request:
    """One that has so much left to compute; all of it, if nothing is said."""
    params = SamplingParams()
    made = Request(NewRequest(id=id, token_ids=(1,) * prompt, num_prompt=prompt, max_tokens=9, params=params), id)
    made.num_computed = 0 if lag is None else prompt - lag
    return made


def running(decodes: int, lags: Sequence[int] = ()) -> list[Request]:
    made = [request(id, 20, 1) for id in range(decodes)]
    return made + [request(100 + number, lag) for number, lag in enumerate(lags)]


def waiting(*prompts: int) -> Waiting:
    made = Waiting(DEFAULT.make_order())
    for number, prompt in enumerate(prompts):
        made.add(request(200 + number, prompt))
    return made


def tokens(budget: Budget, runs: list[Request], waits: Waiting) -> int:
    return budget.tokens(runs, waits, KVCacheManager(10, 16, prefix_cache=True))


def new_budget(lanes: int = 2) -> Budget:
    return Budget(DEFAULT, lanes, ROWS, TOKENS, None, 0.125)


def test_one_batch_in_flight_takes_all() -> None:
    budget = new_budget(1)
    assert (budget.rows(running(1)), tokens(budget, running(1, [50]), waiting())) == (ROWS, TOKENS)


def test_rows_are_dealt_out() -> None:
    assert [new_budget().rows(running(count)) for count in (1, 2, 3, 7, 8, 20)] == [1, 1, 2, 4, 4, 4]
    assert new_budget(3).rows(running(7)) == 3


@pytest.mark.parametrize(
    ("decodes", "turns"),
    [(0, 1.0), (4, 1 + (TURNS - 1) / 2), (8, TURNS), (16, TURNS)],
)
def test_the_more_rows_decode_the_more_thinly_prompts_are_spread(decodes: int, turns: float) -> None:
    """Of eight rows in two batches. 900 tokens of a prompt are left."""
    found = tokens(new_budget(), running(decodes, [900]), waiting())
    assert found == -(-(decodes + 900 / turns) // 2)


def test_prompts_that_wait_count_as_far_as_there_are_rows_and_room() -> None:
    assert tokens(new_budget(), running(0, [300]), waiting(100)) == 200
    many = [100] * 20
    assert tokens(new_budget(), running(0, [300]), waiting(*many)) == (300 + 7 * 100) // 2, "eight rows"
    assert tokens(new_budget(), running(0, [300]), waiting(1700, 900, 900)) == TOKENS, "and no more than fits"


def test_what_is_in_flight_counts_until_it_is_back() -> None:
    budget, batch = new_budget(), Batch(0, (ScheduledRequest(1, 0, 60), ScheduledRequest(2, 7, 1)))
    budget.submitted(batch, 0.0)
    assert tokens(budget, running(0, [300]), waiting()) == -(-361 // 2)
    budget.returned(batch, 1.0)
    assert tokens(budget, running(0, [300]), waiting()) == 150
    assert tokens(budget, running(0, [3]), waiting()) == SMALLEST_CHUNK, "less is not worth an iteration"


def new(id: int, prompt: int, output: int) -> NewRequest:
    ids, params = tuple(range(id, id + prompt)), SamplingParams()
    return NewRequest(id=id, token_ids=ids, num_prompt=prompt, max_tokens=output, params=params)


def limited(**changes: int) -> Scheduler:
    fields = {"max_batch_size": 8, "max_batch_tokens": 512, "num_blocks": 2000, "block_size": 16} | changes
    return Scheduler(msgspec.structs.replace(SchedulerConfig(policy=DEFAULT, **fields), max_itl=0.1))


def test_a_prompt_that_runs_is_cut_beside_streams_though_nobody_waits() -> None:
    """It is let in beside a stream, and goes on alone with it: the stream's limit of time holds all along."""
    scheduler = limited()
    budget, kv, nobody = scheduler.budget, scheduler.kv, Waiting(DEFAULT.make_order())
    assert budget.tokens(running(0, [2000]), nobody, kv) == 512, "no stream waits for it"
    assert budget.tokens(running(2, [2000]), nobody, kv) == 2 + SMALLEST_CHUNK, "as long as no time is known"
    assert budget.tokens(running(2), waiting(2000), kv) == 2 + SMALLEST_CHUNK
    assert budget.tokens(running(2), nobody, kv) == 512, "there is nothing to cut"


class Asked(Pace):
    """Notes what it is asked."""

    def prompt_tokens(self, decodes: int, context: int, prompts: Iterable[tuple[int, int]], most: int) -> int:
        self.question = decodes, context, list(prompts), most
        return 0


def test_the_pace_is_asked_about_what_decodes_read_and_which_prompts_come() -> None:
    """A decode at position 19 reads the K and V of twenty tokens, its own included."""
    scheduler = limited(max_batch_size=6)
    scheduler.budget.pace = pace = Asked(0.1, 1)
    assert scheduler.budget.tokens(running(3, [2000, 70]), waiting(9, 10), scheduler.kv) == 3
    assert pace.question == (3, 3 * 20, [(0, 2000), (0, 70), (0, 9)], 512 - 3), "there is a row for one that waits"
