"""Streams of a pool whose engines die, freeze, hang or come back different; and an engine whose frontend dies."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pool_world import (
    ENGINE,
    PATIENCE,
    Wish,
    gather,
    gather_all,
    is_alive,
    may_be_killed,
    pool_of,
    run,
    submit,
    until,
    wishes,
)

from orcaserve.core.config import EngineOptions
from orcaserve.core.request import SamplingParams
from orcaserve.serve.pool import Pool
from orcaserve.serve.stream import Update

POISON = 999


async def replaced(pool: Pool, pid: int) -> None:
    await until(lambda: pool.state == "ready" and pool.engine_pid != pid, "another engine is ready")


async def kill_in_an_iteration(pool: Pool, stalled: Path) -> None:
    """stalled: the file by which a stalling engine tells that it is in one."""
    await until(stalled.exists, "an iteration is under way")
    pid = pool.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: pool.engine_pid != pid, "the death is noticed")
    stalled.unlink()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_streams_survive_three_kills(loop: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")

    async def main() -> None:
        options = EngineOptions(model="ledger", block_size=4)
        async with pool_of("--blocks", "600", options=options) as pool:  # small: preemptions happen too
            asked = wishes(seed, 200, most_tokens=150)
            streams = [submit(pool, wish) for wish in asked]
            results = [asyncio.ensure_future(gather(stream)) for stream in streams]
            for kill in range(3):
                left = 200 - 40 * (kill + 1)
                await until(lambda: pool.num_unfinished <= left, "some have ended")  # noqa: B023
                pid = pool.engine_pid
                assert pid is not None
                assert pool.num_unfinished > 0
                os.kill(pid, signal.SIGKILL)
                await replaced(pool, pid)
            got = await asyncio.gather(*results)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            assert all(len(result[0]) > 0 for result in got)
            await until(lambda: pool.stats.num_held_blocks == 0, "no block is held")

    run(main(), loop)


def test_any_mixture_of_deaths_aborts_and_arrivals() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def main() -> None:
        options = EngineOptions(model="ledger", block_size=4, max_batch_size=16, check=True)
        async with pool_of("--blocks", "300", "--crash-on", str(POISON), options=options) as pool:
            asked = [wish for wish in wishes(seed, 100) if POISON not in (*wish.prompt, *wish.answer()[0])]
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
                if (pid := pool.engine_pid) is not None and may_be_killed(pool.replicas[0]):
                    os.kill(pid, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
            for wish, task in live:
                tokens, reason, _ = await task
                if POISON in wish.prompt:
                    assert (tokens, reason) == ([], "error")
                else:
                    assert (tokens, reason) == wish.answer()
            await until(lambda: pool.num_unfinished == 0, "the aborted are gone")
            await until(lambda: pool.state == "ready" and pool.stats.num_blocks > 0, "an engine is ready")
            await until(lambda: pool.stats.num_held_blocks == 0, "no block is held")
            assert pool.num_waiting == pool.num_waiting_tokens == 0

    run(main())


@pytest.mark.parametrize(("policy", "depth"), [("default", 3), ("orca", 2), ("static", 1)])
def test_streams_survive_a_kill_under_any_policy(policy: str, depth: int) -> None:
    async def main() -> None:
        options = EngineOptions(model="ledger", policy=policy, depth=depth, max_batch_size=8, check=True)
        async with pool_of("--step-seconds", "0.001", options=options) as pool:
            asked = wishes(9, 30, most_tokens=30)
            results = [asyncio.ensure_future(gather(submit(pool, wish))) for wish in asked]
            await until(lambda: pool.num_unfinished <= 20, "some have ended")
            pid = pool.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            got = await asyncio.gather(*results)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            assert pool.num_restarts == 1

    run(main())


def test_log_probabilities_and_choices_survive_a_kill() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.002") as pool:
            params = SamplingParams(n=2, seed=5, max_tokens=120, logprobs=0, prompt_logprobs=0)
            solo, crowd = [], []
            async for update in pool.submit(range(40), params):
                solo.append(update)
            stream = pool.submit(range(40), params)
            killed = None
            async for update in stream:
                crowd.append(update)
                if killed is None and len(crowd) > 20:
                    killed = pool.engine_pid
                    os.kill(killed, signal.SIGKILL)
            assert killed is not None
            for choice in range(2):
                for field in ("token_ids", "logprobs", "prompt_logprobs"):
                    one, other = (
                        [item for update in updates if update.choice == choice for item in getattr(update, field)]
                        for updates in (solo, crowd)
                    )
                    assert one == other
                    assert len(one) == (39 if field == "prompt_logprobs" else 120)

    run(main())


def test_an_idle_engine_that_dies_is_replaced() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            for _ in range(2):
                pid = pool.engine_pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await replaced(pool, pid)
            wish = wishes(3, 1)[0]
            assert (await gather(submit(pool, wish)))[0] == wish.answer()[0]

    run(main())


def test_requests_are_taken_while_the_engine_restarts() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            pid = pool.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: pool.state == "restarting", "the death is noticed")
            wish = wishes(4, 1)[0]
            assert (await gather(submit(pool, wish)))[0] == wish.answer()[0]

    run(main())


@pytest.mark.parametrize("how", ["--crash-on", "--raise-on"])
def test_poison_ends_alone(how: str) -> None:
    async def main() -> None:
        async with pool_of(how, str(POISON)) as pool:
            asked = [wish for wish in wishes(5, 40) if POISON not in (*wish.prompt, *wish.answer()[0])]
            streams = [submit(pool, wish) for wish in asked]
            early = submit(pool, Wish((1, POISON), 1, 50))
            also = submit(pool, Wish((2, POISON), 1, 50))
            got = await gather_all([*streams, early, also])
            assert [tokens for tokens, _, _ in got[:-2]] == [wish.answer()[0] for wish in asked]
            for tokens, reason, last in got[-2:]:
                assert (tokens, reason) == ([], "error")
                assert last.error == "this request makes the engine crash"
            wish = asked[0]
            assert (await gather(submit(pool, wish)))[0] == wish.answer()[0]

    run(main())


def test_poison_in_the_middle_of_a_stream_ends_alone() -> None:
    """The token that kills is generated, not sent; what came before it has been delivered."""
    bad = next(wish for seed in range(1000) if POISON in (wish := Wish((seed,), seed, 60)).answer()[0][5:-1])
    until_then = bad.answer()[0][: bad.answer()[0].index(POISON) + 1]

    async def main() -> None:
        async with pool_of("--crash-on", str(POISON)) as pool:
            asked = [wish for wish in wishes(6, 30) if POISON not in (*wish.prompt, *wish.answer()[0])]
            got = await gather_all([submit(pool, wish) for wish in [*asked, bad]])
            assert [tokens for tokens, _, _ in got[:-1]] == [wish.answer()[0] for wish in asked]
            assert got[-1][1] == "error"
            # The engine may die before its writer has sent the last token, every time it comes that far.
            assert got[-1][0] in (until_then, until_then[:-1])

    run(main())


def test_a_lone_request_survives_one_kill() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.2") as pool:
            wish = Wish((1, 2), 3, 3)
            stream = submit(pool, wish)
            await until(lambda: pool.stats.num_running == 1, "it runs")
            pid = pool.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert (await gather(stream))[0] == wish.answer()[0]

    run(main())


def test_two_kills_at_the_same_progress_convict_nobody_who_was_alone_only_once(tmp_path: Path) -> None:
    stall, stalled = tmp_path / "x", tmp_path / "x.stalled"

    async def main() -> None:
        async with pool_of("--step-seconds", "0.005", "--stall-while", str(stall)) as pool:
            asked = [Wish((token,), 3, 150) for token in range(3)]
            streams = [submit(pool, wish) for wish in asked]
            begun = [list((await anext(stream)).token_ids) for stream in streams]
            stall.touch()
            for _ in range(2):  # all of them; then the first suspect alone
                await kill_in_an_iteration(pool, stalled)
            stall.unlink()
            got = await gather_all(streams)
            assert [first + tokens for first, (tokens, _, _) in zip(begun, got, strict=True)] == [
                wish.answer()[0] for wish in asked
            ]

    run(main())


def test_who_had_company_that_left_before_the_crash_was_noticed_was_not_alone(tmp_path: Path) -> None:
    stall, stalled = tmp_path / "x", tmp_path / "x.stalled"

    async def main() -> None:
        async with pool_of("--step-seconds", "0.005", "--stall-while", str(stall)) as pool:
            wish, other = Wish((1,), 3, 150), Wish((2,), 3, 150)
            stream, company = submit(pool, wish), submit(pool, other)
            begun = list((await anext(stream)).token_ids)
            await anext(company)
            stall.touch()
            for _ in range(2):  # both; then it alone
                await until(stalled.exists, "an iteration is under way")
                company.abort()
                await kill_in_an_iteration(pool, stalled)
            stall.unlink()
            assert begun + (await gather(stream))[0] == wish.answer()[0]

    run(main())


def test_poison_beside_a_long_innocent_is_found_at_once() -> None:
    """The innocent came first and goes on for long; whoever joins him must still get his turn alone."""

    async def main() -> None:
        async with pool_of("--crash-on", str(POISON), "--step-seconds", "0.02") as pool:
            long = next(w for seed in range(99) if POISON not in (w := Wish((1,), seed, 400)).answer()[0])
            innocent = submit(pool, long)
            await anext(innocent)
            assert (await gather(submit(pool, Wish((POISON,), 1, 50))))[1] == "error"
            assert pool.num_unfinished == 1
            assert pool.num_restarts <= 4
            assert (await anext(innocent)).finish_reason is None

    run(main())


def test_who_only_waited_is_no_suspect() -> None:
    async def main() -> None:
        options = EngineOptions(model="ledger", max_batch_size=1)
        async with pool_of("--crash-on", str(POISON), options=options) as pool:
            good = [wish for wish in wishes(10, 8) if POISON not in (*wish.prompt, *wish.answer()[0])]
            got = await gather_all([submit(pool, wish) for wish in [Wish((POISON,), 1, 9), *good]])
            assert [tokens for tokens, _, _ in got] == [[], *(wish.answer()[0] for wish in good)]
            assert pool.num_restarts == 2  # it was alone both times

    run(main())


def test_an_aborted_suspect_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        async with pool_of("--crash-on", str(POISON), "--step-seconds", "0.002") as pool:
            bad = submit(pool, Wish((POISON,), 1, 50))
            good = [wish for wish in wishes(7, 10) if POISON not in (*wish.prompt, *wish.answer()[0])]
            streams = [submit(pool, wish) for wish in good]
            await until(lambda: pool.state == "restarting", "the crash is noticed")
            bad.abort()
            got = await gather_all(streams)
            assert [tokens for tokens, _, _ in got] == [wish.answer()[0] for wish in good]
            assert pool.num_unfinished == 0

    run(main())


def test_another_profile_does_not_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        options = EngineOptions(model="ledger", max_batch_size=1)
        async with pool_of("--profiles", str(tmp_path), "--step-seconds", "0.005", options=options) as pool:
            begun, untouched = submit(pool, Wish((1,), 2, 1000)), submit(pool, Wish((2,), 2, 10))
            await anext(begun)
            pid = pool.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            _, reason, last = await gather(begun)
            assert reason == "error"
            assert "numerics profile" in str(last.error)
            assert (await gather(untouched))[0] == Wish((2,), 2, 10).answer()[0]

    run(main())


def test_an_engine_that_never_comes_back_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight starts in a row that lead nowhere."""
    monkeypatch.setattr("orcaserve.serve.supervisor.BACKOFF_SECONDS", (0.01, 0.05))
    switch = tmp_path / "broken"
    code = (
        "import os, sys\n"
        f"if os.path.exists({str(switch)!r}): os._exit(13)\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import ledger_engine\n"
        "sys.exit(ledger_engine.main(*map(int, sys.argv[-2:]), build=ledger_engine.build))\n"
    )

    async def main() -> None:
        pool = Pool(EngineOptions(model="ledger"), command=[sys.executable, "-c", code])
        await pool.start()
        try:
            await asyncio.wait_for(pool.ready(), PATIENCE)
            stream = submit(pool, Wish((1,), 2, 4000))
            await anext(stream)
            switch.touch()
            pid = pool.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert (await gather(stream))[1] == "error"
            assert pool.state == "failed"
            assert pool.failure is not None
            assert "exit code 13" in pool.failure
        finally:
            await pool.close()

    run(main())


