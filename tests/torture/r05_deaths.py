"""R5: engine, workers, frontend and launcher are killed and frozen at random moments under 32 streams.

After an engine's or a worker's end every stream must go on, bit by bit as in a calm run; after a frontend's, or that of
a program that has launched an engine for itself, nothing may be left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from e2e.crowd import body, stream
from e2e.serving import Serving, is_alive

from torture.rows import Outcome, Row, Setup

ROWS = (
    Row(
        "R5",
        "kill -9 and SIGSTOP of engine and workers × 100 under 32 streams; of the frontend and the launcher × 20",
        "noticed ≤ 1 s (frozen ≤ 3 beats); no hang; serving again within weight-load time + 5 s; ≥ 99 % of streams "
        "resume bit-identically after engine or worker; no orphans after any",
    ),
)
STREAMS = 32
BODIES = [body(i, 40 + 2 * i) for i in range(STREAMS)]
OPTIONS = ("--threads", "2", "--kv-memory", "8MiB")
LAYOUTS = {"TP=1": (), "PP=2": ("--pipeline-parallel-size", "2")}
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
NOTICED_SECONDS = 1.0
FROZEN_SECONDS = 1.5  # three missed beats of 0.25 s, the one that was heard before, and half a second for its stacks
AGAIN_SECONDS = 5.0
LEFT_SECONDS = 2.0
PATIENCE = 120.0
RESTARTS = "orcaserve:replica_restarts_total"

LAUNCHER = """
from orcaserve import LLM, SamplingParams
with LLM(threads=1, kv_memory=8 << 20) as llm:
    while True:
        llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=200))
        print("it runs", flush=True)
