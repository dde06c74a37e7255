"""R6: more than the server can bear, as an open loop: what is answered in time, and how the rest is refused.

First the capacity is measured: requests a second that are answered while every client sends its next one when the last
one is answered. Then Poisson arrivals at 1, 2, 5 and 10 times that rate come, whatever is answered. Each request says
by when its first token is due (x-slo-ttft-ms). The loads come in turn, a sixth of their time each, six times over, as
a machine's own pace may change by a tenth within a minute, and they are compared. Goodput counts responses whose first
token came by then, from when the request was due, and whose tokens came quickly enough. A refusal's time is from when
it was sent until all of it was there. After each load a request is sent every quarter of a second: all is normal again
with the first of three in a row whose first token takes at most twice as long as on the idle server, and 50 ms.

With `--size fresh_connections=1` each request has a connection of its own: some servers close those that a request is
on its way to, which says nothing of how they bear the load.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
from e2e.serving import Serving

from orcaserve.bench import client, measures
from orcaserve.bench.client import Record, Reply, Server
from orcaserve.bench.workloads import Item, Work, spec
from torture.rows import Outcome, Row, Setup

ROWS = (
    Row(
        "R6",
        "open loop at 1, 2, 5, 10 × capacity",
        "goodput at 10 × ≥ 90 % of the best; 429 + Retry-After, p99 ≤ 50 ms",
    ),
)
HAS_NEIGHBOURS = True
LEAST_GOODPUT = 0.9
MOST_REFUSAL_SECONDS = 0.05
PROBE_SECONDS = 0.25
NORMAL_IN_A_ROW = 3
VOCAB = 3072
LIMITS = {"ttft": 1.0, "tpot": 0.2}
HEADERS = {"x-slo-ttft-ms": f"{1000 * LIMITS['ttft']:.0f}"}


@dataclass(frozen=True)
class Load:
    """What came of one load. refusals: seconds of each 429. late: seconds that the client itself was (p99).

    recovery: of its turns the longest; None: after one of them it was not seen.
    """

    factor: int
    sent: int
    answered: int
    good: int
    refusals: tuple[float, ...]
    unexplained: int  # of them without Retry-After
    expired: int
    server_errors: int
    others: tuple[str, ...]
    recovery: float | None
    late: float
    client_cpu: float

    @property
    def refusal_p99(self) -> float | None:
        return measures.quantile(self.refusals, 0.99)


@dataclass(frozen=True)
class _Turn:
    """A part of a load's time."""

    records: list[Record]
    recovery: float | None
    client_cpu: float


def torture(setup: Setup) -> Iterator[Outcome]:
    with _served(setup) as url:
        loads, capacity = client.in_loop(_Run(setup).loads(url))
    table = _table(loads, setup)
    (setup.folder / "r06.md").write_text(f"capacity {capacity:.2f} requests/s\n\n{table}\n")
    yield _judge(loads, capacity, setup)


@contextmanager
def _served(setup: Setup) -> Iterator[str]:
    """The neighbour's URL, or that of a server of our own, which has a core to itself if there are two."""
    if setup.url is not None:
        yield setup.url
        return
    cores = os.sched_getaffinity(0)
    is_apart = setup.scale == "full" and len(cores) > 1
    options = ("--max-queue-requests", "16") if setup.scale == "short" else ()
    try:
        if is_apart:
            os.sched_setaffinity(0, {min(cores)})
        with Serving("--threads", "1", "--log-level", "warning", "--kv-memory", "256MiB", *options) as server:
            if is_apart:
                os.sched_setaffinity(0, cores - {min(cores)})
            yield server.url
    finally:
        os.sched_setaffinity(0, cores)


