"""What the pool takes in: shares of the queue, rates, deadlines at the door, in the queue and while running."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from pool_world import Wish, gather, gather_all, pool_of, run, submit, until

from orcaserve.core.config import EngineOptions
from orcaserve.core.request import SamplingParams
from orcaserve.engine.step_log import Arrived, read
from orcaserve.serve.admission import Limits, Refused
from orcaserve.serve.pool import Pool
from orcaserve.serve.stream import Stream
from orcaserve.serve.terms import Terms

LONG = Wish((1, 2, 3), 7, 4000)
FEW = SamplingParams(max_tokens=4)
ALONE = EngineOptions(model="ledger", max_batch_size=1, check=True)


def refusal(pool: Pool, terms: Terms, prompt: range | tuple[int, ...] = (1,), params: SamplingParams = FEW) -> Refused:
    waiting = pool.num_waiting, pool.num_waiting_tokens, pool.num_unfinished
    with pytest.raises(Refused) as refused:
        pool.submit(prompt, params, terms=terms)
    assert (pool.num_waiting, pool.num_waiting_tokens, pool.num_unfinished) == waiting
    return refused.value


async def busy(pool: Pool) -> Stream:
    """A request that has the only place, for a long time."""
    stream = submit(pool, LONG)
    await anext(stream)
    return stream


def test_no_tenant_fills_the_queue() -> None:
    async def main() -> None:
        limits = Limits(max_queue_requests=8, max_queue_tokens=100)
        a, b, nobody = Terms(tenant="a"), Terms(tenant="b"), Terms()
        async with pool_of("--step-seconds", "0.01", limits=limits, options=ALONE) as pool:
            running = await busy(pool)
            of_a = [pool.submit((1,), FEW, terms=a) for _ in range(4)]
            assert refusal(pool, a).reason == "tenant_queue_full"
            of_b = [pool.submit(range(45), FEW, terms=b)]
            assert refusal(pool, b, range(6)).reason == "tenant_queue_full", "45 and 6 are more than half of 100"
            of_b.append(pool.submit(range(5), FEW, terms=b))
            unknown = [pool.submit((1,), FEW, terms=nobody) for _ in range(2)]
            assert pool.num_waiting == 8
            for terms in (a, b, nobody, Terms(tenant="c")):
                assert refusal(pool, terms).reason == "queue_full"
            unknown.pop().abort()
            assert refusal(pool, a).reason == "tenant_queue_full", "one that left was somebody else's"
            of_a.pop().abort()
            of_a.append(pool.submit((1,), FEW, terms=a))
            running.abort()
            reasons = [reason for _, reason, _ in await gather_all([*of_a, *of_b, *unknown])]
            assert reasons == ["length"] * 7
            assert (pool.num_waiting, pool.num_waiting_tokens) == (0, 0)

    run(main())


def test_a_share_of_nothing_is_one_request_and_the_whole_is_no_bound() -> None:
    async def main() -> None:
        a = Terms(tenant="a")
        limits = Limits(max_queue_requests=3, tenant_queue_share=0.01)
        async with pool_of(limits=limits, options=ALONE) as pool:
            running = await busy(pool)
            waiting = pool.submit(range(20), FEW, terms=a)
            assert refusal(pool, a).reason == "tenant_queue_full"
            running.abort()
            await gather(waiting)
        limits = Limits(max_queue_requests=3, tenant_queue_share=1.0)
        async with pool_of(limits=limits, options=ALONE) as pool:
            running = await busy(pool)
            streams = [pool.submit((1,), FEW, terms=a) for _ in range(3)]
            assert refusal(pool, a).reason == "queue_full"
            running.abort()
            await gather_all(streams)

    run(main())


def test_of_several_prompts_all_or_none_are_taken() -> None:
    async def main() -> None:
        async with pool_of(limits=Limits(max_queue_requests=4), options=ALONE) as pool:
            running = await busy(pool)
            one = pool.submit((1,), FEW)
            with pytest.raises(Refused):
                pool.submit_all([((1,), FEW)] * 4, (), "", Terms())
            assert pool.num_waiting == 1
            streams = pool.submit_all([((number,), FEW) for number in range(3)], (), "", Terms())
            assert pool.num_waiting == 4
            running.abort()
            assert [reason for _, reason, _ in await gather_all([one, *streams])] == ["length"] * 4

    run(main())


def test_rates_are_each_tenants_own() -> None:
    async def main() -> None:
        limits = Limits(tenant_requests_per_minute=3, tenant_tokens_per_minute=600)
        a, b = Terms(tenant="a"), Terms(tenant="b")
        async with pool_of(limits=limits) as pool:
            began = time.monotonic()
            await gather_all([pool.submit((number,), FEW, terms=a) for number in range(3)])
            refused = refusal(pool, a)
            assert refused.reason == "requests_per_minute"
            assert 20 - (time.monotonic() - began) <= refused.retry_after <= 20
            began = time.monotonic()
            await gather(pool.submit(range(200), SamplingParams(max_tokens=300), terms=b))
            refused = refusal(pool, b, range(200))  # 600 a minute less 500; 10 more every second
            assert refused.reason == "tokens_per_minute"
            assert 10 - (time.monotonic() - began) <= refused.retry_after <= 10
            assert len((await gather(pool.submit(range(50), FEW, terms=b)))[0]) == 4
            # More than a minute's worth is given to who has asked for nothing yet.
            assert len((await gather(pool.submit(range(900), FEW, terms=Terms(tenant="c"))))[0]) == 4

    run(main())


def test_many_tenants_are_forgotten_when_they_owe_nothing() -> None:
    async def main() -> None:
        limits = Limits(tenant_requests_per_minute=1e7)  # a bucket is full again after microseconds
        async with pool_of(limits=limits) as pool:
            for number in range(500):
                pool.submit((1,), FEW, terms=Terms(tenant=f"user {number}")).abort()
                await asyncio.sleep(0)
            assert len(pool.admission._buckets) < 200

    run(main())


def test_who_waits_past_his_deadline_is_never_begun(tmp_path: Path) -> None:
    async def main() -> None:
        stall = tmp_path / "stall"
        stall.touch()
        poison = 555  # an iteration that has it ends the engine
        async with pool_of("--stall-while", str(stall), "--crash-on", str(poison), options=ALONE) as pool:
            running = submit(pool, LONG)
            await until(stall.with_suffix(".stalled").exists, "an iteration is under way")
            now = time.monotonic()
            late = [
                pool.submit((poison,), FEW, terms=Terms(first_by=now + 0.3)),
                pool.submit((poison,), FEW, terms=Terms(end_by=now + 0.3)),
                pool.submit((poison,), FEW, terms=Terms(end_by=now + 0.3, first_by=now + 60)),
            ]
            patient = pool.submit((8,), FEW, terms=Terms(first_by=now + 600, end_by=now + 600))
            for tokens, reason, last in await gather_all(late):
                assert (tokens, reason, last.cut_off) == ([], "error", "deadline_passed")
            assert time.monotonic() - now >= 0.299
            assert (pool.num_waiting, pool.num_unfinished) == (2, 2), "the first iteration has told nothing yet"
            stall.unlink()
            await until(lambda: pool.stats.num_running == pool.stats.num_waiting == 1, "the engine has forgotten them")
            running.abort()
            assert (await gather(patient))[1] == "length"
            assert pool.num_restarts == 0

    run(main())


def test_who_is_in_his_first_iteration_does_not_wait_any_more(tmp_path: Path) -> None:
    async def main() -> None:
        stall = tmp_path / "stall"
        stall.touch()
        async with pool_of("--stall-while", str(stall)) as pool:
            now = time.monotonic()
            stream = pool.submit((5,), FEW, terms=Terms(first_by=now + 0.3))
            await until(stall.with_suffix(".stalled").exists, "an iteration is under way")
            await until(lambda: pool.num_waiting == 0, "it is known that it has begun")
            assert time.monotonic() - now >= 0.299
            stall.unlink()
            tokens, reason, last = await gather(stream)
            assert (len(tokens), reason, last.cut_off) == (4, "length", None)

    run(main())


def test_who_runs_past_his_time_ends_with_what_he_has() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.01") as pool:
            now = time.monotonic()
            calm = submit(pool, Wish(LONG.prompt, LONG.seed, 60))
            stream = submit(pool, LONG, terms=Terms(end_by=now + 0.4))
            soft = submit(pool, Wish((4,), 5, 60), terms=Terms(first_by=now + 0.2))  # a first token is enough
            tokens, reason, last = await gather(stream)
            assert (reason, last.cut_off) == ("error", "timeout")
            assert tokens == LONG.answer()[0][: len(tokens)]
            assert tokens
            assert (await gather(soft))[0] == Wish((4,), 5, 60).answer()[0]
            assert (await gather(calm))[0] == LONG.answer()[0][:60]
            await until(lambda: pool.stats.num_held_blocks == 0, "no block is held")

    run(main())


def test_what_cannot_be_met_is_refused_at_the_door() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.02", options=ALONE) as pool:
            # Nobody is there: it is tried, whatever has been learnt.
            tried = pool.submit((1,), FEW, terms=Terms(end_by=time.monotonic() + 0.001))
            assert (await gather(tried))[2].cut_off is not None
            running = await busy(pool)
            for _ in range(20):
                await anext(running)
            # The expected output of the one that runs is 128 tokens, and each takes 20 ms at least.
            refused = refusal(pool, Terms(first_by=time.monotonic() + 1))
            assert refused.reason == "deadline_unreachable"
            assert 1 <= refused.retry_after <= 60
            assert refusal(pool, Terms(end_by=time.monotonic() + 1)).reason == "deadline_unreachable"
            waiting = pool.submit((1,), FEW, terms=Terms(first_by=time.monotonic() + 100))
            running.abort()
            assert (await gather(waiting))[1] == "length"

    run(main())


def test_how_long_answers_get_is_learnt() -> None:
    """Ten short answers of a tenant's, and the same deadline can be met that could not be before."""

    async def main() -> None:
        async with pool_of("--step-seconds", "0.02", options=ALONE) as pool:
            for number in range(12):
                short = pool.submit((number,), SamplingParams(max_tokens=2), terms=Terms(tenant="terse"))
                await gather(short)
            running = pool.submit((1,), SamplingParams(max_tokens=2000), terms=Terms(tenant="terse"))
            await anext(running)
            hopeful = pool.submit((1,), FEW, terms=Terms(tenant="other", first_by=time.monotonic() + 2))
            running.abort()
            assert (await gather(hopeful))[1] == "length"

    run(main())


