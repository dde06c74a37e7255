"""The timeline of a pool over real engine processes: it accounts for every token and block, and is bounded."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter

import msgspec
import pytest
from pool_world import Wish, gather, gather_all, pool_of, run, submit, until, wishes

from orcaserve.core.config import EngineOptions
from orcaserve.serve.pool import Pool
from orcaserve.serve.terms import Terms
from orcaserve.serve.timeline import Arrived, Ended, Event, Iterated, Timeline, events_of
from orcaserve.serve.trace import chrome_trace

SMALL = EngineOptions(model="ledger", check=True, max_batch_size=6, max_batch_tokens=24, block_size=4)


def iterations(timeline: Timeline) -> list[Iterated]:
    return [event for event in events_of(timeline.lines()) if isinstance(event, Iterated)]


def ends(timeline: Timeline) -> dict[int, Ended]:
    return {event.id: event for event in events_of(timeline.lines()) if isinstance(event, Ended)}


def covered(events: list[Event], id: int) -> list[int]:
    """The positions of a request's prompt that were computed, or cached, for the first time."""
    found: list[int] = []
    for event in events:
        if isinstance(event, Iterated):
            found += [at for other, spared in event.cached if other == id for at in range(spared)]
            found += [at for other, start, count in event.prefill if other == id for at in range(start, start + count)]
    return found