class _Run:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._turns = setup.size("turns", 1, 6)
        self._seconds = setup.size("seconds", 1, 180) / self._turns
        self._clients = setup.size("clients", 8, 64)
        self._lengths = "in=8-32,out=4-16" if setup.scale == "short" else "in=32-256,out=64-256"
        self._headers = {"connection": "close"} if setup.size("fresh_connections", 0, 0) else {}
        self._factors = (1, 10) if setup.scale == "short" else (1, 2, 5, 10)

    async def loads(self, url: str) -> tuple[list[Load], float]:
        """What came of each load, and the capacity in requests a second."""
        server = await client.asked(Server("server", url.rstrip("/").removesuffix("/v1"), self._setup.model))
        waits = [await _first_token(server, _now(item), self._headers) for item in self._work(1, 5, "idle").items]
        idle = statistics.median([wait for wait in waits if wait is not None])
        capacity = await self._capacity(server)
        normal = 2 * idle + 0.05
        turns: dict[int, list[_Turn]] = {factor: [] for factor in self._factors}
        for number in range(self._turns):
            for factor, of in turns.items():
                of.append(await self._turn(server, capacity, factor, normal, number))
        return [_summed(factor, of) for factor, of in turns.items()], capacity

    def _work(self, rate: float, count: int, *names: object) -> Work:
        seed = self._setup.random("R6", *names).randrange(1 << 30)
        return spec.make(f"poisson:rate={rate:.4f},{self._lengths},n={count}", vocab=VOCAB, seed=seed)

    async def _capacity(self, server: Server) -> float:
        closed = msgspec.structs.replace(server, concurrency=self._clients)
        count = 4 * self._clients
        while True:
            items = map(_now, self._work(1, count, "capacity", count).items)
            replies = [Reply(item) for item in items]
            await client.send(closed, replies, headers=self._headers)
            records = [reply.record() for reply in replies]
            wrong = next((record.error for record in records if record.error), None)
            assert wrong is None, f"the server cannot do the workload: {wrong}"
            ends = sorted(record.last for record in records)
            if ends[-1] >= min(15, self._seconds / 2):
                # While the last ones end the server is not busy any more.
                busy = [end for end in ends[: -self._clients] if end > ends[0]]
                return len(busy) / (busy[-1] - ends[0])
            count *= 2

    async def _turn(self, server: Server, capacity: float, factor: int, normal: float, turn: int) -> _Turn:
        rate = factor * capacity
        work = self._work(rate, int(2 * rate * self._seconds) + 1, factor, turn)
        replies = [Reply(item) for item in work.items if item.at <= self._seconds]
        probes = list(map(_now, self._work(1, 300, "probes", factor, turn).items))
        cpu = time.process_time()
        headers = HEADERS | self._headers
        load = asyncio.create_task(client.send(server, replies, headers=headers))
        await asyncio.sleep(self._seconds)
        cpu = (time.process_time() - cpu) / self._seconds
        recovery = await _recovery(server, probes, headers, normal, self._setup.size("patience", 2, 60))
        await load
        return _Turn([reply.record() for reply in replies], recovery, cpu)


def _now(item: Item) -> Item:
    return msgspec.structs.replace(item, at=0.0)


async def _first_token(server: Server, item: Item, headers: dict[str, str]) -> float | None:
    """Seconds to the first token of a request that is sent now; None if it is refused."""
    reply = Reply(item)
    await client.send(server, [reply], headers=headers)
    record = reply.record()
    return None if record.error or not record.token_times else record.first - record.due


async def _recovery(
    server: Server, items: list[Item], headers: dict[str, str], normal: float, patience: float
) -> float | None:
    """Seconds from now until requests are answered as by an idle server; None: it takes longer than `patience`."""
    began = time.perf_counter()
    since: float | None = None
    in_a_row = 0
    for item in items:
        sent = time.perf_counter() - began
        seconds = await _first_token(server, item, headers)
        if seconds is None or seconds > normal:
            in_a_row, since = 0, None
        else:
            in_a_row, since = in_a_row + 1, sent if since is None else since
        if in_a_row == NORMAL_IN_A_ROW:
            return since
        if sent > patience:
            break
        await asyncio.sleep(max(0.0, sent + PROBE_SECONDS - (time.perf_counter() - began)))
    return None