"""


@dataclass
class Round:
    """What came of one death, in seconds from then on. again: until another engine was ready; None: it was not."""

    what: str
    is_frozen: bool
    noticed: float | None
    again: float | None
    same: int
    faults: list[str] = field(default_factory=list)


def torture(setup: Setup) -> Iterator[Outcome]:
    [row] = ROWS
    rounds = setup.size("rounds", 1, 100)
    ends = setup.size("ends", 1, 20)
    names = list(LAYOUTS)[: setup.size("layouts", 1, 2)]
    figures, trace, causes = [], [], []
    is_met = True
    for name in names:
        done, start_seconds = asyncio.run(deaths(setup, name, rounds))
        kills = [one.noticed for one in done if not one.is_frozen and one.noticed is not None]
        stops = [one.noticed for one in done if one.is_frozen and one.noticed is not None]
        again = [one.again for one in done if one.again is not None]
        same, asked = sum(one.same for one in done), STREAMS * len(done)
        figures.append(
            f"{name}: {len(done)} deaths, noticed after {_spread(kills)} (killed) and {_spread(stops)} (frozen), "
            f"another ready after {_spread(again)} (first start {start_seconds:.1f} s), {same} of {asked} streams "
            "bit-identical"
        )
        trace += [f"{name}, {one.what}: {fault}" for one in done for fault in one.faults]
        late = {
            "noticed late": max(kills, default=0) > NOTICED_SECONDS or max(stops, default=0) > FROZEN_SECONDS,
            "served late": max(again, default=0) > start_seconds + AGAIN_SECONDS,
        }
        causes += [f"{name}: {what}" for what, is_late in late.items() if is_late]
        is_met = is_met and same >= 0.99 * asked
    left = [(kind, fault) for kind in (frontend, launcher) for _ in range(ends) for fault in kind()]
    figures.append(f"{ends} × frontend and {ends} × launcher killed: {len(left)} things left behind")
    trace += [f"{kind.__name__} killed: {fault}" for kind, fault in left]
    yield Outcome(row, "; ".join(figures), is_met and not trace and not causes, "; ".join(causes), tuple(trace))


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s" if seconds else "not at all"


# -- engine and workers ---------------------------------------------------------------------------------------------


async def deaths(setup: Setup, layout: str, rounds: int) -> tuple[list[Round], float]:
    """The rounds of one layout on one server, and how long its engine took to start at first."""
    rng = setup.random("R5", layout)
    with Serving(*OPTIONS, *LAYOUTS[layout], timeout=PATIENCE) as server:
        start_seconds = time.time() - server.engine.create_time()
        calm, _ = await crowd(server.url, [0] * STREAMS)
        total = sum(len(answer[1]) for answer in calm)
        done = []
        num_workers = len(_workers(server))
        # A frozen parent does not matter: nobody waits for it.
        mortal = [(victim, number) for victim in range(1 + num_workers) for number in SIGNALS]
        plan = [one for one in mortal if one != (num_workers, signal.SIGSTOP) or not num_workers] * rounds
        rng.shuffle(plan)
        for victim, number in plan:
            done.append(await _death(server, calm, victim, number, rng.uniform(0.1, 0.8) * total, num_workers))
            if done[-1].again is None:
                break
    return done, start_seconds


async def _death(
    server: Serving, calm: Sequence[object], victim: int, number: signal.Signals, when: float, num_workers: int
) -> Round:
    """victim: 0 is the engine, others are its workers, the last their parent. when: how many tokens have come."""
    while len(_workers(server)) < num_workers:  # of an engine that starts again
        await asyncio.sleep(0.05)
    engine = server.engine
    family = [engine, *_workers(server)]
    name = "the engine" if not victim else "the parent" if victim == num_workers else f"worker {victim - 1}"
    what = f"{number.name} of {name} after {when:.0f} tokens"
    one = Round(what, number == signal.SIGSTOP, None, None, 0)
    restarts = server.gauge(RESTARTS)
    progress = [0] * STREAMS
    running = asyncio.ensure_future(crowd(server.url, progress))
    while sum(progress) < when and not running.done():
        await asyncio.sleep(0.002)
    began = time.monotonic()
    family[victim].send_signal(number)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while psutil.pid_exists(engine.pid):  # until somebody has noticed, and reaped it
                await asyncio.sleep(0.002)
            one.noticed = time.monotonic() - began
            async with httpx.AsyncClient(base_url=server.url) as client:
                while _gauge((await client.get("/metrics")).text, RESTARTS) == restarts:
                    await asyncio.sleep(0.05)
            one.again = time.monotonic() - began
    if one.again is None:
        one.faults.append("it did not serve again")
    try:
        answers, errors = await asyncio.wait_for(running, PATIENCE)
    except TimeoutError:
        one.faults.append("streams hang")
        return one
    for i, (got, expected) in enumerate(zip(answers, calm, strict=True)):
        one.same += got == expected
        if got != expected:
            one.faults.append(f"stream {i}: {errors.get(i, got)} instead of {expected}")
    one.faults += [f"process {orphan.pid} lives on" for orphan in family if is_alive(orphan.pid)]
    return one


def _gauge(metrics: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name + "{"))


def _workers(server: Serving) -> list[psutil.Process]:
    """In the order of their ranks, and last their parent, if there are any."""
    with contextlib.suppress(psutil.Error):
        for parent in server.engine.children():
            found = [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]
            return [*sorted(found, key=lambda child: child.pid), parent]
    return []


async def crowd(url: str, progress: list[int]) -> tuple[list, dict[int, str]]:
    """The answers of all streams, None where one failed, and how those have failed."""
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits) as client:
        tasks = (stream(client, asked, progress, i) for i, asked in enumerate(BODIES))
        found = await asyncio.gather(*tasks, return_exceptions=True)
    errors = {i: f"{type(one).__name__}: {one}" for i, one in enumerate(found) if isinstance(one, BaseException)}
    return [None if i in errors else one for i, one in enumerate(found)], errors


# -- frontend and launcher ------------------------------------------------------------------------------------------


def frontend() -> list[str]:
    """Kills a server's frontend while it streams; what is left of it."""
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="orcaserve-r05-"))
        server = Serving(*OPTIONS, environment={"TMPDIR": temporary})
        stack.callback(server.process.wait)
        stack.callback(server.process.kill)
        answer = stack.enter_context(
            server.client.stream("POST", "/v1/completions", json={"prompt": "The", "max_tokens": 500, "stream": True})
        )
        lines = answer.iter_lines()  # held, since it hangs up where it is collected
        next(lines)
        left = _left_of(server.process, temporary)
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{server.url}/health", timeout=5)
            left.append("somebody answers at its port")
    return left


def launcher() -> list[str]:
    """Kills a Python program that runs an engine of its own; what is left of it."""
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="orcaserve-r05-"))
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", LAUNCHER],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "TMPDIR": temporary},
            )
        )
        stack.callback(process.kill)
        assert process.stdout is not None and process.stdout.readline() == b"it runs\n"
        return _left_of(process, temporary)


def _left_of(process: subprocess.Popen, temporary: str) -> list[str]:
    """Kills it, and gives it a moment."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "there must be an engine"
    names = {name for one in (psutil.Process(process.pid), *children) for name in _shared_memory(one.pid)}
    process.kill()
    process.wait()
    end = time.monotonic() + LEFT_SECONDS
    while any(is_alive(child.pid) for child in children) and time.monotonic() < end:
        time.sleep(0.01)
    left = [f"process {' '.join(child.cmdline())}" for child in children if is_alive(child.pid)]
    left += [f"temporary file {path.name}" for path in Path(temporary).iterdir()]
    return left + [f"shared memory {name}" for name in names if Path(name).exists()]


def _shared_memory(pid: int) -> Iterator[str]:
    for number in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if (name := os.readlink(number)).startswith("/dev/shm/"):  # noqa: S108
                yield name
