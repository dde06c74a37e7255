"""The time limit: what it learns of iterations, how it cuts prompts, and that it changes no answer."""

from __future__ import annotations

import itertools
import random
import statistics

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_world import World, random_config, random_request

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.pace import LEAST_SHARE, SMALLEST_CHUNK, IterationCost, Pace, load_of
from orcaserve.core.policy import DEFAULT, ORCA
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop

TERMS = st.tuples(
    st.floats(1e-6, 3e-3),  # a token of a prompt
    st.floats(1e-4, 5e-2),  # an iteration
    st.floats(0, 1e-3),  # a decode
    st.floats(0, 1e-6),  # a token read
    st.floats(0, 3e-7),  # a pair
)


def rows(decodes: int, context: int, chunk: int = 0, start: int = 0) -> tuple[ScheduledRequest, ...]:
    """Decodes with so much context each, and one chunk of a prompt."""
    found = [ScheduledRequest(id, context - 1, 1) for id in range(decodes)]
    return (*found, ScheduledRequest(decodes, start, chunk)) if chunk else tuple(found)


def some(rng: random.Random) -> tuple[ScheduledRequest, ...]:
    reads = rng.random() < 0.4
    return rows(
        rng.randint(0 if reads else 1, 32),
        rng.randint(1, 4000),
        rng.randint(2, 512) if reads else 0,
        rng.randint(0, 4000),
    )


def cost_of(terms: tuple[float, ...], of: tuple[ScheduledRequest, ...]) -> float:
    return sum(a * b for a, b in zip(terms, load_of(of), strict=True))


@settings(deadline=None, max_examples=25)
@given(terms=TERMS, seed=st.integers(0, 2**32), noise=st.sampled_from([0.0, 0.05, 0.15]))
def test_costs_are_learned_in_spite_of_noise_and_disturbances(
    terms: tuple[float, ...], seed: int, noise: float
) -> None:
    rng = random.Random(seed)
    cost = IterationCost()
    for _ in range(600):
        of = some(rng)
        disturbed = rng.choice([3, 10, 100]) if rng.random() < 0.03 else 1
        cost.learn(load_of(of), cost_of(terms, of) * rng.lognormvariate(0, noise) * disturbed)
    errors = [abs(cost(load_of(of)) / cost_of(terms, of) - 1) for of in (some(rng) for _ in range(200))]
    assert statistics.median(errors) < 0.03 + 0.6 * noise, statistics.median(errors)
    assert sorted(errors)[189] < 0.1 + 1.2 * noise, sorted(errors)[189]


@settings(deadline=None, max_examples=50)
@given(
    terms=st.tuples(*[st.floats(1e-3, 1.0)] * 5),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 50),
    count=st.integers(1, 400),
)
def test_the_longest_chunk_within_a_time_is_the_one_that_takes_it(
    terms: tuple[float, ...], seed: int, start: int, count: int
) -> None:
    """Exact for each of its terms, and nothing of the iteration's own time or of its decodes is in it."""
    rng, cost = random.Random(seed), IterationCost()
    for _ in range(200):
        of = some(rng)
        cost.learn(load_of(of), cost_of(terms, of))
    takes = cost.of_chunk(start, count)
    chunk = rows(0, 0, count, start)
    alone = load_of(chunk)._replace(batches=0, decodes=0, tokens=count, pairs=sum(range(start + 1, start + count + 1)))
    assert takes == pytest.approx(cost(alone))
    assert cost.tokens_within(takes * (1 + 1e-9), start) == count
    assert cost.tokens_within(takes * (1 - 1e-9), start) == count - 1


def test_a_load_counts_every_pair_of_query_and_key() -> None:
    """Three tokens of a prompt from the fourth position on see 5, 6 and 7 keys; a decode's pairs are its context."""
    assert load_of([ScheduledRequest(1, 4, 3), ScheduledRequest(2, 9, 1)]) == (3, 1, 1, 7 + 10, 5 + 6 + 7)


def test_iterations_that_overlap_cost_as_much_as_one_after_the_other() -> None:
    """One is made while the one before it runs: its time is from that one's return to its own."""
    terms, rng, now = (1e-3, 1e-2, 1e-4, 1e-7, 1e-8), random.Random(0), 0.0
    pace = Pace(0.1, 1)
    ahead = some(rng)
    pace.submitted(Batch(0, ahead), now)
    for _ in range(600):
        of, ahead = ahead, some(rng)
        pace.submitted(Batch(0, ahead), now)
        now += cost_of(terms, of)
        pace.returned(now)
    errors = sorted(abs(pace.cost(load_of(of)) / cost_of(terms, of) - 1) for of in (some(rng) for _ in range(100)))
    assert errors[90] < 0.05, errors[90]


