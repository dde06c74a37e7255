"""The promise under fire: 100 streams, the engine killed three times, and every text as in an undisturbed run."""

from __future__ import annotations

import asyncio
import time

from crowd import all_streams, body
from serving import Serving

STREAMS = 100
BODIES = [body(i, 30 + i % 50) for i in range(STREAMS)]


async def disturbed(server: Serving, total: int) -> tuple[list, list[int]]:
    """The same streams while the engine dies when a sixth, a third and a half of all tokens have come."""
    progress = [0] * STREAMS
    running = asyncio.ensure_future(all_streams(server.url, BODIES, progress))
    killed: list[int] = []
    for share in (1 / 6, 1 / 3, 1 / 2):
        while sum(progress) < share * total:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.005)
        engine = await asyncio.to_thread(lambda: server.engine)
        while engine.pid in killed:
            engine = await asyncio.to_thread(lambda: server.engine)
        assert not running.done()
        engine.kill()
        killed.append(engine.pid)
    return await running, killed


def test_100_streams_while_the_engine_is_killed_three_times() -> None:
    with Serving("--kv-memory", "16MiB", "--max-batch-size", "64") as server:
        began = time.monotonic()
        calm = asyncio.run(all_streams(server.url, BODIES, [0] * STREAMS))
        calm_seconds = time.monotonic() - began
        total = sum(len(ids) for _, ids, _, _ in calm)
        began = time.monotonic()
        stormy, killed = asyncio.run(disturbed(server, total))
        print(
            f"{total} tokens: {calm_seconds:.1f} s undisturbed, {time.monotonic() - began:.1f} s with kills of {killed}"
        )
        assert len(set(killed)) == 3
        for i, (expected, got) in enumerate(zip(calm, stormy, strict=True)):
            assert got == expected, f"stream {i}: {got} instead of {expected}"
        assert {reason for _, _, _, reason in calm} <= {"stop", "length"}
        server.client.get("/health").raise_for_status()
        assert server.gauge("vllm:num_requests_running") == 0
        assert server.gauge("vllm:kv_cache_usage_perc") == 0
