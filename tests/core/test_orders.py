"""What each order promises, said with small examples, and what all of them keep in random and in all small worlds."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import msgspec
import pytest
from ledger_world import ORDERS as TEXTS
from ledger_world import VOCAB, World, random_config, random_life, random_request
from order_world import started, world

from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.order import Order, OrderError, OrderOptions, Waiting
from orcaserve.core.orders import ORDERS
from orcaserve.core.policy import parse_policy
from orcaserve.core.request import NewRequest, Request, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig

# -- priority ----------------------------------------------------------------------------------------------------


def test_priority_the_lower_goes_first() -> None:
    w = world("priority", max_batch_size=1)
    first = w.submit((1,), 3)
    w.step()
    ids = [w.submit((1,), 2, priority=priority) for priority in (5, 1, 3, 1)]
    w.drain()
    assert started(w) == [first, ids[1], ids[3], ids[2], ids[0]]


def test_priority_takes_a_row_of_the_least_urgent_and_gives_it_back() -> None:
    w = world("priority")
    low = [w.submit((1,), 6, priority=priority) for priority in (2, 1)]
    w.step(2)
    high = w.submit((2,), 2)
    w.step()
    assert sorted(w.rows[-1]) == sorted([low[1], high])
    w.step(2)
    assert sorted(w.rows[-1]) == sorted(low), "it goes on as soon as there is a row"
    assert w.scheduler.num_preemptions == 1
    w.drain()


def test_priority_takes_kv_of_as_many_as_it_needs_and_no_more() -> None:
    w = world("priority", max_batch_size=8, num_blocks=9, block_size=4)
    low = [w.submit((token,) * 7, 9, priority=token) for token in (1, 2, 3)]  # two blocks each
    w.step()
    high = w.submit((9,) * 11, 2)  # three blocks, and a spare one for each that runs: three are free
    w.step()
    assert set(w.rows[-1]) == {low[0], low[1], high}
    assert w.scheduler.num_preemptions == 1
    w.drain()


def test_priority_counts_only_blocks_that_nobody_else_holds() -> None:
    w = world("priority", max_batch_size=8, num_blocks=9, block_size=4)
    prompt = tuple(range(8))
    w.submit((*prompt, 11), 5, priority=1)
    w.step()
    w.submit((*prompt, 12), 5, priority=2)  # shares two blocks of three
    w.step()
    assert w.scheduler.kv.pool.num_held == 4
    high = w.submit(tuple(range(19, 40)), 2)  # six blocks: the last one's own block and spare one are too few
    w.step()
    assert w.rows[-1] == [high] and w.scheduler.num_preemptions == 2
    w.drain()


def test_priority_preempts_nobody_in_vain() -> None:
    w = world("priority", max_batch_size=8, num_blocks=8, block_size=4)
    urgent = w.submit((1,) * 19, 5, priority=0)  # five blocks, then six
    low = w.submit((2,) * 2, 4, priority=2)
    w.step()
    w.submit((3,) * 11, 2, priority=1)  # would not fit beside the urgent one and a block to spare
    w.step(2)
    assert w.rows[-1] == [urgent, low] and w.scheduler.num_preemptions == 0
    w.drain()


def test_priority_equals_do_not_take_each_others_place() -> None:
    w = world("priority")
    for _ in range(5):
        w.submit((1,), 5, priority=1)
        w.step()
    w.drain()
    assert w.scheduler.num_preemptions == 0


def test_priority_who_waits_gets_more_urgent() -> None:
    """Five seconds make up for a level; after that even one that runs does not make way."""
    for seconds, expected in [(4.0, 1), (6.0, 0)]:
        w = world("priority,ageing=5", max_batch_size=1)
        w.submit((1,), 20, priority=1)
        w.step()
        w.now += seconds
        w.submit((1,), 2, priority=0)
        w.drain()
        assert w.scheduler.num_preemptions == expected
    w = world("priority,ageing=inf", max_batch_size=1)
    w.submit((1,), 20, priority=1)
    w.step()
    w.now += 1e6
    w.submit((1,), 2, priority=0)
    w.drain()
    assert w.scheduler.num_preemptions == 1


def test_priority_who_is_in_flight_stays() -> None:
    """Another one makes way instead, though it comes before the one in flight."""
    w = world("priority", max_batch_size=1, depth=2)
    scheduler = w.scheduler
    new = NewRequest(id=1, token_ids=(1,), num_prompt=1, max_tokens=9, params=SamplingParams(), priority=1)
    scheduler.add(new)
    scheduler.add(msgspec.structs.replace(new, id=2, priority=2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [row.id for batch in (first, second) for row in batch.rows] == [1, 2]
    scheduler.update(first, w.executor.submit(first).result())
    scheduler.add(msgspec.structs.replace(new, id=3, priority=0))
    third = scheduler.schedule()
    assert [row.id for row in third.rows] == [3] and scheduler.num_preemptions == 1
    assert [request.id for request in scheduler.running] == [3, 2]


def test_priority_an_urgent_prompt_goes_before_one_that_is_being_read() -> None:
    """There are rows and memory, so that nobody is preempted; but the tokens of an iteration are the urgent one's."""
    w = world("priority", max_batch_size=4, max_batch_tokens=8)
    long = w.submit(tuple(range(30)), 1, priority=1)
    w.step()
    urgent = w.submit((1, 2, 3), 1)
    w.step()
    assert w.rows[-1] == [urgent, long] and w.scheduler.num_preemptions == 0
    w.drain()


