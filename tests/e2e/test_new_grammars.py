"""A grammar is compiled while others get their tokens, in one process and in several."""

from __future__ import annotations

import asyncio

import kernel_sets
import pytest

from orcaserve import builtin
from orcaserve.core.config import EngineOptions
from orcaserve.core.request import SamplingParams
from orcaserve.serve.pool import Pool
from orcaserve.serve.protocol import CompletionRequest
from orcaserve.serve.stream import Stream
from orcaserve.serve.structured import Structures
from orcaserve.worker.grammars import NOT_FOLLOWED

pytestmark = kernel_sets.NEEDS_NATIVE

VOCAB_SIZE, ENDS, PROMPT = 3072, (1,), (5, 6, 7)
LONG = SamplingParams(max_tokens=1000, temperature=0)


async def slow_grammar() -> str:
    """Takes some tenths of a second."""
    asked = CompletionRequest(
        prompt="x", guided_json={"properties": {f"p{i}": {"pattern": f"^(a|b)*{i}$"} for i in range(400)}}
    )
    found = await Structures(builtin.MODEL_DIR, VOCAB_SIZE, ENDS).grammar(asked)
    assert found is not None
    return found


async def first(stream: Stream) -> tuple[int, ...]:
    async for update in stream:
        assert update.error is None, update.error
        return update.token_ids
    raise AssertionError("a stream without a token")


@pytest.mark.parametrize("stages", [1, 2])
def test_a_slow_grammar_is_compiled_while_others_get_their_tokens(stages: int) -> None:
    """The engine is asked at once, without the door, so that what it does not know it compiles itself."""

    async def run() -> None:
        grammar = await slow_grammar()
        pool = Pool(EngineOptions(model=str(builtin.MODEL_DIR), kv_memory=8 << 20, pipeline_parallel=stages))
        await pool.start()
        try:
            await pool.ready()
            order: list[int] = []

            async def listen() -> None:
                while True:
                    async for update in pool.submit(PROMPT, LONG):
                        order.extend(update.token_ids)

            listening = asyncio.ensure_future(listen())
            while not order:
                await asyncio.sleep(0.001)
            params = SamplingParams(max_tokens=3, temperature=0, grammar=grammar)
            before = len(order)
            waiting = pool.submit(PROMPT, params, end_token_ids=ENDS)
            tokens = await first(waiting)
            assert len(order) - before >= 20, f"{len(order) - before} tokens while one waited for its grammar"
            assert (await first(pool.submit(PROMPT, params, end_token_ids=ENDS)))[0] == tokens[0]

            # One that is cancelled meanwhile is gone; one that cannot be compiled fails, in the same words as ever.
            given_up = pool.submit(PROMPT, SamplingParams(grammar=grammar + " "), end_token_ids=ENDS)
            bad = pool.submit(PROMPT, SamplingParams(grammar="no grammar"), end_token_ids=ENDS)
            given_up.abort()
            [error] = [update.error async for update in bad]
            assert error is not None and error.startswith(NOT_FOLLOWED)
            waiting.abort()
            listening.cancel()
            assert await pool.drain(30)
        finally:
            await pool.close()

    asyncio.run(run())