def test_a_slice_of_a_trace_stays_with_the_engine_that_computed_it() -> None:
    """A request moves from one engine to another, as when the first one dies."""
    events = [Iterated(at=1.0 + n, seconds=0.5, tokens=1, engine=n // 2, decode=(7,)) for n in range(4)]
    lines = msgspec.json.decode(chrome_trace(events, "m"))["traceEvents"]
    slices = [line for line in lines if line["ph"] == "X" and line["tid"] == 8]
    assert {line["pid"] for line in slices if line["ts"] < 2.2e6} == {0}
    assert {line["pid"] for line in slices if line["ts"] > 2.2e6} == {1}


@pytest.mark.parametrize("policy", ["default", "orca", "static", "stacked", "fair", "shortest,preempt=true"])
@pytest.mark.parametrize("depth", [1, 2])
def test_every_token_is_accounted_for(policy: str, depth: int) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    crowd = wishes(seed, 30)
    timeline = Timeline()
    options = msgspec.structs.replace(SMALL, policy=policy, depth=depth)

    async def main() -> None:
        async with pool_of("--blocks", "60", options=options, timeline=timeline) as pool:
            answers = await gather_all([submit(pool, wish) for wish in crowd])
            assert not timeline.present
            ended = ends(timeline)
            events = events_of(timeline.lines())
            decodes = Counter(id for event in iterations(timeline) for id in event.decode)
            for id, (wish, (tokens, reason, update)) in enumerate(zip(crowd, answers, strict=True)):
                end = ended[id]
                assert (end.how, end.generated, end.prompt) == (reason, len(tokens), len(wish.prompt))
                assert end.arrived <= end.began <= end.first <= end.at
                assert covered(events, id) == list(range(len(wish.prompt))), f"request {id}"
                again = any(other == id for event in iterations(timeline) for other, _, _ in event.again)
                assert decodes[id] == len(tokens) - 1 or (again and decodes[id] < len(tokens) - 1)
                assert update.timing is not None
                assert end.cached == update.timing.cached_tokens
                assert again == (update.timing.recomputed_tokens > 0)
            preemptions = Counter(id for event in iterations(timeline) for id in event.preempted)
            assert sum(preemptions.values()) == pool.stats.num_preemptions
            assert sum(event.generated for event in iterations(timeline)) == sum(
                len(tokens) for tokens, _, _ in answers
            )

    run(main())


@pytest.mark.parametrize("policy", ["default", "orca"])
def test_blocks_are_those_that_the_engine_holds(policy: str) -> None:
    timeline = Timeline()
    crowd = wishes(7, 40)
    options = msgspec.structs.replace(SMALL, policy=policy)

    async def main() -> None:
        async with pool_of("--blocks", "60", options=options, timeline=timeline) as pool:
            await gather_all([submit(pool, wish) for wish in crowd])

    run(main())
    held: dict[int, list[int]] = {}
    latest: Iterated | None = None
    seen = 0
    for event in [*events_of(timeline.lines()), None]:
        if not isinstance(event, Ended) and latest is not None:
            assert len({block for blocks in held.values() for block in blocks}) == latest.held
            seen += latest.held > 0
            latest = None
        if isinstance(event, Ended):
            held.pop(event.id, None)
        elif isinstance(event, Iterated):
            for id in event.preempted:
                held.pop(id, None)
            for id, blocks in event.blocks:
                held[id] = held.get(id, []) + list(blocks)
            latest = event
    assert seen > 10


def test_an_engine_that_is_killed_has_its_requests_computed_again() -> None:
    timeline = Timeline()
    crowd = [Wish(tuple(range(20)), 1, 60), Wish(tuple(range(20, 30)), 2, 60)]

    async def main() -> None:
        async with pool_of("--step-seconds", "0.005", options=SMALL, timeline=timeline) as pool:
            streams = [submit(pool, wish) for wish in crowd]
            waiting = asyncio.gather(*map(gather, streams))
            await until(lambda: sum(len(event.decode) for event in iterations(timeline)) > 20, "decodes")
            assert pool.engine_pid is not None
            os.kill(pool.engine_pid, signal.SIGKILL)
            answers = await waiting
            assert [(tokens, reason) for tokens, reason, _ in answers] == [wish.answer() for wish in crowd]

    run(main())
    again = Counter(id for event in iterations(timeline) for id, _, _ in event.again)
    assert set(again) == {0, 1}
    assert {end.how for end in ends(timeline).values()} == {"length"}
    assert [end.generated for end in ends(timeline).values()] == [60, 60]


def test_it_is_bounded_in_bytes_and_keeps_the_latest() -> None:
    timeline = Timeline(most_bytes=20_000)

    async def main() -> None:
        async with pool_of(options=SMALL, timeline=timeline) as pool:
            for seed in range(4):
                await gather_all([submit(pool, wish) for wish in wishes(seed, 20)])
                assert 10_000 < timeline.num_bytes <= 20_000

    run(main())
    assert timeline.first > 0
    kept = events_of(timeline.lines())
    assert len(kept) == timeline.next - timeline.first
    assert isinstance(kept[-1], Ended)
    assert msgspec.json.decode(timeline.since(timeline.first), type=list[Event]) == kept
    assert msgspec.json.decode(timeline.since(timeline.next - 3), type=list[Event]) == kept[-3:]
    assert timeline.since(timeline.next) == b"[]"
    assert timeline.first < timeline.tail(2000) < timeline.next
    assert len(timeline.since(timeline.tail(2000))) <= 2000 + timeline.next


def test_reasons_are_told_to_those_who_look_on() -> None:
    timeline = Timeline()
    options = msgspec.structs.replace(SMALL, max_batch_size=1)

    async def twice(pool: Pool) -> set[str | None]:
        begin = len(iterations(timeline))
        await gather_all([submit(pool, wish) for wish in wishes(3, 6)])
        return {event.why for event in iterations(timeline)[begin:] if event.waiting}

    async def main() -> None:
        async with pool_of(options=options, timeline=timeline) as pool:
            assert await twice(pool) == {None}
            pool.watch(True)
            await twice(pool)
            assert "rows" in await twice(pool)
            pool.watch(False)
            timeline.forget_reasons()
            await twice(pool)
            assert await twice(pool) == {None}

    run(main())


def test_a_request_is_cancelled_whosever_it_is() -> None:
    timeline = Timeline()
    wish = Wish((1, 2, 3), 1, 200)

    async def main() -> None:
        async with pool_of("--step-seconds", "0.01", options=SMALL, timeline=timeline) as pool:
            ours = submit(pool, wish, terms=Terms(tenant="a"))
            other = submit(pool, wish, terms=Terms(tenant="b"))
            waiting = asyncio.gather(gather(ours), gather(other))
            await until(lambda: len(iterations(timeline)) > 3, "iterations")
            assert not pool.cancel(99)
            assert pool.cancel(0)
            assert not pool.cancel(0), "it is gone"
            assert pool.cancel(1)
            for tokens, reason, last in await waiting:
                assert (reason, last.cut_off) == ("error", "cancelled")
                assert len(tokens) < 200
            await until(lambda: pool.stats.num_running == 0, "the engine has forgotten them")

    run(main())
    events = events_of(timeline.lines())
    assert {event.id: event.how for event in events if isinstance(event, Ended)} == {0: "abort", 1: "abort"}
    assert [event.tenant for event in events if isinstance(event, Arrived)] == ["a", "b"]