def arrivals(log: Path) -> list[list[Arrived]]:
    """Of each engine's life."""
    try:
        lives = read(log.read_bytes())
    except (OSError, ValueError):
        return []
    return [[event for event in life.events if isinstance(event, Arrived)] for life in lives]


def test_deadlines_tenants_and_priorities_reach_the_scheduler_and_survive_a_crash(tmp_path: Path) -> None:
    async def main() -> None:
        log = tmp_path / "log"
        options = EngineOptions(model="ledger", step_log=str(log), check=True)
        async with pool_of("--step-seconds", "0.02", options=options) as pool:
            began = time.monotonic()
            terms = Terms(tenant="t", realm="r", priority=-3, first_by=began + 100, end_by=began + 300)
            stream = submit(pool, LONG, terms=terms, cache_salt="s")
            free = submit(pool, LONG)
            await anext(stream)
            await until(lambda: len(arrivals(log)[:1]) == 1 and len(arrivals(log)[0]) == 2, "the log is on the disk")
            os.kill(pool.engine_pid or 0, signal.SIGKILL)
            await until(lambda: [len(life) for life in arrivals(log)] == [2, 2], "the next engine's is, too")
            elapsed = time.monotonic() - began
            first, second = arrivals(log)
            assert (first[0].tenant, first[0].priority, first[1].tenant, first[1].priority) == ("t", -3, "", 0)
            assert 90 < first[0].deadline <= 100
            again = next(one for one in second if one.tenant == "t")
            # It has had its first token: what is left is the time until its end.
            assert 300 - elapsed <= again.deadline < 300
            assert again.priority == -3
            assert next(one for one in second if one.tenant == "").deadline is None
            stream.abort()
            free.abort()

    run(main())


