"""What the pool's tests share: a pool over the ledger engine, the oracle, and ways to wait."""

from __future__ import annotations

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from ledger_engine import VOCAB

from orcaserve.core.config import EngineOptions
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.engine.ledger import ledger_answer
from orcaserve.serve.pool import Pool
from orcaserve.serve.replica import Replica
from orcaserve.serve.stream import Stream, Update

ENGINE = (sys.executable, str(Path(__file__).with_name("ledger_engine.py")))
PATIENCE = 60.0  # seconds; only a test that fails waits for so long


class Wish(msgspec.Struct, frozen=True):
    """A request and, by the oracle, its answer."""

    prompt: tuple[int, ...]
    seed: int
    max_tokens: int
    end_token_ids: tuple[int, ...] = ()

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(seed=self.seed, max_tokens=self.max_tokens, logprobs=0)

    def answer(self, choice: int = 0) -> tuple[list[int], str]:
        request = NewRequest(
            id=0,
            token_ids=self.prompt,
            num_prompt=len(self.prompt),
            max_tokens=self.max_tokens,
            params=self.params,
            seed=self.seed,
            choice=choice,
            end_token_ids=self.end_token_ids,
        )
        tokens, reason = ledger_answer(request, VOCAB)
        return tokens, reason


def wishes(seed: int, count: int, most_tokens: int = 60) -> list[Wish]:
    rng = random.Random(seed)
    return [
        Wish(
            tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 80))),
            rng.randrange(2**62),
            rng.randint(1, most_tokens),
            tuple(rng.sample(range(VOCAB), rng.choice([0, 5]))),
        )
        for _ in range(count)
    ]


def may_be_killed(replica: Replica) -> bool:
    """Whether nobody there has been alone on board of an engine that died, and got no token since: that is poison."""
    return not any(choice.lone_crashes for choice in replica.submitted.values())


def run(main: Coroutine[Any, Any, None], loop: str = "asyncio") -> None:
    factory = uvloop.new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(main, 2 * PATIENCE))


@asynccontextmanager
async def pool_of(
    *engine: str, options: EngineOptions | None = None, wait: bool = True, **more: Any
) -> AsyncIterator[Pool]:
    """A pool over a ledger engine with these options, closed at the end."""
    pool = Pool(options or EngineOptions(model="ledger", check=True), command=[*ENGINE, *engine], **more)
    await pool.start()
    try:
        if wait:
            await asyncio.wait_for(pool.ready(), PATIENCE)
        yield pool
    finally:
        await pool.close()


def submit(pool: Pool, wish: Wish, **more: Any) -> Stream:
    return pool.submit(wish.prompt, wish.params, end_token_ids=wish.end_token_ids, **more)


async def gather(stream: Stream) -> tuple[list[int], str | None, Update]:
    """All tokens of a one-choice stream, its finish reason, and its last update."""
    tokens: list[int] = []
    update = None
    async for update in stream:
        tokens += update.token_ids
        assert len(update.logprobs) in (0, len(update.token_ids))
    assert update is not None
    return tokens, update.finish_reason, update


async def until(condition: Callable[[], bool], what: str) -> None:
    """Waits for a condition that no event tells about."""
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"in vain: {what}")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def gather_all(streams: Sequence[Stream]) -> list[tuple[list[int], str | None, Update]]:
    return await asyncio.gather(*map(gather, streams))
