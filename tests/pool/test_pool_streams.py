"""Streams of an undisturbed pool: answers, choices, bounds, aborts, draining, and what is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pool_world import PATIENCE, Wish, gather, gather_all, is_alive, open_fds, pool_of, run, submit, until, wishes

from orcaserve.core.config import EngineOptions
from orcaserve.core.request import SamplingParams
from orcaserve.serve.admission import ContextLengthError, Limits, Refused, Unavailable
from orcaserve.serve.pool import EngineFailed, Pool
from orcaserve.serve.replicas import Replication
from orcaserve.serve.stream import FULL_BYTES
from orcaserve.serve.terms import Terms

LONG = Wish((1, 2, 3), 7, 4000)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_answers_are_the_oracles(loop: str) -> None:
    async def main() -> None:
        async with pool_of() as pool:
            asked = wishes(1, 40)
            got = await gather_all([submit(pool, wish) for wish in asked])
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            assert pool.num_unfinished == 0
            assert pool.num_waiting == pool.num_waiting_tokens == 0

    run(main(), loop)


def test_choices_share_seed_and_prompt() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            wish = Wish((5, 6), 11, 20)
            got: dict[int, list[int]] = {}
            stream = pool.submit(wish.prompt, SamplingParams(n=3, seed=11, max_tokens=20))
            async for update in stream:
                got.setdefault(update.choice, []).extend(update.token_ids)
            assert got == {choice: wish.answer(choice)[0] for choice in range(3)}

    run(main())


def test_a_drawn_seed_differs_from_request_to_request() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            streams = [pool.submit((1,), SamplingParams(max_tokens=8)) for _ in range(4)]
            assert len({tuple(tokens) for tokens, _, _ in await gather_all(streams)}) == 4

    run(main())


def test_prompt_logprobs_and_scoring() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            stream = pool.submit(range(50), SamplingParams(max_tokens=0, prompt_logprobs=0))
            tokens, reason, last = await gather(stream)
            assert (tokens, reason) == ([], "length")
            assert [entry.token_id for entry in last.prompt_logprobs] == list(range(1, 50))

    run(main())


def test_cached_prompt_tokens_are_told_once_and_salted_apart() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            told = []
            for salt in ("", "", "pepper"):
                stream = pool.submit(range(64), SamplingParams(max_tokens=5), cache_salt=salt)
                told.append(sum([update.num_cached async for update in stream]))
            assert told == [0, 48, 0]  # the last block is always computed

    run(main())


def test_a_slow_consumer_gets_few_large_updates() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            wish = Wish((9,), 3, 100)
            stream = submit(pool, wish)
            await until(lambda: pool.num_unfinished == 0, "the request ends though nobody reads")
            updates = [update async for update in stream]
            assert len(updates) == 1
            assert list(updates[0].token_ids) == wish.answer()[0]
            assert len(updates[0].logprobs) == 100

    run(main())


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_choice_that_nobody_reads_leaves_its_engine_and_loses_nothing(replicas: int) -> None:
    async def main() -> None:
        async with pool_of(replication=Replication(replicas=replicas)) as pool:
            wish = Wish((9, 8, 7), 3, 700)
            stream = submit(pool, wish)
            tokens: list[int] = []
            pauses = 0
            while True:
                await until(lambda: stream.is_full(0) or pool.num_unfinished == 0, "it fills up or ends")
                if pool.num_unfinished:
                    pauses += 1
                    await until(lambda: pool.stats.num_running == pool.stats.num_held_blocks == 0, "no engine has it")
                    assert (await gather(submit(pool, Wish((1,), 2, 20))))[1] == "length"  # others go on
                update = await anext(stream)
                tokens += update.token_ids
                assert len(update.logprobs) == len(update.token_ids)
                if update.finish_reason is not None:
                    break
                assert update.num_bytes < 2 * FULL_BYTES
            assert pauses >= 2
            assert (tokens, update.finish_reason) == wish.answer()

    run(main())


@pytest.mark.parametrize("how", ["leave", "crash", "drain", "timeout"])
def test_what_becomes_of_a_choice_that_waits_for_its_reader(how: str) -> None:
    async def main() -> None:
        async with pool_of() as pool:
            wish = Wish((9, 8, 7), 3, 300)
            stream = submit(pool, wish, terms=Terms(end_by=time.monotonic() + 2) if how == "timeout" else Terms())
            await until(lambda: stream.is_full(0), "it fills up")
            if how == "leave":
                stream.abort()
                assert pool.num_unfinished == 0
                return
            if how == "drain":
                assert await pool.drain(PATIENCE)
            elif how == "timeout":
                await until(lambda: pool.num_unfinished == 0, "its time is up")
            else:
                os.kill(pool.engine_pid, signal.SIGKILL)
                await until(lambda: pool.num_restarts == 1, "there is another engine")
                await gather(submit(pool, Wish((1,), 2, 20)))
                assert stream.is_full(0)
            tokens, reason, last = await gather(stream)
            expected, length = wish.answer()
            assert tokens == expected[: len(tokens)]
            if how == "timeout":
                assert last.cut_off == "timeout"
            else:
                assert (tokens, reason) == (expected, length)

    run(main())


def test_context_length_is_checked() -> None:
    async def main() -> None:
        async with pool_of("--max-model-len", "100") as pool:
            with pytest.raises(ContextLengthError) as error:
                pool.submit(range(60), SamplingParams(max_tokens=41))
            assert (error.value.num_prompt, error.value.max_tokens, error.value.max_model_len) == (60, 41, 100)
            with pytest.raises(ContextLengthError):
                pool.submit(range(100), SamplingParams())
            with pytest.raises(ValueError, match="empty prompt"):
                pool.submit((), SamplingParams())
            tokens, reason, _ = await gather(pool.submit(range(60), SamplingParams()))
            assert (len(tokens), reason) == (40, "length")

    run(main())


def test_a_request_that_the_engine_refuses_ends_with_an_error() -> None:
    async def main() -> None:
        async with pool_of("--blocks", "4") as pool:
            _, reason, last = await gather(pool.submit(range(60), SamplingParams(max_tokens=10)))
            assert reason == "error"
            assert "64" in str(last.error)
            assert pool.num_waiting == 0

    run(main())


@pytest.mark.parametrize("leave", ["abort", "aclose", "cancel", "drop", "with", "choice"])
def test_who_leaves_frees_his_blocks(leave: str) -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.002") as pool:
            stream = submit(pool, LONG)
            queued = submit(pool, LONG)
            await anext(stream)
            assert pool.stats.num_held_blocks > 0
            queued.abort()
            match leave:
                case "abort":
                    stream.abort()
                case "choice":
                    stream.abort(0)
                case "aclose":
                    await stream.aclose()
                case "with":
                    async with stream:
                        pass
                case "drop":
                    del stream
                case "cancel":
                    task = asyncio.create_task(gather(stream))
                    await asyncio.sleep(0)
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
            await until(lambda: pool.stats.num_held_blocks == 0, "no block is held")
            assert pool.num_unfinished == 0
            if leave in ("abort", "choice"):
                assert [update async for update in stream] == []

    run(main())


def test_one_choice_can_leave() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            stream = pool.submit((5, 6), SamplingParams(n=2, seed=11, max_tokens=200))
            got: list[int] = []
            async for update in stream:
                stream.abort(0)
                got += update.token_ids if update.choice == 1 else ()
            assert got == Wish((5, 6), 11, 200).answer(1)[0]

    run(main())


def test_an_abort_wakes_the_consumer() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.5") as pool:
            stream = submit(pool, LONG)

            async def consume() -> int:
                return len([update async for update in stream])

            consumer = asyncio.create_task(consume())
            await asyncio.sleep(0)
            stream.abort()
            assert await asyncio.wait_for(consumer, 10) == 0

    run(main())


def test_the_queue_is_bounded() -> None:
    async def main() -> None:
        limits = Limits(max_queue_requests=3, max_queue_tokens=1000)
        options = EngineOptions(model="ledger", max_batch_size=1)
        async with pool_of("--step-seconds", "0.01", limits=limits, options=options) as pool:
            running = submit(pool, LONG)
            await anext(running)
            assert pool.num_waiting == 0
            waiting = [pool.submit(range(10), SamplingParams(max_tokens=4)) for _ in range(3)]
            assert (pool.num_waiting, pool.num_waiting_tokens) == (3, 30)
            with pytest.raises(Refused) as error:
                pool.submit((1,), SamplingParams(max_tokens=4))
            assert 1 <= error.value.retry_after <= 120
            waiting.pop().abort()
            with pytest.raises(Refused):
                pool.submit(range(1000), SamplingParams(max_tokens=4))
            waiting.append(pool.submit((1,), SamplingParams(max_tokens=4)))
            running.abort()
            assert [reason for _, reason, _ in await gather_all(waiting)] == ["length"] * 3
            assert (pool.num_waiting, pool.num_waiting_tokens) == (0, 0)
            # A request beyond the limits is no reason to refuse it for ever.
            assert (await gather(pool.submit(range(1500), SamplingParams(max_tokens=4))))[1] == "length"

    run(main())


def test_drain_lets_everyone_end() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.002") as pool:
            asked = wishes(2, 10)
            streams = [submit(pool, wish) for wish in asked]
            results = asyncio.ensure_future(gather_all(streams))
            draining = asyncio.create_task(pool.drain(60))
            await asyncio.sleep(0)
            assert pool.state == "draining"
            with pytest.raises(Unavailable) as error:
                submit(pool, asked[0])
            assert error.value.reason == "draining"
            assert await draining
            assert [tokens for tokens, _, _ in await results] == [wish.answer()[0] for wish in asked]
            assert pool.engine_pid is None

    run(main())


def test_drain_has_a_limit() -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.05") as pool:
            stream = submit(pool, LONG)
            await anext(stream)
            assert not await pool.drain(0.01)
            _, reason, last = await gather(stream)
            assert (reason, last.cut_off) == ("error", "draining")

    run(main())


def test_a_model_that_cannot_be_served_says_so() -> None:
    told = []

    async def main() -> None:
        def on_progress(*stage: object) -> None:
            told.append(stage)

        async with pool_of("--fail", "no such model: x", wait=False, on_progress=on_progress) as pool:
            with pytest.raises(Unavailable) as error:
                pool.submit((1,), SamplingParams())
            assert error.value.reason == "loading"
            with pytest.raises(EngineFailed, match=r"^no such model: x$"):
                await pool.ready()
            assert pool.state == "failed"
            assert told == [("weights", 0, 2)]
            with pytest.raises(Unavailable) as error:
                pool.submit((1,), SamplingParams())
            assert error.value.reason == "failed"

    run(main())


@pytest.mark.parametrize("engine", [["--die-loading"], ["--no-such-option"]])
def test_an_engine_that_dies_while_loading_ends_the_start(engine: list[str]) -> None:
    async def main() -> None:
        async with pool_of(*engine, wait=False) as pool:
            with pytest.raises(EngineFailed, match="died while it was loading"):
                await pool.ready()

    run(main())


def test_a_worker_that_is_lost_while_loading_gets_another_try(tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.touch()

    async def main() -> None:
        async with pool_of("--lose-while", str(first), wait=False) as pool:
            await asyncio.wait_for(pool.ready(), PATIENCE)
            assert not first.exists()

    run(main())


def test_an_unknown_policy_and_a_missing_program_end_the_start() -> None:
    async def main() -> None:
        async with pool_of(options=EngineOptions(model="x", policy="fastest"), wait=False) as pool:
            with pytest.raises(EngineFailed, match="there is no policy 'fastest'; there are default"):
                await pool.ready()
        missing = Pool(EngineOptions(model="x"), command=["/no/such/program"])
        await missing.start()
        with pytest.raises(EngineFailed, match="No such file"):
            await missing.ready()
        await missing.close()

    run(main())


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_nothing_is_left_behind(loop: str) -> None:
    async def main() -> None:
        async with pool_of():
            pass
        before = open_fds(), len(asyncio.all_tasks())
        for engine in ([], ["--fail", "no"], ["--step-seconds", "30"]):
            async with pool_of(*engine, wait="--fail" not in engine) as pool:
                pid = pool.engine_pid
                if "--fail" not in engine:
                    submit(pool, LONG)
            assert pool.engine_pid is None
            assert pid is None or not is_alive(pid)
        loading = Pool(EngineOptions(model="x"), command=[sys.executable, "-c", "import time; time.sleep(100)"])
        await loading.start()
        await until(lambda: loading.engine_pid is not None, "a process")
        await loading.close()
        never_started = Pool(EngineOptions(model="x"))
        await never_started.close()
        await asyncio.sleep(0)
        assert (open_fds(), len(asyncio.all_tasks())) == before

    run(main(), loop)


def test_the_frontend_imports_no_torch() -> None:
    code = "import sys, orcaserve.serve.pool, orcaserve.serve.engine_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
