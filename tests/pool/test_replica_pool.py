"""Several engines behind one pool: who gets what, and streams that move when one of them dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from pool_world import Wish, gather, gather_all, is_alive, may_be_killed, pool_of, run, submit, until, wishes

from orcaserve.core.config import EngineOptions
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.serve.frames import BEAT_SECONDS
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.pool import Pool
from orcaserve.serve.replicas import Replication, shares
from orcaserve.serve.resume import Choice
from orcaserve.serve.stream import Update
from orcaserve.serve.suspects import Suspects
from orcaserve.serve.terms import Terms

POISON = 999


def of(replicas: int, router: str = "prefix") -> Replication:
    return Replication(replicas=replicas, router=router)


def innocent(count: int, seed: int = 5) -> list[Wish]:
    return [wish for wish in wishes(seed, count) if POISON not in (*wish.prompt, *wish.answer()[0])]


def kill(pool: Pool, index: int) -> int:
    pid = pool.replicas[index].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


async def all_ready(pool: Pool) -> None:
    await until(lambda: not pool.replicas.not_ready, "all replicas are ready")


async def two_homes(pool: Pool, steps: int) -> tuple[Wish, asyncio.Task[tuple[list[int], str | None, Update]], int]:
    """A stream of so many iterations, and the number of the replica that it is not on."""
    await all_ready(pool)
    long = next(w for seed in range(99) if POISON not in (w := Wish((1,), seed, steps)).answer()[0])
    task = asyncio.ensure_future(gather(submit(pool, long)))
    [home] = [replica.index for replica in pool.replicas if replica.load]
    return long, task, 1 - home


@pytest.mark.parametrize("router", ["prefix", "round-robin"])
@pytest.mark.parametrize("count", [2, 3])
def test_answers_are_the_oracles_and_every_replica_works(count: int, router: str) -> None:
    async def main() -> None:
        async with pool_of(replication=of(count, router)) as pool:
            await all_ready(pool)
            asked = wishes(1, 60)
            got = await gather_all([submit(pool, wish) for wish in asked])
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            assert all(replica.stats.num_steps > 0 for replica in pool.replicas)
            assert pool.stats.num_steps == sum(replica.stats.num_steps for replica in pool.replicas)
            assert pool.num_waiting == pool.num_waiting_tokens == 0
            assert pool.info is not None
            assert pool.info.num_blocks == count * 1024

    run(main())


@pytest.mark.parametrize("count", [2, 3])
def test_any_mixture_of_deaths_aborts_poison_and_arrivals(count: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def main() -> None:
        options = EngineOptions(model="ledger", block_size=4, max_batch_size=8, check=True)
        engine = ("--blocks", "300", "--crash-on", str(POISON), "--step-seconds", "0.001")
        async with pool_of(*engine, options=options, replication=of(count)) as pool:
            await all_ready(pool)  # an engine that is killed twice before it was ever ready is given up
            asked = innocent(150, seed)
            asked += [Wish((POISON, n), n, 9) for n in range(2)]
            rng.shuffle(asked)
            live: list[tuple[Wish, asyncio.Task[tuple[list[int], str | None, Update]]]] = []
            while asked:
                for wish in [asked.pop() for _ in range(min(len(asked), rng.randint(10, 40)))]:
                    stream = submit(pool, wish)
                    if rng.random() < 0.2:
                        asyncio.get_running_loop().call_later(rng.random() / 10, stream.abort)
                    else:
                        live.append((wish, asyncio.ensure_future(gather(stream))))
                target = rng.randrange(pool.num_unfinished + 1)
                await until(lambda: pool.num_unfinished <= target, "some have ended")  # noqa: B023
                for replica in rng.sample(list(pool.replicas), rng.choice([1, 1, count])):
                    if replica.pid is not None and may_be_killed(replica):
                        os.kill(replica.pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
            for wish, task in live:
                tokens, reason, _ = await task
                if POISON in wish.prompt:
                    assert (tokens, reason) == ([], "error")
                else:
                    assert (tokens, reason) == wish.answer()
            await until(lambda: pool.num_unfinished == 0, "the aborted are gone")
            await all_ready(pool)
            await until(lambda: pool.stats.num_held_blocks == 0, "no block is held")
            assert pool.num_waiting == pool.num_waiting_tokens == 0
            assert not any(replica.submitted or replica.unstarted for replica in pool.replicas)

    run(main())


def test_who_is_killed_moves_at_once(tmp_path: Path) -> None:
    """The killed engine does not come back before everything has ended."""
    loading = tmp_path / "loading"

    async def main() -> None:
        options = EngineOptions(model="ledger", max_batch_size=8, check=True)
        engine = ("--load-while", str(loading), "--step-seconds", "0.002")
        async with pool_of(*engine, options=options, replication=of(2)) as pool:
            await all_ready(pool)
            asked = wishes(3, 40)
            results = [asyncio.ensure_future(gather(submit(pool, wish))) for wish in asked]
            await until(lambda: pool.num_unfinished <= 30, "some have ended")
            loading.touch()
            kill(pool, 0)
            got = await asyncio.gather(*results)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            assert pool.replicas[0].state == "restarting"
            assert pool.replicas.not_ready == (0,)
            assert pool.state == "ready"
            assert pool.step_age == 0
            loading.unlink()
            await all_ready(pool)

    run(main())


def test_a_replica_that_comes_back_takes_its_part_of_what_waits(tmp_path: Path) -> None:
    loading = tmp_path / "loading"

    async def main() -> None:
        options = EngineOptions(model="ledger", max_batch_size=1, check=True)
        engine = ("--load-while", str(loading), "--step-seconds", "0.01")
        async with pool_of(*engine, options=options, replication=of(2)) as pool:
            await all_ready(pool)
            loading.touch()
            kill(pool, 0)
            await until(lambda: pool.replicas[0].state == "restarting", "the death is noticed")
            asked = wishes(4, 20, most_tokens=20)
            results = [asyncio.ensure_future(gather(submit(pool, wish))) for wish in asked]
            assert pool.replicas[1].load == 20
            loading.unlink()
            await until(lambda: not pool.replicas.not_ready, "it is back")
            first, second = (replica.load for replica in pool.replicas)
            assert abs(first - second) <= 1
            got = await asyncio.gather(*results)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]

    run(main())


@pytest.mark.parametrize("how", ["--crash-on", "--raise-on"])
def test_poison_takes_no_innocent_of_another_replica_along(how: str) -> None:
    """One replica is busy all the time: nobody is tried there, and its engine never dies."""

    async def main() -> None:
        async with pool_of(how, str(POISON), "--step-seconds", "0.005", replication=of(2)) as pool:
            long, answer, other = await two_homes(pool, 600)
            safe = pool.replicas[1 - other].pid
            asked = innocent(20)
            poison = asyncio.ensure_future(gather(submit(pool, Wish((2, POISON), 1, 50))))
            assert pool.replicas[other].load == 1, "the poison is where the long stream is not"
            got = await gather_all([submit(pool, wish) for wish in asked])
            assert [tokens for tokens, _, _ in got] == [wish.answer()[0] for wish in asked]
            tokens, reason, last = await poison
            assert (tokens, reason) == ([], "error")
            assert last.error == "this request makes the engine crash"
            assert (await answer)[:2] == long.answer()
            assert pool.replicas[1 - other].pid == safe
            assert pool.replicas[1 - other].num_restarts == 0

    run(main())


@pytest.mark.parametrize("count", [2, 3])
def test_a_trial_never_takes_the_last_replica_that_serves(count: int, tmp_path: Path) -> None:
    """The poison's replica does not come back for a while: it is tried on an idle one, but for the last."""
    loading = tmp_path / "loading"

    async def main() -> None:
        engine = ("--crash-on", str(POISON), "--load-while", str(loading), "--step-seconds", "0.002")
        async with pool_of(*engine, replication=of(count)) as pool:
            await all_ready(pool)
            loading.touch()
            poison = asyncio.ensure_future(gather(submit(pool, Wish((POISON,), 1, 50))))
            await until(lambda: len(pool.replicas.in_force) == 1, "one is left")
            [last] = pool.replicas.in_force
            pid = last.pid
            for wish in innocent(5):
                assert (await gather(submit(pool, wish)))[:2] == wish.answer()
            assert len(pool.replicas.in_force) == 1
            assert poison.done() == (count == 3), "it was alone both times"
            loading.unlink()
            assert (await poison)[:2] == ([], "error")
            assert last.pid == pid
            await all_ready(pool)

    run(main())