def _summed(factor: int, turns: Sequence[_Turn]) -> Load:
    records = [record for turn in turns for record in turn.records]
    recoveries = [turn.recovery for turn in turns]
    known = [recovery for recovery in recoveries if recovery is not None]
    kinds = [record.error_kind for record in records]
    refused = [record for record in records if record.error_kind == "HTTP 429"]
    others = {None, "HTTP 429", "HTTP 408"}
    return Load(
        factor=factor,
        sent=len(records),
        answered=kinds.count(None),
        good=sum(measures.meets(record, LIMITS) for record in records),
        refusals=tuple((record.ended or record.sent) - record.sent for record in refused),
        unexplained=sum(record.retry_after is None for record in refused),
        expired=kinds.count("HTTP 408"),
        server_errors=sum(kind is not None and kind.startswith("HTTP 5") for kind in kinds),
        others=tuple(record.error or "" for record in records if record.error_kind not in others),
        recovery=max(known) if len(known) == len(recoveries) else None,
        late=measures.quantile([record.sent - record.due for record in records], 0.99) or 0.0,
        client_cpu=statistics.mean(turn.client_cpu for turn in turns),
    )


def _judge(loads: list[Load], capacity: float, setup: Setup) -> Outcome:
    """At the short scale without what a busy machine decides."""
    best = max(load.good for load in loads)
    share = loads[-1].good / best if best else 0.0
    refusals = sum(len(load.refusals) for load in loads)
    unexplained = sum(load.unexplained for load in loads)
    server_errors = sum(load.server_errors for load in loads)
    others = [error for load in loads for error in load.others]
    p99 = max((load.refusal_p99 or 0.0 for load in loads), default=0.0)
    recoveries = [load.recovery for load in loads]
    slowest = "never" if None in recoveries else f"after {max(r for r in recoveries if r is not None):.1f} s"
    figure = (
        f"capacity {capacity:.1f}/s; goodput at 10 × {share:.0%} of the best; {refusals} refused with 429, "
        f"{unexplained} of them without Retry-After, p99 {1000 * p99:.1f} ms at the worst load; "
        f"{sum(load.expired for load in loads)} × 408; {server_errors} × 5xx; {len(others)} others; normal {slowest}"
    )
    is_right = not server_errors and not unexplained and not others
    is_quick = share >= LEAST_GOODPUT and p99 <= MOST_REFUSAL_SECONDS and None not in recoveries
    is_short = setup.scale == "short"
    cause = "too short to judge goodput and times by" if is_short else ""
    return Outcome(ROWS[0], figure, is_right and (is_quick or is_short), cause, tuple(others[:5]))


def _table(loads: list[Load], setup: Setup) -> str:
    seconds = setup.size("seconds", 1, 180)
    best = max(load.good for load in loads)
    lines = [
        "| load | sent/s | answered/s | goodput/s | of best | 429 | p50 | p99 | 408 | 5xx | other | normal | late |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for load in loads:
        p50, p99 = (measures.quantile(load.refusals, share) for share in (0.5, 0.99))
        cells = (
            f"{load.factor} ×",
            f"{load.sent / seconds:.1f}",
            f"{load.answered / seconds:.2f}",
            f"{load.good / seconds:.2f}",
            f"{load.good / best:.0%}" if best else "—",
            f"{len(load.refusals)}",
            "—" if p50 is None else f"{1000 * p50:.1f} ms",
            "—" if p99 is None else f"{1000 * p99:.1f} ms",
            f"{load.expired}",
            f"{load.server_errors}",
            f"{len(load.others)}",
            "never" if load.recovery is None else f"{load.recovery:.1f} s",
            f"{1000 * load.late:.0f} ms",
        )
        lines.append(f"| {' | '.join(cells)} |")
    cpu = max(load.client_cpu for load in loads)
    return "\n".join([*lines, "", f"The client took {cpu:.0%} of a core; `late` is by how much it sent late (p99)."])