def test_priority_without_preemption_waits_for_a_row() -> None:
    w = world("priority,preempt=false", max_batch_size=1)
    w.submit((1,), 5, priority=9)
    w.step()
    w.submit((1,), 1)
    w.drain()
    assert w.scheduler.num_preemptions == 0


# -- deadline ----------------------------------------------------------------------------------------------------


def test_deadline_the_earliest_goes_first_inside_a_class() -> None:
    w = world("deadline,default=10", max_batch_size=1)
    first = w.submit((1,), 3)
    w.step()
    late, none, early = (w.submit((1,), 1, deadline=deadline) for deadline in (20.0, None, 3.0))
    urgent = w.submit((1,), 1, deadline=99.0, priority=-1)
    w.drain()
    assert started(w) == [first, urgent, early, none, late]


def test_deadline_who_has_waited_is_due_before_who_comes_later() -> None:
    w = world("deadline", max_batch_size=1)
    first = w.submit((1,), 3)
    w.step()
    old = w.submit((1,), 1, deadline=5.0)
    w.step()
    w.now += 3.0
    new = w.submit((1,), 1, deadline=4.0)
    w.drain()
    assert started(w) == [first, old, new]


# -- shortest ----------------------------------------------------------------------------------------------------


def taught() -> World:
    """Answers to tenant "short" have one token and those to "long" thirty; it has seen how long both take."""
    w = world("shortest,guard=1", max_batch_size=1, num_blocks=400)
    w.pace = 0.01
    for _ in range(12):
        w.submit((1, 2), 30, tenant="long")
        w.submit((1, 2), 30, tenant="short", end_token_ids=tuple(range(VOCAB)))
        w.drain()
    w.rows.clear()
    return w


def test_shortest_goes_by_what_it_has_learnt() -> None:
    w = taught()
    long = [w.submit((1, 2), 30, tenant="long") for _ in range(3)]
    w.step()
    short = [w.submit((1, 2), 30, tenant="short", end_token_ids=tuple(range(VOCAB))) for _ in range(3)]
    w.drain()
    assert started(w) == [long[0], *short, *long[1:]]


def test_shortest_who_is_long_waits_about_twice_as_long_at_most() -> None:
    """Thirty iterations for the one before it, and as many for short ones, of which another comes every time."""
    w = taught()
    long = [w.submit((1, 2), 30, tenant="long") for _ in range(2)]
    steps = 0
    while long[1] not in started(w):
        w.submit((1, 2), 1, tenant="short")
        w.step()
        steps += 1
    assert 33 < steps <= 65
    w.drain()


# -- mlfq --------------------------------------------------------------------------------------------------------


def test_mlfq_who_has_had_much_makes_way_for_who_has_had_little() -> None:
    w = world("mlfq,quantum=8,output=1,levels=4", max_batch_size=1)
    long = w.submit((1,), 40)
    w.step(4)
    early = w.submit((2,), 1)
    w.step()
    assert w.rows[-1] == [long], "within its quantum it stays"
    w.step(6)
    assert early in [id for rows in w.rows for id in rows], "then it makes way"
    w.drain()
    assert w.scheduler.num_preemptions == 1


def test_mlfq_the_tokens_of_who_makes_way_are_there_for_who_comes() -> None:
    """Two tokens a batch, both of those that run: one of them makes way, though no token is left as it is."""
    w = world("mlfq,quantum=8,output=1,levels=4", max_batch_size=2, max_batch_tokens=2)
    long = [w.submit((id,), 40) for id in (1, 2)]
    w.step(20)
    assert w.rows[-1] == long
    early = w.submit((3,), 2)
    w.step(2)
    assert w.rows[-2:] == [[early, long[0]]] * 2
    w.drain()


def test_mlfq_a_long_prompt_joins_further_down() -> None:
    w = world("mlfq,quantum=8,output=1,levels=4", max_batch_size=1)
    first = w.submit((1,), 3)
    w.step()
    long = w.submit(tuple(range(30)), 1)
    short = w.submit((2,), 1)
    w.drain()
    assert started(w) == [first, short, long]


