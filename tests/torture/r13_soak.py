"""R13: a server at four fifths of what it can do, for an hour, while one of its processes is killed every minute.

The killing begins after a quarter of an hour, since nothing can be said of the memory of who lives for a minute. Every
answer is compared with the one that the same request had alone, before. Memory and descriptors are read every few
seconds, and everything is written down in `soak.jsonl`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

import httpx
import psutil
from e2e.serving import Serving

from torture.asking import Ask, Reply, ask, ask_all, faults, new_client
from torture.rows import Outcome, Row, Setup
from torture.shapes import OURS, draw
from torture.slopes import Points, ends, settled, slope
from torture.watching import leftovers, metrics, processes

ROWS = (Row("R13", "one-hour soak", "RSS slope ≤ 0.1 KiB per request; fds flat"),)

MOST_KIB = 0.1  # per request
LEAST_SHARE = 0.999  # of requests answered
LOAD = 0.8
IN_FLIGHT = 32
JUDGED_FROM = 600  # seconds of a process's life; what it grows by in less is its warming up
_WARM_UP = 0.25  # of each life
_LAST_LOOKS = 5  # at rest: a run of seconds may end while an engine starts, which needs descriptors of its own


@dataclass
class Soak:
    """What has been seen so far. Owned by `_Soaking`.

    memory: of each process, by kind and id, as (seconds, requests answered by then, KiB). descriptors: the frontend's,
    but for clients', over the requests answered.
    """

    sent: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    memory: dict[tuple[str, int], list[tuple[float, int, float]]] = field(default_factory=lambda: defaultdict(list))
    descriptors: list[tuple[int, int]] = field(default_factory=list)


def torture(setup: Setup) -> Iterator[Outcome]:
    ranks = () if setup.scale == "short" else ("--tensor-parallel-size", "2")
    began = time.monotonic()
    with (
        Serving("--kv-memory", "8MiB", "--max-model-len", "256", *ranks) as server,
        (setup.folder / "soak.jsonl").open("w") as record,
    ):
        start_seconds = time.monotonic() - began
        kinds = range(setup.size("kinds", 24, 400))
        asks = [one.alone(stream=one.streams) for one in (draw(setup, "soak", number, OURS) for number in kinds)]
        solos = asyncio.run(_ask_all(server.url, asks, 1))
        if bad := [number for number, reply in solos.items() if faults(asks[number], reply)]:
            raise AssertionError(f"alone, request {bad[0]} gets {solos[bad[0]]}")
        capacity = asyncio.run(_capacity(server.url, asks, setup.size("probe", 2, 30)))
        kill_every = setup.size("kill_every", 4, 60)
        # While an engine starts again nothing is computed: that part of the time is not there to be loaded.
        rate = LOAD * capacity * max(0.5, 1 - start_seconds / kill_every)
        soaking = _Soaking(setup, server, asks, solos, record)
        asyncio.run(soaking.run(rate, kill_every))
        left = _rest(server)
        for _ in range(_LAST_LOOKS):
            soaking.look()
        yield _outcome(setup, soaking.soak, capacity, rate, left)


async def _ask_all(url: str, asks: Sequence[Ask], in_flight: int) -> dict[int, Reply]:
    async with new_client(url, in_flight) as client:
        return await ask_all(client, asks, in_flight)


async def _capacity(url: str, asks: Sequence[Ask], seconds: float) -> float:
    """Requests per second that so many clients get answered, each asking again and again."""
    end = time.monotonic() + seconds
    answered = 0

    async def again_and_again(client: httpx.AsyncClient, begin: int) -> None:
        nonlocal answered
        number = begin
        while time.monotonic() < end:
            await ask(client, asks[number % len(asks)])
            answered += 1
            number += IN_FLIGHT

    began = time.monotonic()
    async with new_client(url, IN_FLIGHT) as client, asyncio.TaskGroup() as tasks:
        for begin in range(IN_FLIGHT):
            tasks.create_task(again_and_again(client, begin))
    return answered / (time.monotonic() - began)


class _Soaking:
    """Owner of the run: its clients, its killer and its observer."""

    def __init__(
        self, setup: Setup, server: Serving, asks: Sequence[Ask], solos: Mapping[int, Reply], record: TextIO
    ) -> None:
        self.soak = Soak()
        self._setup = setup
        self._pid = server.process.pid
        self._url = server.url
        self._asks = asks
        self._solos = solos
        self._record = record
        self._began = time.monotonic()

    async def run(self, rate: float, kill_every: float) -> None:
        """Until everything that was asked has been answered, or not."""
        chance = self._setup.random("arrivals")
        end = self._began + self._setup.size("seconds", 8, 3600)
        beside = [asyncio.create_task(self._kill(kill_every)), asyncio.create_task(self._observe())]
        async with new_client(self._url, 4096) as client, asyncio.TaskGroup() as tasks:
            due = time.monotonic()
            while (due := due + chance.expovariate(rate)) < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(self._ask(client, chance.choice(self._asks)))
            beside[0].cancel()
        beside[1].cancel()
        for task, end_of in zip(beside, await asyncio.gather(*beside, return_exceptions=True), strict=True):
            if not task.cancelled() and isinstance(end_of, BaseException):
                raise end_of

    async def _ask(self, client: httpx.AsyncClient, one: Ask) -> None:
        soak = self.soak
        soak.sent += 1
        reply = await ask(client, one)
        if not reply.is_whole:
            soak.unanswered.append(f"request {one.number}: {'; '.join(faults(one, reply))}")
            return self._note("unanswered", what=soak.unanswered[-1])
        soak.answered += 1
        if found := [*faults(one, reply), *filter(None, [reply.differs(self._solos[one.number])])]:
            soak.wrong.append(f"request {one.number}: {'; '.join(found)}")
            self._note("wrong", what=soak.wrong[-1])

    async def _kill(self, every: float) -> None:
        """One of the processes that have no clients, as chance will have it."""
        chance = self._setup.random("kills")
        await asyncio.sleep(self._setup.size("calm", 0, 900))
        while True:
            await asyncio.sleep(every)
            there = await asyncio.to_thread(lambda: [pair for pair in processes(self._pid) if pair[0] != "frontend"])
            if there:
                name, process = chance.choice(there)
                process.kill()
                self.soak.killed.append(name)
                self._note("killed", what=name, pid=process.pid)

    async def _observe(self) -> None:
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(self._setup.size("look_every", 1, 5))

    def look(self) -> None:
        """Processes come and go while they are looked at."""
        soak = self.soak
        try:
            for name, process in processes(self._pid):
                kib = process.memory_info().rss / 1024
                soak.memory[name, process.pid].append((self._seconds, soak.answered, kib))
                self._note("memory", what=name, pid=process.pid, kib=kib, descriptors=process.num_fds())
                if name == "frontend":
                    clients = [one for one in process.net_connections("tcp") if one.status != psutil.CONN_LISTEN]
                    soak.descriptors.append((soak.answered, process.num_fds() - len(clients)))
        except psutil.NoSuchProcess:
            pass

    @property
    def _seconds(self) -> float:
        """Since it began."""
        return round(time.monotonic() - self._began, 3)

    def _note(self, kind: str, **more: object) -> None:
        self._record.write(
            json.dumps({"at": self._seconds, "kind": kind, "answered": self.soak.answered, **more}) + "\n"
        )
        self._record.flush()


def _rest(server: Serving) -> list[str]:
    """What its gauges say is still there once it has an engine and was given a while."""
    end = time.monotonic() + 60
    while (left := leftovers(server.url, {}, {})) or not metrics(server.url)["orcaserve:replica_ready"]:
        if time.monotonic() > end:
            return left or ["no engine"]
        time.sleep(0.1)
    return []


def _slope(soak: Soak, least_seconds: float, *names: str) -> float | None:
    """KiB per request of these kinds of process; None if none of them has lived long enough."""
    lives: list[Points] = []
    for (name, _), samples in soak.memory.items():
        if name in names and samples[-1][0] - samples[0][0] >= least_seconds:
            lives.append([(answered, kib) for _, answered, kib in settled(samples, _WARM_UP)])
    return slope(lives)


def _outcome(setup: Setup, soak: Soak, capacity: float, rate: float, left: Sequence[str]) -> Outcome:
    least = setup.size("judged_from", JUDGED_FROM, JUDGED_FROM)
    slopes = {"frontend": _slope(soak, least, "frontend"), "engine": _slope(soak, least, "engine", "parent", "worker")}
    known = {name: found for name, found in slopes.items() if found is not None}
    first, last = ends(settled(soak.descriptors, _WARM_UP))
    share = soak.answered / max(1, soak.sent)
    seconds = setup.size("seconds", 8, 3600)
    memory = ", ".join(f"{name} {found:+.3f} KiB per request" for name, found in known.items())
    return Outcome(
        ROWS[0],
        f"{seconds} s at {rate:.1f} of {capacity:.1f} requests/s: {soak.answered} of {soak.sent} "
        f"answered ({share:.2%}), {len(soak.wrong)} wrong, {len(soak.killed)} processes killed; "
        + (f"{memory}; " if memory else "")
        + f"descriptors {first:g} → {last:g}"
        + (f"; left: {'; '.join(left)}" if left else ""),
        not soak.wrong
        and share >= LEAST_SHARE
        and last <= first
        and not left
        and all(found <= MOST_KIB for found in known.values()),
        "" if len(known) == 2 else "too short to judge all memory by",
        tuple([*soak.wrong, *soak.unanswered][:5]),
    )
