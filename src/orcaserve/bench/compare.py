"""Gives several running servers, and engines without one, the same works in turn, round by round, and reports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from orcaserve.bench import client, report, workloads
from orcaserve.bench.client import Record, Server
from orcaserve.bench.measures import FIGURES, figures
from orcaserve.bench.offline import Offline, Program
from orcaserve.bench.report import Machine, Report, Run, Workload
from orcaserve.bench.workloads import Item, Work

# Does a work and tells what came when; calls back when a reply has ended, if it can tell.
_Run = Callable[[Work, Callable[[], None]], Awaitable[list[Record]]]


class Plan(msgspec.Struct, frozen=True):
    """What to compare. works: their names; requests: how many a trace or Poisson work has."""

    servers: tuple[Server | Offline, ...]
    works: tuple[str, ...]
    rounds: int = 3
    requests: int = 32
    vocab: int = 151936
    seed: int = 0

    def work(self, name: str, round: int) -> Work:
        return workloads.make(name, vocab=self.vocab, seed=self.seed, round=round, requests=self.requests)


def run(plan: Plan, out: Path | None, terminal: Console) -> Report:
    """`compare`, in a loop of its own."""
    return client.in_loop(compare(plan, out, terminal))


async def compare(plan: Plan, out: Path | None, terminal: Console) -> Report:
    """Runs the plan. The report so far is written into `out` after every round, with the works themselves.

    Raises BenchError if a server cannot do even a small request; later failures are part of the report.
    """
    machine, date = Machine.this(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    works = [Workload.of(plan.work(name, 1)) for name in plan.works]
    runs: list[Run] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with AsyncExitStack() as stack:
        ready = [await _ready(server, _warm_up(plan), stack) for server in plan.servers]
        found = Report(date, machine, plan.seed, plan.vocab, [server for server, _ in ready], works, runs)
        progress = stack.enter_context(Progress(*columns, console=terminal, refresh_per_second=2, transient=True))
        task = progress.add_task("")

        def watch(round: int, work: Work, name: str) -> Callable[[], None]:
            title = f"round {round} of {plan.rounds}, {work.name}, {name}"
            progress.reset(task, total=len(work.items), description=title)
            return lambda: progress.advance(task)

        for round in range(1, plan.rounds + 1):
            async for run in _round(plan, [(server.name, run) for server, run in ready], round, watch):
                runs.append(run)
                terminal.print(_said(run, works), markup=False, highlight=False, soft_wrap=True)
            if out is not None:
                _write(found, plan, round, out)
    return found


async def _ready(server: Server | Offline, warm_up: Work, stack: AsyncExitStack) -> tuple[Server | Offline, _Run]:
    """What is known of it now, and how it does works. A command's process lasts as long as the stack."""
    if isinstance(server, Offline):
        program = await stack.enter_async_context(Program.started(server))
        return server, lambda work, on_reply: program.run(work)
    known = await client.usable(server, warm_up)
    return known, lambda work, on_reply: client.run(known, work, on_reply)


async def _round(
    plan: Plan,
    servers: Sequence[tuple[str, _Run]],
    round: int,
    watch: Callable[[int, Work, str], Callable[[], None]],
) -> AsyncIterator[Run]:
    """Every work in turn by every server; who begins changes from round to round. One server works, the others idle."""
    first = (round - 1) % len(servers)
    for name in plan.works:
        work = plan.work(name, round)
        for server, run in [*servers[first:], *servers[:first]]:
            # Whoever has been idle for minutes has cold caches and sleeping threads, and no work should pay for it.
            await run(_warm_up(plan), lambda: None)
            on_reply = watch(round, work, server)
            start, cpu = time.perf_counter(), time.process_time()
            records = await run(work, on_reply)
            share = (time.process_time() - cpu) / (time.perf_counter() - start)
            yield Run(round, name, server, share, records)


def _warm_up(plan: Plan) -> Work:
    [item] = plan.work("decode-1", 0).items
    return Work("warm-up", "decode", (Item(0.0, item.prompt_ids, 8),))


def _said(run: Run, works: list[Workload]) -> str:
    """A finished run in one line: its first figure."""
    [kind] = [work.kind for work in works if work.name == run.work]
    figure, value = FIGURES[kind][0], figures(kind, run.records)[0]
    failed = sum(record.error is not None for record in run.records)
    said = f"{failed} requests failed" if failed else f"{figure.name} {report.number(value)} {figure.unit}"
    return f"round {run.round}  {run.work:14} {run.server:20} {said}"


def _write(found: Report, plan: Plan, round: int, out: Path) -> None:
    (out / "works").mkdir(parents=True, exist_ok=True)
    for name in plan.works:
        workloads.save(plan.work(name, round), out / "works" / f"{name}.round-{round}.jsonl")
    try:
        from orcaserve.bench.draw import draw
    except ImportError:  # matplotlib is an extra
        report.write(found, out)
    else:
        draw(found, out / "report.png")
        report.write(found, out, "report.png")