def test_mlfq_a_level_is_left_when_its_quantum_is_used_up_and_no_sooner() -> None:
    """Quanta of 8, 16 and 32, of which the prompt has taken 3."""
    order = parse_policy("mlfq,quantum=8,output=1,levels=4,ageing=10").make_order()
    new = NewRequest(id=1, token_ids=(1, 2, 3), num_prompt=3, max_tokens=99, params=SamplingParams())
    request = Request(new, 1, arrived=100.0)
    request.key = order.key(request, 100.0)
    keys = [request.key]
    for token in range(60):
        request.token_ids.append(token)
        order.served(request, 1, 1)
        keys.append(request.key)
    assert keys == [100.0] * 5 + [110.0] * 16 + [120.0] * 32 + [130.0] * 8


def test_mlfq_has_a_last_level() -> None:
    """There nobody makes way for equals any more, so that the number of preemptions is bounded."""
    w = world("mlfq,quantum=1,output=1,levels=3", max_batch_size=1, num_blocks=200)
    for _ in range(5):
        w.submit((1,), 60)
        w.step()
    w.drain()
    assert w.scheduler.num_preemptions <= 5 * 2


@pytest.mark.parametrize(
    ("levels", "prompt", "generated", "level"),
    [
        (3, 9, 0, 0),  # the first quantum is 10
        (3, 10, 0, 1),
        (3, 1, 4, 0),  # a generated token counts as two
        (3, 2, 4, 1),
        (3, 29, 0, 1),
        (3, 30, 0, 2),
        (3, 900, 0, 2),  # the last
        (1, 900, 9, 0),
        (64, 150, 0, 4),
    ],
)
def test_mlfq_a_level_is_what_service_says(levels: int, prompt: int, generated: int, level: int) -> None:
    order = parse_policy(f"mlfq,quantum=10,output=2,ageing=7,levels={levels}").make_order()
    ids = (1,) * (prompt + generated)
    new = NewRequest(id=1, token_ids=ids, num_prompt=prompt, max_tokens=99, params=SamplingParams())
    assert order.key(Request(new, 0, arrived=3.0), now=5.0) == 3.0 + 7 * level


@pytest.mark.parametrize("text", ["priority,ageing=0", "deadline,default=0", "shortest,output=0,guard=0"])
def test_a_number_from_0_may_be_0(text: str) -> None:
    w = world(text)
    for priority in (3, 0, 1):
        w.submit((1, 2), 2, priority=priority)
    w.drain()


# -- all of them -------------------------------------------------------------------------------------------------


