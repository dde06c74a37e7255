"""What the operator reads of an engine that freezes, hangs, or will not come back."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal

import pytest
from pool_world import ENGINE, PATIENCE, Wish, gather, is_alive, pool_of, run, submit, until

from orcaserve.core.config import EngineOptions
from orcaserve.serve.pool import Pool
from orcaserve.serve.supervisor import backoff

POISON = 999


def test_a_stopped_engine_is_replaced_and_its_stacks_are_written_down(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with pool_of("--step-seconds", "0.002") as pool:
            wish = Wish((1, 2, 3), 4, 200)
            stream = submit(pool, wish)
            await anext(stream)
            pid = pool.engine_pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            tokens, reason, _ = await gather(stream)
            assert reason == "length" and wish.answer()[0][-len(tokens) :] == tokens
            assert not is_alive(pid)
            assert pool.engine_pid not in (None, pid)

    run(main())
    said = capfd.readouterr().err
    assert "Fatal" not in said
    assert said.count("most recent call first") >= 4, "the loop, the reader, the writer, the beat"
    assert "in _serve" in said, "the loop is somewhere below it"


@pytest.mark.parametrize("how", ["--hang-on", "--seize-on"])
def test_the_stacks_of_a_hanging_engine_are_written_down(
    how: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a call that never returns, and in one that keeps Python's lock besides."""
    monkeypatch.setattr("orcaserve.serve.supervisor.STUCK_SECONDS", 0.1)

    async def main() -> None:
        async with pool_of(how, str(POISON)) as pool:
            _, reason, update = await gather(submit(pool, Wish((POISON,), 1, 9)))
            assert (reason, update.error) == ("error", "this request makes the engine crash")

    run(main())
    said = capfd.readouterr().err
    assert len(re.findall(r'ledger_engine.py", line \d+ in submit', said)) == 2, "it was tried twice"


def test_the_stacks_of_a_hanging_worker_are_written_down(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine waits for it, and is what is noticed to be stuck."""
    monkeypatch.setattr("orcaserve.serve.supervisor.STUCK_SECONDS", 0.3)

    async def main() -> None:
        async with pool_of("--wait-on", str(POISON)) as pool:
            _, reason, update = await gather(submit(pool, Wish((POISON,), 1, 9)))
            assert (reason, update.error) == ("error", "this request makes the engine crash")

    run(main())
    said = capfd.readouterr().err
    assert said.count("computes for ever") == 2, "it was tried twice"
    assert len(re.findall(r'hanging_worker.py", line \d+ in compute', said)) == 2
    assert len(re.findall(r'ledger_engine.py", line \d+ in submit', said)) == 2, "the engine's own follow"


def test_a_crash_loop_ends_with_a_clear_last_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines that start well and die of nothing that anyone has asked for."""
    monkeypatch.setattr("orcaserve.serve.supervisor.BACKOFF_SECONDS", (0.01, 0.05))
    num_deaths = 0

    async def main() -> None:
        nonlocal num_deaths
        pool = Pool(EngineOptions(model="ledger"), command=ENGINE)
        await pool.start()
        try:
            await asyncio.wait_for(pool.ready(), PATIENCE)
            while pool.state != "failed":
                await until(lambda: pool.state in ("ready", "failed"), "it is there, or never will be")
                if (pid := pool.engine_pid) is not None:
                    num_deaths += 1
                    os.kill(pid, signal.SIGKILL)
                    await until(lambda: pool.engine_pid != pid, "the death is noticed")
            assert pool.failure is not None
            assert pool.failure.startswith("the engine process died 8 times in a row (signal 9")
        finally:
            await pool.close()

    with caplog.at_level(logging.WARNING):
        run(main())
    assert num_deaths == 8
    assert sum("starting another" in record.message for record in caplog.records) == 7


def test_the_pause_between_starts_doubles() -> None:
    assert [backoff(fruitless) for fruitless in range(9)] == [0.1, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
