"""`fair`: shares, the credit of who asks for less than his share, and the published bound."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from ledger_world import World
from order_world import started, world

from orcaserve.core.invariants import InvariantError
from orcaserve.core.order import Waiting
from orcaserve.core.orders.fair import MOST_GONE, Fair, FairOptions
from orcaserve.core.orders.gap import ServiceGap
from orcaserve.core.policy import parse_policy
from orcaserve.core.request import NewRequest, Request, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig


def test_fair_a_polite_tenant_goes_before_the_rest_of_a_flood() -> None:
    w = world("fair", max_batch_size=1)
    flood = [w.submit((1, 2), 3, tenant="flood") for _ in range(10)]
    w.step()
    polite = w.submit((3, 4), 3, tenant="polite")
    w.drain()
    assert started(w)[:3] == [flood[0], polite, flood[1]]


def shares(policy: str, weights: dict[str, float], seconds: int = 500) -> Counter[str]:
    """Tokens that tenants which always wait have got."""
    w = world(policy, max_batch_size=3, num_blocks=200)
    got: Counter[str] = Counter()
    rng = random.Random(1)
    for _ in range(seconds):
        waits = Counter(request.new.tenant for request in w.scheduler.waiting)
        for tenant in weights:
            while waits[tenant] < 6:
                w.submit(tuple(rng.choices(range(40), k=rng.randint(1, 9))), rng.randint(1, 6), tenant=tenant)
                waits[tenant] += 1
        names = {id: request.new.tenant for id, request in w.scheduler.requests.items()}
        w.step()
        got.update(names[output.id] for output in w.last.outputs if output.id in names)
    return got


def test_fair_shares_follow_the_weights() -> None:
    got = shares("fair", {"a": 1, "b": 1})
    assert got["a"] == pytest.approx(got["b"], rel=0.1)
    got = shares("fair,weights=a:3+b:1", {"a": 3, "b": 1})
    assert got["a"] / got["b"] == pytest.approx(3, rel=0.15)


@pytest.mark.parametrize(("credit", "first"), [(0, 1), (4, 1), (10, 2), (22, 3), (1000, 6)])
def test_fair_time_without_requests_is_no_credit_but_so_much(credit: int, first: int) -> None:
    """Each request counts 2 + 2 × 5 = 12; `first`: how many go at once of who comes back."""
    w = world(f"fair,credit={credit}", max_batch_size=1)
    w.submit((1,), 1, tenant="idle")
    w.drain()
    for _ in range(20):
        w.submit((1, 2), 5, tenant="busy")
    w.step(52)
    w.rows.clear()
    back = [w.submit((5, 6), 5, tenant="idle") for _ in range(6)]
    w.drain()
    served = ["idle" if id in back else "busy" for id in started(w)]
    assert served[0] == "busy", "who runs goes on"
    own, others = served[1:].index("idle"), served.count("busy")
    assert own <= 1, "a turn of the others at most"
    assert served[own + 1 :].index("busy") == first, served
    assert others > 6


def test_fair_who_asks_for_little_does_not_wait_for_a_turn_of_the_others() -> None:
    w = world("fair,credit=100", max_batch_size=1)
    for _ in range(30):
        w.submit((1, 2), 5, tenant="flood")
    for _ in range(4):
        w.step(32)  # six requests of the flood, and a part of the seventh
        polite = w.submit((3, 4), 5, tenant="polite")
        w.rows.clear()
        w.step(8)
        assert started(w)[1] == polite
    w.drain()


def test_fair_who_was_alone_owes_nothing() -> None:
    """What somebody has had while nobody waited is no credit of who comes then."""
    w = world("fair,credit=1000", max_batch_size=1)
    for _ in range(20):
        w.submit((3, 4), 5, tenant="polite")
        w.drain()
    flood = [w.submit((1, 2), 5, tenant="flood") for _ in range(20)]
    w.step(2)
    polite = w.submit((3, 4), 5, tenant="polite")
    w.rows.clear()
    w.drain()
    assert started(w)[:2] == [flood[0], polite]


@pytest.mark.parametrize("credit", [0, 100])
def test_fair_reads_a_prompt_of_a_newcomer_before_the_rest_of_one_that_runs(credit: int) -> None:
    """Unless it would not have gone first when that one was let in."""
    w = world(f"fair,credit={credit}", max_batch_size=8, max_batch_tokens=16)
    w.submit((9,) * 40, 3, tenant="flood")
    w.drain()
    flood = [w.submit(tuple(range(number, number + 40)), 3, tenant="flood") for number in range(3)]
    w.step(2)
    polite = w.submit((3,) * 16, 3, tenant="polite")
    w.step()
    assert w.rows[-1] == ([polite] if credit else [flood[0], flood[1]])
    w.drain()


def test_a_chunk_is_not_taken_from_who_came_first() -> None:
    w = world("default", max_batch_size=8, max_batch_tokens=16)
    ids = [w.submit(tuple(range(number, number + 40)), 3) for number in range(3)]
    w.step(3)
    assert w.rows[-3:] == [[ids[0]], [ids[0]], [ids[0], ids[1]]]
    w.drain()


def wait(order: Fair, waiting: Waiting, tenant: str, arrival: int) -> Request:
    """A request of one token begins to wait."""
    new = NewRequest(id=arrival, token_ids=(1,), num_prompt=1, max_tokens=1, params=SamplingParams(), tenant=tenant)
    request = Request(new, arrival)
    request.lane = order.lane(request)
    order.arrived(request, waiting)
    request.key = order.key(request, 0.0)
    waiting.add(request)
    return request


def serve(order: Fair, waiting: Waiting, num_generated: int = 1) -> None:
    """The first of those that wait, to its end."""
    request = waiting.first
    waiting.remove(request)
    order.started(request, 0.0)
    order.served(request, 1, num_generated)
    order.ended(request)


def test_fair_tenants_that_are_gone_are_forgotten_without_a_gain() -> None:
    """Three times as many tenants as it remembers have a request each, all at once."""
    order = Fair(FairOptions(credit=0))
    waiting = Waiting(order)
    for number in range(3 * MOST_GONE):
        wait(order, waiting, f"tenant {number}", number)
    for _ in range(3 * MOST_GONE - 1):
        serve(order, waiting)
    assert len(order._tenants) <= MOST_GONE + 1
    assert "tenant 0" not in order._tenants
    wait(order, waiting, "tenant 0", 3 * MOST_GONE)
    assert order.rank("tenant 0") == 3.0, "what it had, as if it were remembered"
    assert waiting.first.new.tenant == f"tenant {3 * MOST_GONE - 1}", "who has had nothing goes before it"
    serve(order, waiting)
    serve(order, waiting, 2000)
    wait(order, waiting, "tenant 1", 4 * MOST_GONE)
    serve(order, waiting)
    assert len(order._tenants) <= 2, "all others would be lifted anyway"


@pytest.mark.parametrize("why", ["passed over", "preempted"])
def test_fair_who_has_not_waited_for_his_turn_keeps_no_more_than_the_credit(why: str) -> None:
    """He waits for a prefix while others go before him; or he ran all the time, and is preempted now."""
    order = Fair(FairOptions(credit=10))
    waiting = Waiting(order)
    late = wait(order, waiting, "late", 0)
    waiting.remove(late)
    for number in range(1, 4):
        wait(order, waiting, "busy", number)
        serve(order, waiting, 100)
    if why == "passed over":
        order.passed_over(late)
    else:
        assert order.key(late, 0.0) == 0.0
    assert order.rank("late") == 2 * 201 - 10, "below what the others' counter was when the last was admitted"


def test_fair_counts_may_be_small_but_not_both_nothing() -> None:
    for numbers in ({"input": 0.0}, {"output": 0.0}, {"input": 0.5, "output": 0.25}, {"credit": 0.5}):
        assert FairOptions(**numbers)
    for numbers in ({"input": 0.0, "output": 0.0}, {"input": -0.5}, {"output": float("inf")}, {"credit": -1.0}):
        with pytest.raises(ValueError, match="number"):
            FairOptions(**numbers)


class Uncharged(Fair):
    def served(self, request: Request, num_computed: int, num_generated: int) -> None:
        """Answers cost nothing."""


class Unlifted(Fair):
    def arrived(self, request: Request, waiting) -> None:
        counter = self._tenants[request.lane].counter if request.lane in self._tenants else 0.0
        super().arrived(request, waiting)
        self._tenants[request.lane].counter = counter

    def key(self, request: Request, now: float) -> float:
        return 0.0


class Blind(Fair):
    def rank(self, lane: str) -> float:
        return 0.0


def test_the_bound_is_the_published_one_of_the_greatest_that_were_seen() -> None:
    """Twice the longer of a prompt and of all that a tenant's requests generate, over the least weight; and credit."""
    order = parse_policy("fair,input=1,output=3,credit=7,weights=b:0.5").make_order()
    gap, reserved = ServiceGap(order, None), ServiceGap(order, 12)
    assert (gap.bound, reserved.bound) == (7, 7), "nobody has run"

    def request(id: int, prompt: int, output: int, tenant: str) -> Request:
        ids, params = (1,) * prompt, SamplingParams()
        new = NewRequest(id=id, token_ids=ids, num_prompt=prompt, max_tokens=output, params=params, tenant=tenant)
        return Request(new, id)

    one, two, other = request(1, 10, 4, "a"), request(2, 20, 5, "a"), request(3, 8, 6, "b")
    for bound in (gap, reserved):
        bound.admitted(one, True, [one])
        bound.admitted(two, True, [one, two, other])
    assert gap.bound == 2 * (20 + 3 * 9) + 7
    assert reserved.bound == 2 * (3 * 12) + 7, "as many as there are slots"
    for bound in (gap, reserved):
        bound.admitted(other, True, [one, two, other])
    assert gap.bound == 2 * (20 + 3 * 9) / 0.5 + 7