def test_every_order_has_a_default_for_every_option_and_says_what_it_is() -> None:
    for name, order in ORDERS.items():
        assert parse_policy(name).make_order().__class__ is order
        assert order.__doc__ and order.Options.__doc__
    assert parse_policy("fcfs") == parse_policy("default")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fastest", "there is no policy 'fastest'"),
        ("orca,order=fastest", "there is no order 'fastest'"),
        ("fair,weight=a:1", "its options: input, output, credit, weights"),
        ("fair,weights=a", "'a' is no tenant:weight"),
        ("fair,weights=a:0", "weight above 0"),
        ("fair,input=nan", "numbers from 0"),
        ("fair,credit=-1", "credit is a number from 0"),
        ("fair,credit=inf", "credit is a number from 0"),
        ("fair,input=0,output=0", "one of them is above"),
        ("fair,input=-1", "numbers from 0"),
        ("fair,output=-1,input=9", "numbers from 0"),
        ("priority,ageing=-1", "from 0, or inf"),
        ("priority,ageing=soon", "order 'priority'"),
        ("deadline,default=inf", "a number of seconds"),
        ("mlfq,levels=0", "from 1 to 64"),
        ("mlfq,levels=65", "from 1 to 64"),
        ("shortest,output=inf", "numbers from 0"),
        ("shortest,guard=inf", "numbers from 0"),
        ("mlfq,quantum=0", "quantum and output are above 0"),
        ("mlfq,output=0", "quantum and output are above 0"),
        ("shortest,guard=-1", "numbers from 0"),
        ("fcfs,fast=1", "its options: none"),
        ("fair,weights", "write NAME,option=value"),
        ("orca,order=priority", "who runs has reserved its room, but order 'priority' preempts"),
        ("static,order=mlfq", "a batch stays together to its end, but order 'mlfq' preempts"),
        ("stacked,order=shortest,preempt=true", "who runs has reserved its room"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(OrderError) as caught:
        parse_policy(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


class Overtaken(CheckedScheduler):
    """Checks who may be let in before whom, said in seconds of arrival and without keys."""

    def _admit(self, request: Request, now: float) -> bool:
        admitted = super()._admit(request, now)
        if admitted:
            for other in self.waiting:
                assert self._may_pass(request, other), f"request {request.id} before {other.id}"
        return admitted

    def _may_pass(self, request: Request, other: Request) -> bool:
        later = request.arrived - other.arrived
        order, options = self.policy.order, self.order.options
        if order == "priority":
            levels = other.new.priority - request.new.priority
            if options.ageing == float("inf"):
                return levels > 0 or (levels == 0 and later <= 0)
            return later <= options.ageing * levels + 1e-9
        if order == "deadline":
            within = options.default if other.new.deadline is None else other.new.deadline
            return request.new.priority < other.new.priority or later <= within + 1e-9
        if order == "mlfq":
            return later <= options.ageing * (options.levels - 1) + 1e-9
        return order != "fcfs" or later <= 0


@pytest.mark.parametrize("text", ["default", *TEXTS])
def test_nobody_is_overtaken_for_longer_than_the_order_says(text: str) -> None:
    base = random.SystemRandom().randrange(10**9)
    for seed in range(base, base + 10):
        try:
            random_life(seed, Overtaken, text)
        except BaseException:
            print(f"seed {seed}")
            raise


def test_preemption_for_admission_is_seen_in_random_worlds() -> None:
    """At every depth, and with requests in flight."""
    seen: Counter[int] = Counter()

    class Watched(CheckedScheduler):
        def _make_way(self, now: float) -> None:
            before = self.num_preemptions
            super()._make_way(now)
            if any(request.num_in_flight for request in self.running) or self.config.depth == 1:
                seen[self.config.depth] += self.num_preemptions - before

    for seed in range(90):
        random_life(seed, Watched, ["priority,ageing=5", "mlfq,quantum=8,output=2", "shortest,preempt=true"][seed % 3])
    assert min(seen[depth] for depth in (1, 2, 3, 4)) > 2, seen


@pytest.mark.parametrize("text", ["priority", "fair", "deadline", "shortest,preempt=true", "mlfq,quantum=2,output=1"])
@pytest.mark.parametrize("depth", [1, 2])
def test_all_small_worlds_of_an_order(text: str, depth: int) -> None:
    """Exhaustive: three requests of every small size, distance, and order of urgency."""
    sizes = [(1, 3), (2, 2), (3, 1)]
    for num_blocks, max_batch_size in [(4, 1), (5, 2)]:
        config = SchedulerConfig(
            policy=parse_policy(text),
            max_batch_size=max_batch_size,
            max_batch_tokens=2,
            num_blocks=num_blocks,
            block_size=1,
            depth=depth,
        )
        for shapes in itertools.product(sizes, repeat=3):
            for urgency, gap in itertools.product(itertools.permutations(range(3)), [0, 1, 2]):
                w = World(config)
                for (prompt, output), level in zip(shapes, urgency, strict=True):
                    tenant, deadline = "ab"[level % 2], 9.0 - level
                    w.submit(tuple(range(7, 7 + prompt)), output, priority=level, tenant=tenant, deadline=deadline)
                    w.step(gap)
                w.drain()


def test_a_queue_of_many_lanes_is_a_sorted_list() -> None:
    """The heap of lanes against its slow twin, while ranks rise and lanes come and go."""

    class Rising(Order):
        def __init__(self) -> None:
            super().__init__(OrderOptions())
            self.ranks: Counter[str] = Counter()

        def rank(self, lane: str) -> float:
            return float(self.ranks[lane])

    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    order = Rising()
    waiting, twin = Waiting(order), []
    params = SamplingParams()
    for arrival in range(4000):
        if rng.random() < 0.55 or not twin:
            request = Request(
                NewRequest(id=arrival, token_ids=(1,), num_prompt=1, max_tokens=1, params=params), arrival
            )
            request.lane, request.key = rng.choice("abcdefgh"), rng.choice([0.0, rng.random()])
            waiting.add(request)
            twin.append(request)
        else:
            request = waiting.first if rng.random() < 0.7 else rng.choice(twin)
            waiting.remove(request)
            twin.remove(request)
        order.ranks[rng.choice("abcdefgh")] += rng.choice([0, 0, 1, 5])
        assert len(waiting) == len(twin) and sorted(r.id for r in waiting) == sorted(r.id for r in twin)
        if twin:
            assert waiting.first is min(twin, key=lambda r: (order.rank(r.lane), r.key, r.arrival))
        else:
            with pytest.raises(IndexError):
                _ = waiting.first
        assert len(waiting._heads) <= 4 * 8 + 16


def test_random_requests_have_all_that_orders_ask_for() -> None:
    rng = random.Random(3)
    w = World(random_config(rng))
    found = [random_request(rng, w) for _ in range(200)]
    for name, least in [("tenant", 4), ("priority", 4), ("deadline", 4)]:
        assert len({request[name] for request in found}) >= least