def test_a_replica_that_never_comes_back_leaves_its_requests_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspects have no place of their own then: one of the others gets free for them."""
    monkeypatch.setattr("orcaserve.serve.supervisor.BACKOFF_SECONDS", (0.01, 0.05))
    monkeypatch.setattr("orcaserve.serve.supervisor.MOST_FRUITLESS", 3)
    broken = tmp_path / "broken"

    async def main() -> None:
        engine = ("--crash-on", str(POISON), "--die-while", str(broken), "--step-seconds", "0.02")
        async with pool_of(*engine, replication=of(2)) as pool:
            long, answer, other = await two_homes(pool, 300)
            broken.touch()
            poison = asyncio.ensure_future(gather(submit(pool, Wish((POISON,), 1, 50))))
            await until(lambda: pool.replicas[other].state == "failed", "it is given up")
            broken.unlink()
            assert pool.state == "ready"
            late = innocent(5)
            streams = [submit(pool, wish) for wish in late]
            assert (await answer)[:2] == long.answer()
            assert pool.replicas[1 - other].num_restarts == 0, "no trial before it was free"
            assert (await poison)[:2] == ([], "error")
            got = await gather_all(streams)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in late]
            assert pool.replicas.not_ready == (other,)
            broken.touch()
            kill(pool, 1 - other)
            await until(lambda: pool.state == "failed", "all are given up")
            assert "exit code 12" in str(pool.failure)

    run(main())


def test_replicas_of_another_profile_get_nothing_until_they_are_all_that_is_there(tmp_path: Path) -> None:
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    loading = tmp_path / "loading"

    async def main() -> None:
        options = EngineOptions(model="ledger", max_batch_size=1)
        engine = ("--profiles", str(profiles), "--load-while", str(loading), "--step-seconds", "0.005")
        async with pool_of(*engine, options=options, replication=of(2)) as pool:
            await until(lambda: all(one.state == "ready" for one in pool.replicas), "both are there")
            [odd] = pool.replicas.not_ready
            assert pool.info is not None
            assert pool.info.num_blocks == 1024
            metrics = Metrics("m")
            metrics.watch(lambda: pool.stats, lambda: pool.info, pool.replicas)
            assert f'orcaserve:replica_ready{{model_name="m",replica="{odd}"}} 0.0' in metrics.render().decode()
            begun, untouched = submit(pool, Wish((1,), 2, 1000)), submit(pool, Wish((2,), 2, 10))
            await anext(begun)
            assert pool.replicas[odd].load == 0
            kill(pool, 1 - odd)
            _, reason, last = await gather(begun)
            assert reason == "error"
            assert "numerics profile" in str(last.error)
            assert (await gather(untouched))[0] == Wish((2,), 2, 10).answer()[0]
            assert pool.info.profile == pool.replicas[1 - odd].info.profile

    run(main())


def test_who_is_held_while_no_engine_is_there_waits(tmp_path: Path) -> None:
    loading = tmp_path / "loading"

    async def main() -> None:
        async with pool_of("--load-while", str(loading), "--step-seconds", "0.005") as pool:
            streams = [submit(pool, Wish((1,), number, 400)) for number in range(3)]
            await anext(streams[0])
            loading.touch()
            kill(pool, 0)
            await until(lambda: pool.state == "restarting", "its death is known")
            # What it said last stands until it has been reaped.
            await until(lambda: (pool.stats.num_running, pool.stats.num_waiting) == (0, 3), "they are held")
            streams.append(submit(pool, Wish((1,), 4, 5)))
            assert (pool.stats.num_running, pool.stats.num_waiting) == (0, 4)
            loading.unlink()
            await gather_all(streams)
            await until(lambda: pool.stats.num_running == pool.stats.num_waiting == 0, "nobody is left")

    run(main())


def test_counters_never_go_down() -> None:
    async def main() -> None:
        async with pool_of(replication=of(2)) as pool:
            await all_ready(pool)
            seen = [0]
            for round in range(3):
                await gather_all([submit(pool, wish) for wish in wishes(round, 10)])
                seen.append(pool.stats.prefix_queries)
                pid = kill(pool, round % 2)
                await until(lambda: not is_alive(pid), "it is dead")  # noqa: B023
                await all_ready(pool)
                seen.append(pool.stats.prefix_queries)
            assert seen == sorted(seen)
            assert seen[1] > 0

    run(main())


def test_nothing_is_left_behind() -> None:
    async def main() -> None:
        async with pool_of(replication=of(3)) as pool:
            await all_ready(pool)
            pids = [replica.pid for replica in pool.replicas]
            submit(pool, wishes(1, 1)[0])
        assert not any(is_alive(pid) for pid in pids)

    run(main())


def hits(router: str) -> int:
    """Cached tokens of four chats of four turns each, which take turns, on two replicas."""
    found = 0

    async def main() -> None:
        nonlocal found
        async with pool_of(replication=of(2, router)) as pool:
            await all_ready(pool)
            for turn in range(1, 5):
                for chat in (0, 1, 2):
                    prompt = [100 * chat + i for i in range(64 * turn)]
                    async for update in pool.submit(prompt, SamplingParams(max_tokens=3)):
                        found += update.num_cached

    run(main())
    return found


def test_the_prefix_router_finds_what_round_robin_misses() -> None:
    best = 3 * (64 + 128 + 192)
    assert hits("prefix") == best
    assert hits("round-robin") < best


def test_replicas_share_out_the_host() -> None:
    options = EngineOptions(model="x", threads=5, step_log="log")
    assert shares(options, 1) == [options]
    parts = shares(options, 3)
    assert [part.threads for part in parts] == [1, 1, 1]
    assert [part.step_log for part in parts] == ["log.0", "log.1", "log.2"]
    assert all(part.memory == parts[0].memory and part.memory for part in parts)
    assert [part.threads for part in shares(options, 2)] == [2, 2]


def test_who_was_sent_to_engines_that_had_stopped_before_is_no_suspect() -> None:
    """None of them had heard of it. Twice alone on board would be poison."""

    async def main() -> None:
        async with pool_of(replication=of(3, "round-robin")) as pool:
            await all_ready(pool)
            pids = [replica.pid for replica in pool.replicas]
            assert None not in pids
            wish = wishes(5, 1)[0]
            os.kill(pids[0], signal.SIGSTOP)
            answer = asyncio.ensure_future(gather(submit(pool, wish)))
            assert [replica.load for replica in pool.replicas] == [1, 0, 0]
            await asyncio.sleep(2 * BEAT_SECONDS)  # they are found out later
            for pid in pids[1:]:
                os.kill(pid, signal.SIGSTOP)
            assert (await answer)[:2] == wish.answer()
            assert [replica.pid in pids for replica in pool.replicas] == [False, False, False]

    run(main())


def choice(arrival: int) -> Choice:
    return Choice(
        arrival, NewRequest(id=0, token_ids=(1,), num_prompt=1, max_tokens=1, params=SamplingParams()), (), Terms()
    )


def test_one_kill_from_outside_is_no_evidence_and_a_second_one_is() -> None:
    suspects, crowd = Suspects(), [choice(0), choice(1), choice(2)]
    assert suspects.blame(crowd, is_alone=False, is_excusable=True) == []
    assert not any(one in suspects for one in crowd)
    assert suspects.blame(crowd[1:], is_alone=False, is_excusable=True) == []
    assert [one in suspects for one in crowd] == [False, True, True]
    suspects.acquit(crowd[1])
    assert suspects.blame([crowd[2]], is_alone=True, is_excusable=False) == []
    assert suspects.blame([crowd[2]], is_alone=True, is_excusable=False) == [crowd[2]]