def test_a_deadline_passes_while_there_is_no_engine(tmp_path: Path) -> None:
    async def main() -> None:
        loading = tmp_path / "loading"
        async with pool_of("--load-while", str(loading), "--step-seconds", "0.01") as pool:
            loading.touch()
            os.kill(pool.engine_pid or 0, signal.SIGKILL)
            await until(lambda: pool.state == "restarting", "it is gone")
            now = time.monotonic()
            late = pool.submit((5,), FEW, terms=Terms(first_by=now + 0.2))
            patient = pool.submit((5,), FEW, terms=Terms(first_by=now + 60))
            assert (await gather(late))[2].cut_off == "deadline_passed"
            assert pool.num_waiting == 1
            loading.unlink()
            assert (await gather(patient))[1] == "length"

    run(main())


def test_realms_share_no_prefixes() -> None:
    async def main() -> None:
        async with pool_of() as pool:

            async def cached(realm: str, salt: str = "") -> int:
                terms = Terms(tenant="t", realm=realm)
                stream = pool.submit(range(64), FEW, cache_salt=salt, terms=terms)
                return sum([update.num_cached async for update in stream])

            assert [await cached("a"), await cached("a"), await cached("b"), await cached("b")] == [0, 48, 0, 48]
            assert [await cached("a", "b"), await cached("a", "b"), await cached("b", "a")] == [0, 48, 0]
            assert [await cached(""), await cached("", "a")] == [0, 0]

    run(main())
