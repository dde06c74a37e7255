"""Routers by their properties: deterministic, within the bound, true to prefixes, calm when replicas come and go."""

from __future__ import annotations

from hashlib import sha256
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.core.kv_cache import KVCacheManager
from orcaserve.core.request import NewRequest, Request, SamplingParams
from orcaserve.core.router import FACTOR, ROUTERS, PrefixRouter, RoundRobin, Router

BLOCK = 4
tokens = st.lists(st.integers(0, 3), min_size=1, max_size=30).map(tuple)
loads = st.dictionaries(st.integers(0, 9), st.integers(0, 50), min_size=1, max_size=6)
prompts = st.lists(tokens, min_size=1, max_size=30)


def started(replicas: int, num_blocks: int = 1000, factor: float = FACTOR) -> PrefixRouter:
    router = PrefixRouter(BLOCK, factor)
    for replica in range(replicas):
        router.begin(replica, num_blocks)
    return router


def route(router: Router, prompt: tuple[int, ...], loads: dict[int, int], salt: str = "") -> int:
    keys = router.keys(prompt, salt)
    chosen = router.choose(keys, dict(loads))
    router.sent(keys, chosen)
    return chosen


@given(prompts, st.lists(loads, min_size=30, max_size=30))
def test_what_is_chosen_can_be_had_and_is_within_the_bound(asked: list, seen: list) -> None:
    router = started(10)
    for prompt, now in zip(asked, seen, strict=False):
        chosen = route(router, prompt, now)
        assert now[chosen] + 1 <= ceil(FACTOR * (sum(now.values()) + 1) / len(now))


@pytest.mark.parametrize("name", sorted(ROUTERS))
@given(prompts, st.lists(loads, min_size=30, max_size=30))
def test_equal_histories_choose_equally(name: str, asked: list, seen: list) -> None:
    routers = [ROUTERS[name](BLOCK) for _ in range(2)]
    for router in routers:
        for replica in range(10):
            router.begin(replica, 20)
    for prompt, now in zip(asked, seen, strict=False):
        backwards = dict(reversed(now.items()))
        assert route(routers[0], prompt, now) == route(routers[1], prompt, backwards)


@given(prompts, tokens, st.integers(2, 6), st.data())
def test_a_replica_that_is_gone_moves_only_its_own_prompts(
    asked: list, prompt: tuple, n: int, data: st.DataObject
) -> None:
    router = started(n)
    for other in asked:
        route(router, other, dict.fromkeys(range(n), 1))
    keys = router.keys(prompt, "")
    chosen = router.choose(keys, dict.fromkeys(range(n), 1))
    gone = data.draw(st.sampled_from([replica for replica in range(n) if replica != chosen]))
    assert router.choose(keys, {replica: 1 for replica in range(n) if replica != gone}) == chosen
    assert router.choose(keys, {replica: 1 for replica in range(n) if replica != chosen}) != chosen


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("length", [1, 3, 4, 50])
def test_every_replica_gets_its_turn(name: str, length: int) -> None:
    """Prompts of nothing in common, on replicas that are all idle."""
    router = ROUTERS[name](BLOCK)
    for replica in range(5):
        router.begin(replica, 10_000)
    counts = [0] * 5
    for number in range(500):
        prompt = tuple(sha256(f"{number} {i}".encode()).digest()[0] + 256 * number for i in range(length))
        counts[route(router, prompt, dict.fromkeys(range(5), 0))] += 1
    assert min(counts) >= 60, counts
    if name == "round-robin":
        assert counts == [100] * 5


def test_turns_of_a_chat_follow_each_other_and_users_of_one_system_prompt_spread() -> None:
    router = started(4)
    system = tuple(range(400))
    homes, load = {}, [0] * 4
    for turn in range(4):
        for user in range(40):
            history = tuple(1000 * user + i for i in range(20 * (turn + 1)))
            chosen = route(router, system + history, dict.fromkeys(range(4), 1) if turn else dict(enumerate(load)))
            assert homes.setdefault(user, chosen) == chosen
            load[chosen] += 1
    counts = [list(homes.values()).count(replica) for replica in range(4)]
    assert max(counts) <= FACTOR * 10 + 1, counts


@given(tokens, tokens)
def test_salts_have_nothing_in_common(prompt: tuple, other: tuple) -> None:
    router = PrefixRouter(BLOCK)
    assert not set(router.keys(prompt, "a")) & set(router.keys(other, "b"))


def test_keys_of_full_blocks_are_those_of_the_prefix_cache() -> None:
    prompt = tuple(range(10))
    kv = KVCacheManager(10, BLOCK, prefix_cache=True)
    new = NewRequest(id=1, token_ids=prompt, num_prompt=10, max_tokens=1, params=SamplingParams(), cache_salt="pepper")
    request = Request(new, 0)
    kv.known_prefix(request)
    assert tuple(request.block_keys) == PrefixRouter(BLOCK).keys(prompt, "pepper")[:2]


def test_what_was_used_least_recently_is_forgotten_first_and_a_new_engine_knows_nothing() -> None:
    router = started(1, num_blocks=4)
    first, second = (router.keys(range(start, start + 12), "") for start in (0, 100))
    router.sent(first, 0)
    assert router.held(first, 0) == 3
    router.sent(second, 0)
    assert (router.held(first, 0), router.held(second, 0)) == (1, 3)
    router.begin(0, 4)
    assert router.held(second, 0) == 0


def test_a_gain_is_what_is_held_less_what_would_be_forgotten() -> None:
    router = started(1, num_blocks=4)
    keys = router.keys(range(3 * BLOCK), "")
    assert (router.gain(keys, 0), router.gain(keys, 7)) == (0, -3), "of the other one nothing is known, nor its room"
    router.sent(keys, 0)
    assert router.gain(keys, 0) == 3
    assert router.gain(router.keys(range(5 * BLOCK), ""), 0) == 3 - 1


def test_a_little_that_is_known_is_not_worth_forgetting_much() -> None:
    """Else all that begins alike would gather in one cache while the others are empty."""
    router = started(2, num_blocks=10)
    system, chat = range(8), range(100, 132)
    router.sent(router.keys((*system, *chat), ""), 0)  # which fills it
    assert route(router, (*system, *range(200, 232)), {0: 0, 1: 0}) == 1
    assert route(router, (*system, *chat, 1), {0: 0, 1: 0}) == 0


def test_a_load_beyond_the_bound_sends_the_prompt_to_the_next_best() -> None:
    router = started(3)
    prompt, half = range(40), range(20)
    for replica, known in ((0, prompt), (1, half)):
        router.sent(router.keys(known, ""), replica)
    keys = router.keys(prompt, "")
    assert router.choose(keys, {0: 5, 1: 5, 2: 5}) == 0
    assert router.choose(keys, {0: 9, 1: 5, 2: 5}) == 1
    assert router.choose(keys, {0: 15, 1: 15, 2: 1}) == 2


def test_round_robin_passes_over_who_is_not_there() -> None:
    router = RoundRobin()
    assert [route(router, (1,), dict.fromkeys(there, 0)) for there in ([0, 1, 2], [0, 2], [0, 1, 2], [1], [0, 1])] == [
        0,
        2,
        0,
        1,
        0,
    ]


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_nobody_is_no_choice(name: str) -> None:
    with pytest.raises(ValueError, match="no replica"):
        ROUTERS[name](BLOCK).choose((), {})


def test_a_bound_below_the_mean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.9 times the mean"):
        PrefixRouter(BLOCK, 0.9)
