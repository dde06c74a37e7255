"""Where a choice's time went is told by the engines, and an engine's death takes nothing of it away."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from pool_world import gather, gather_all, pool_of, run, submit, until, wishes

from orcaserve.core.config import EngineOptions
from orcaserve.core.request import SamplingParams
from orcaserve.core.timing import Timing
from orcaserve.engine.step_log import Arrived, read
from orcaserve.serve.pool import Pool
from orcaserve.serve.stream import Stream


async def all_timings(stream: Stream) -> list[Timing | None]:
    return [update.timing async for update in stream]


async def kill(pool: Pool, then: Callable[[], None] = lambda: None) -> None:
    pid = pool.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    then()
    await until(lambda: pool.state == "ready" and pool.engine_pid != pid, "another engine is ready")


def test_the_last_update_has_it_and_each_if_that_is_asked() -> None:
    async def main() -> None:
        async with pool_of() as pool:
            wish = wishes(1, 1)[0]
            plain, timed = submit(pool, wish), submit(pool, wish, timed=True)
            told, all_told = await asyncio.gather(all_timings(plain), all_timings(timed))
            assert told[-1] is not None and all(timing is None for timing in told[:-1])
            assert all(timing is not None for timing in all_told)
            for timing in (told[-1], all_told[-1]):
                assert timing is not None
                assert timing.iterations == len(wish.answer()[0]) and len(timing.ids) == 1
                assert timing.prefill_seconds > 0 and timing.lost_seconds == 0

    run(main())


def test_the_time_of_every_life_is_counted() -> None:
    """Timed or not, killed while it waited, read its prompt or decoded: the sum is all its time, and no more."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def main() -> None:
        options = EngineOptions(model="ledger", block_size=4, max_batch_size=8, max_batch_tokens=64)
        async with pool_of("--blocks", "200", "--step-seconds", "0.002", options=options) as pool:
            asked = wishes(seed, 40, most_tokens=120)
            began = time.monotonic()
            is_timed = [rng.random() < 0.5 for _ in asked]
            streams = [submit(pool, wish, timed=timed) for wish, timed in zip(asked, is_timed, strict=True)]
            ended: dict[int, float] = {}
            results = []
            for number, stream in enumerate(streams):
                results.append(task := asyncio.ensure_future(gather(stream)))
                task.add_done_callback(lambda _, number=number: ended.update({number: time.monotonic() - began}))
            for left in (30, 20):
                await until(lambda: pool.num_unfinished <= left, "some have ended")  # noqa: B023
                await kill(pool)
            got = await asyncio.gather(*results)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            lives = []
            for number, (tokens, _, last) in enumerate(got):
                timing = last.timing
                assert timing is not None
                lives.append(len(timing.ids))
                assert 0 < timing.seconds <= ended[number] + 1e-6, (number, timing, ended[number])
                assert len(set(timing.ids)) == len(timing.ids)
                parts = (timing.queue_seconds, timing.prefill_seconds, timing.decode_seconds, timing.lost_seconds)
                assert min(parts) >= 0
                if timing.preemptions == 0 and len(timing.ids) == 1:
                    assert timing.lost_seconds == 0 and timing.iterations >= len(tokens)
                if is_timed[number] and len(timing.ids) > 1:
                    assert timing.iterations >= len(tokens), "what was told before the crash still counts"
            assert set(lives) == {1, 2, 3}
            # Those that were there from the first kill on have lost what the restart took.
            resumed = [last.timing for _, _, last in got if last.timing is not None and len(last.timing.ids) == 3]
            assert any(timing.lost_seconds > 0 for timing in resumed)

    run(main())


def test_what_waited_in_the_queue_of_a_dead_engine_has_waited(tmp_path: Path) -> None:
    stall = tmp_path / "stall"

    async def main() -> None:
        options = EngineOptions(model="ledger", max_batch_size=1, max_batch_tokens=64)
        async with pool_of("--stall-while", str(stall), options=options) as pool:
            stall.touch()
            runs = pool.submit((1, 2), SamplingParams(max_tokens=5, seed=1))
            await until(stall.with_suffix(".stalled").exists, "an iteration is under way")
            waits = pool.submit((3, 4), SamplingParams(max_tokens=5, seed=1))
            results = [asyncio.ensure_future(gather(stream)) for stream in (runs, waits)]
            await asyncio.sleep(0.1)
            await kill(pool, then=stall.unlink)
            (_, _, first), (_, _, second) = await asyncio.gather(*results)
            assert first.timing is not None and second.timing is not None
            assert second.timing.queue_seconds > 0.1 and len(second.timing.ids) == 2
            assert second.timing.lost_seconds == 0, "it has lost nothing: it had not begun"
            assert len(first.timing.ids) == 2

    run(main())


def test_the_log_has_the_names_and_the_ids_that_are_told(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"

    async def main() -> None:
        options = EngineOptions(model="ledger", step_log=str(log))
        async with pool_of(options=options) as pool:
            streams = [submit(pool, wish, name=f"cmpl-{i}") for i, wish in enumerate(wishes(3, 5))]
            got = await gather_all(streams)
            ids = [last.timing.ids for _, _, last in got if last.timing is not None]
        arrived = {}
        for life in read(log.read_bytes()):
            arrived |= {event.name: event.id for event in life.events if isinstance(event, Arrived)}
        assert [(arrived[f"cmpl-{i}"],) for i in range(5)] == ids

    run(main())