class Device:
    """A pace of 100 ms, and a clock that goes on by what iterations take."""

    def __init__(self, terms: tuple[float, ...] | None = None, pace: Pace | None = None) -> None:
        self.pace = pace or Pace(0.1, 1)
        self.now = 0.0
        rng = random.Random(0)
        for _ in range(400 if terms else 0):
            of = some(rng)
            self.turn(of, cost_of(terms, of))

    def turn(self, of: tuple[ScheduledRequest, ...], seconds: float) -> None:
        self.pace.submitted(Batch(0, of), self.now)
        self.now += seconds
        self.pace.returned(self.now)

    def chunk(self, start: int = 0, most: int = 512) -> int:
        """Of a long prompt beside eight decodes."""
        return self.pace.prompt_tokens(8, 800, [(start, 10**6)], most)


@settings(deadline=None, max_examples=30)
@given(terms=TERMS, decodes=st.integers(1, 64), context=st.integers(1, 4000), start=st.integers(0, 8000))
def test_a_chunk_fills_the_time_that_decodes_leave_and_no_more(
    terms: tuple[float, ...], decodes: int, context: int, start: int
) -> None:
    """Attention is part of it: the later a chunk begins, the shorter it is."""
    pace = Device(terms).pace
    alone = cost_of(terms, rows(decodes, context))
    count = pace.prompt_tokens(decodes, decodes * context, [(start, 10**6)], 10**6)
    whole = cost_of(terms, rows(decodes, context, count, start))
    limit = max(0.1, alone * (1 + LEAST_SHARE))
    assert count == 1 or whole <= 1.15 * limit
    longer = cost_of(terms, rows(decodes, context, 2 * count, start))
    assert count >= 1000 or longer >= 0.8 * limit, "and what is left is used"
    assert pace.prompt_tokens(decodes, decodes * context, [(start + 4000, 10**6)], 10**6) <= count


CPU = (1e-3, 1.5e-2, 2e-4, 2e-7, 1e-8)


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_prompts_get_their_share_where_decodes_alone_take_too_long(share: float) -> None:
    device = Device(CPU, Pace(0.01, 1, share))
    alone = cost_of(CPU, rows(8, 100))
    assert alone > 0.01
    added = cost_of(CPU, rows(8, 100, device.chunk())) - alone
    assert 0.85 * share < added / alone < 1.1 * share


def test_only_as_many_prompts_are_asked_for_as_there_is_time() -> None:
    pace = Device(CPU).pace
    prompts = iter([(0, 20), (0, 10**6), (0, 1), (0, 2)])
    assert 60 < pace.prompt_tokens(8, 800, prompts, 512) < 85
    assert list(prompts) == [(0, 1), (0, 2)], "the second one's next token does not fit, and nobody goes before it"


def test_prompts_share_the_time() -> None:
    pace = Device(CPU).pace
    whole = pace.prompt_tokens(8, 800, [(0, 10**6)], 512)
    assert 60 < whole < 85
    assert abs(pace.prompt_tokens(8, 800, [(0, 20), (0, 30), (0, 10**6)], 512) - whole) <= 2
    assert pace.prompt_tokens(8, 800, [(0, 20), (0, 30)], 512) == 50
    assert pace.prompt_tokens(8, 800, [(0, 10**6)], 40) == 40


def test_it_begins_with_a_small_chunk_that_grows_as_times_become_known() -> None:
    device = Device()
    sizes = []
    for _ in range(8):
        sizes.append(device.chunk())
        device.turn(rows(8, 100, sizes[-1]), 1e-2 + 1e-5 * sizes[-1])
    assert sizes[0] == SMALLEST_CHUNK
    assert all(after <= 2 * before for before, after in itertools.pairwise(sizes))
    assert sizes[-1] == 512


def test_one_disturbed_iteration_changes_little() -> None:
    device = Device(CPU)
    before = device.chunk()
    of = rows(8, 100, before)
    device.turn(of, 50 * cost_of(CPU, of))
    assert device.chunk() >= 0.9 * before
    device.turn(of, 3600.0)  # the machine slept
    assert device.chunk() >= 0.8 * before