def test_a_stuck_step_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orcaserve.serve.supervisor.STUCK_SECONDS", 0.1)

    async def main() -> None:
        async with pool_of("--hang-on", str(POISON)) as pool:
            good = [wish for wish in wishes(8, 5) if POISON not in (*wish.prompt, *wish.answer()[0])]
            got = await gather_all([submit(pool, wish) for wish in [Wish((POISON,), 1, 9), *good]])
            assert got[0][1] == "error"
            assert [tokens for tokens, _, _ in got[1:]] == [wish.answer()[0] for wish in good]

    run(main())


def test_a_loop_that_ends_without_closing_the_pool_leaves_no_engine() -> None:
    pids = []

    async def main() -> None:
        pool = Pool(EngineOptions(model="ledger"), command=ENGINE)
        await pool.start()
        await pool.ready()
        pids.append(pool.engine_pid)

    run(main())
    assert not is_alive(pids[0])


FRONTEND = """
import asyncio, sys
from pool_world import Wish, pool_of, submit

async def main():
    async with pool_of(*sys.argv[1:]) as pool:
        print(pool.engine_pid, flush=True)
        stream = submit(pool, Wish((999,), 2, 4000))
        await anext(stream)
        print("running", file=sys.stderr, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("engine", ["running", "seized", "stopped"])
def test_an_engine_does_not_outlive_its_frontend(engine: str) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    frontend = subprocess.Popen(
        [sys.executable, "-c", FRONTEND, *(["--seize-on", "999"] if engine == "seized" else [])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    try:
        assert frontend.stdout is not None
        assert frontend.stderr is not None
        pid = int(frontend.stdout.readline())
        assert frontend.stderr.readline() == (b"seized\n" if engine == "seized" else b"running\n")
        if engine == "stopped":
            os.kill(pid, signal.SIGSTOP)
    finally:
        frontend.kill()
        frontend.wait()
    end = time.monotonic() + PATIENCE
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(pid)
    frontend.communicate()


def test_an_engine_process_leaves_interrupts_to_the_frontend() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.002") as pool:
            pid = pool.engine_pid
            assert pid is not None
            wish = Wish((1, 2, 3), 4, 100)
            stream = submit(pool, wish)
            await anext(stream)
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
            tokens, _, _ = await gather(stream)
            assert tokens == wish.answer()[0][-len(tokens) :]
            assert pool.engine_pid == pid

    run(main())