def fair_life(seed: int, order: type[Fair], policy: str) -> float:
    """Tenants that flood, pause and come back; returns the widest gap over the bound."""
    rng = random.Random(seed)
    config = SchedulerConfig(
        policy=parse_policy(policy),
        max_batch_size=rng.randint(1, 3),
        max_batch_tokens=16,
        num_blocks=rng.choice([8, 20]),
        block_size=4,
        depth=rng.randint(1, 2),
    )
    w = World(config)
    if order is not Fair:
        w.scheduler.order = w.scheduler.waiting._order = order(w.scheduler.order.told)
    eager = dict.fromkeys("ab", True)
    shape = {tenant: (rng.randint(1, 12), rng.randint(1, 12)) for tenant in "ab"}
    for _ in range(250):
        waits = Counter(request.new.tenant for request in w.scheduler.waiting)
        for tenant in "ab":
            if rng.random() < 0.01:
                eager[tenant] = not eager[tenant]
            while eager[tenant] and waits[tenant] < 2:
                prompt, output = (rng.randint(1, most) for most in shape[tenant])
                w.submit(tuple(rng.choices(range(40), k=prompt)), output, tenant=tenant)
                waits[tenant] += 1
        w.step()
    w.drain()
    gap: ServiceGap = w.scheduler.gap
    return gap.widest / gap.bound


@pytest.mark.parametrize(
    "policy",
    ["fair,credit=0", "orca,order=fair,credit=0", "fair,credit=20,weights=a:2+b:0.5", "orca,order=fair,credit=9"],
)
def test_fair_the_gap_keeps_to_the_published_bound(policy: str) -> None:
    base = random.SystemRandom().randrange(10**9)
    widest = 0.0
    for seed in range(base, base + 12):
        print(f"seed {seed}")
        widest = max(widest, fair_life(seed, Fair, policy))
    assert widest > 0.1, "a bound that is never approached says nothing"


@pytest.mark.parametrize("broken", [Uncharged, Unlifted, Blind])
def test_fair_the_bound_catches_other_counters(broken: type[Fair]) -> None:
    with pytest.raises(InvariantError, match="about the same"):
        for seed in range(60):
            fair_life(seed, broken, "orca,order=fair,credit=0")