def test_a_device_that_gets_slower_or_quicker_is_followed() -> None:
    device = Device(CPU)
    before = device.chunk()
    for times in (3, 1):
        for _ in range(400):
            of = rows(8, 100, device.chunk())
            device.turn(of, times * cost_of(CPU, of))
        reached = times * cost_of(CPU, rows(8, 100, device.chunk()))
        assert 0.085 < reached < 0.115, f"{times} times as slow: {reached} s"
    assert device.chunk() >= 0.85 * before


def test_decodes_alone_are_followed_too() -> None:
    """Some of them at a time: one tells little that the last did not."""
    device = Device(CPU)
    of = rows(8, 100)
    for times in (3, 1):
        for _ in range(600):
            device.turn(of, times * cost_of(CPU, of))
        assert device.pace.cost(load_of(of)) == pytest.approx(times * cost_of(CPU, of), rel=0.1)


def test_an_hour_of_decodes_does_not_wash_out_what_prompts_cost() -> None:
    device = Device(CPU)
    before = device.chunk(1000)
    for step in range(20_000):
        of = rows(8, 100 + step // 100)
        device.turn(of, cost_of(CPU, of))
    of = rows(8, 300, 40)
    device.turn(of, 8 * cost_of(CPU, of))  # the first one after it is disturbed
    assert 0.8 * before <= device.chunk(1000) <= 1.25 * before


class Jumping(World):
    """A ledger world whose clock stands still, goes on, or jumps."""

    def __init__(self, config: SchedulerConfig, rng: random.Random) -> None:
        self.rng = rng
        super().__init__(config, eager=rng.random() < 0.5)
        self.loop = EngineLoop(self.scheduler, self.executor, self, self, self.clock)

    def clock(self) -> float:
        self.now += self.rng.choice([0.0, 0.0, 1e-6, 1e-3, 1e-3, 1e-2, 1.0, 1e6])
        return self.now


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_answers_do_not_depend_on_it(first: int) -> None:
    cut = 0
    for seed in range(first, first + 20):
        rng = random.Random(seed)
        max_itl = rng.choice([1e-9, 1e-3, 1e-2, 0.3, 1e3])
        config = msgspec.structs.replace(random_config(rng, "default"), max_itl=max_itl)
        world = Jumping(config, rng)
        try:
            for _ in range(rng.randint(1, 25)):
                for _ in range(rng.choice([0, 1, 1, 2, 5])):
                    world.submit(**random_request(rng, world))
                if world.requests and rng.random() < 0.15:
                    world.abort(rng.choice(sorted(world.requests)))
                world.step(rng.randint(0, 12))
                cut += sum(1 < request.lag < request.new.num_prompt for request in world.scheduler.running)
            world.drain()
        except BaseException:
            print(f"seed {seed}")
            raise
        assert not world.scheduler.budget.pace._flying, "every batch is accounted for"
    assert cut > 10


def request(id: int, prompt: int, output: int) -> NewRequest:
    return NewRequest(
        id=id, token_ids=tuple(range(id, id + prompt)), num_prompt=prompt, max_tokens=output, params=SamplingParams()
    )


def config(max_itl: float, **changes: int) -> SchedulerConfig:
    fields = {"max_batch_size": 8, "max_batch_tokens": 512, "num_blocks": 2000, "block_size": 16} | changes
    return SchedulerConfig(policy=DEFAULT, max_itl=max_itl, **fields)


def test_where_nobody_decodes_prompts_take_whole_batches() -> None:
    scheduler = Scheduler(config(1e-9))
    scheduler.add(request(1, 2000, 5))
    batch = scheduler.schedule(0.0)
    assert batch is not None and batch.num_tokens == 512


@pytest.mark.parametrize("max_itl", [0.0, -1.0, float("inf"), float("nan")])
def test_a_limit_that_is_none_is_refused(max_itl: float) -> None:
    with pytest.raises(ValueError, match="seconds above 0"):
        Scheduler(config(max_itl))


def test_a_policy_that_takes_prompts_whole_has_no_limit() -> None:
    with pytest.raises(ValueError, match="'orca' takes them whole"):
        Scheduler(msgspec.structs.replace(config(0.1), policy=ORCA))
