"""A server on several worker processes: any of them may die or freeze, and every stream ends as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import kernel_sets
import psutil
from crowd import all_streams, body
from serving import Serving, is_alive

pytestmark = kernel_sets.NEEDS_NATIVE

STREAMS, RANKS = 24, 4
BODIES = [body(i, 30 + i % 50) for i in range(STREAMS)]


def workers(server: Serving) -> list[psutil.Process]:
    """Those that the engine has now."""
    ranks = [rank for parent in server.engine.children() for rank in parent.children()]
    return [rank for rank in ranks if rank.status() != psutil.STATUS_ZOMBIE]


async def disturbed(server: Serving, total: int, harm: list[tuple[int, int]]) -> tuple[list, list[int]]:
    """The streams while workers are harmed: (which, by what signal) at each third of all tokens."""
    progress = [0] * STREAMS
    running = asyncio.ensure_future(all_streams(server.url, BODIES, progress))
    gone: list[int] = []
    for i, (which, number) in enumerate(harm):
        while sum(progress) < (i + 1) / (len(harm) + 1) * total:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.005)
        while len(there := [p.pid for p in await asyncio.to_thread(workers, server)]) < RANKS or set(there) & set(gone):
            await asyncio.sleep(0.01)
        gone += there
        os.kill(there[which], number)
    return await running, gone


def test_streams_survive_their_workers() -> None:
    options = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--kv-memory", "8MiB"]
    with Serving(*options, "--max-batch-size", "32") as server:
        calm = asyncio.run(all_streams(server.url, BODIES, [0] * STREAMS))
        end = time.monotonic() + 10
        while True:  # ranks say how long they have worked four times a second, and the run is hardly longer
            lines = server.client.get("/metrics").text.splitlines()
            busy = [line for line in lines if line.startswith("orcaserve:rank_busy_seconds_total{")]
            assert [line.partition('rank="')[2][0] for line in busy] == list("0123")
            if all(float(line.split()[-1]) > 0 for line in busy):
                break
            assert time.monotonic() < end, f"every rank has worked: {busy}"
            time.sleep(0.1)
        total = sum(len(ids) for _, ids, _, _ in calm)
        began = time.monotonic()
        harm = [(3, signal.SIGKILL), (1, signal.SIGSTOP)]
        stormy, gone = asyncio.run(disturbed(server, total, harm))
        print(f"{total} tokens in {time.monotonic() - began:.1f} s, workers lost: {gone}")
        assert len(set(gone)) == 2 * RANKS
        for i, (expected, got) in enumerate(zip(calm, stormy, strict=True)):
            assert got == expected, f"stream {i}: {got} instead of {expected}"
        assert not any(map(is_alive, gone)), "a worker of a lost group lives on"
        last = [p.pid for p in workers(server)]
    time.sleep(1)
    assert not any(map(is_alive, last)), "workers outlived the server by a second"
    assert any("orcaserve/executors/worker_process.py" in line for line in server.lines), "the frozen one's stacks"


def test_a_worker_beats_before_it_loads_torch() -> None:
    """Where that takes longer than silence is borne: the first import on a slow disk, or among many."""
    code = "import sys, orcaserve.executors.worker_process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
