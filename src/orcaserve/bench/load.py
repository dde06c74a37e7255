"""Puts a workload on one server, as an open loop: requests are sent when they are due, whatever has been answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from orcaserve.bench import client, load_report, workloads
from orcaserve.bench.client import Record, Reply, Server
from orcaserve.bench.load_report import Report
from orcaserve.bench.report import Machine, Workload
from orcaserve.bench.workloads import LOWEST_ID, Item, Work


class Plan(msgspec.Struct, frozen=True):
    """What to do. limits: of a request's times, for the goodput. warm_up: requests that do not count.

    silence: seconds without a byte after which a reply has failed. api_key: of the server; it is in no report.
    """

    server: Server
    work: Work
    limits: dict[str, float] = {}
    warm_up: int = 1
    vocab: int = 151936
    seed: int = 0
    silence: float = 600
    api_key: str | None = None


def run(plan: Plan, out: Path | None, terminal: Console) -> Report:
    """`put`, in a loop of its own."""
    return client.in_loop(put(plan, out, terminal))


async def put(plan: Plan, out: Path | None, terminal: Console) -> Report:
    """Runs the plan. `out` gets the workload, a line for each request as it ends, and the report.

    Raises BenchError if the server cannot do the warm-up; later failures are part of the report. If this is cancelled
    while requests are under way, as by Ctrl-C, it reports what there is.
    """
    machine, date = Machine.this(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    if out is not None:
        workloads.save(plan.work, out / "workload.jsonl")
    server = await client.usable(plan.server, _warm_up(plan), plan.api_key)
    records: list[Record] = []
    is_interrupted = False
    with ExitStack() as stack:
        file = None if out is None else stack.enter_context((out / "requests.jsonl").open("wb", buffering=0))
        progress = stack.enter_context(_progress(len(plan.work.items), terminal))

        def on_end(reply: Reply) -> None:
            record = reply.record()
            reply.arrived.clear()
            records.append(record)
            progress.ended(record)
            if file is not None:
                file.write(msgspec.json.encode(record) + b"\n")

        replies = [Reply(item) for item in plan.work.items]
        start, cpu = time.perf_counter(), time.process_time()
        try:
            await client.send(
                server, replies, on_sent=progress.sent, on_end=on_end, api_key=plan.api_key, silence=plan.silence
            )
        except asyncio.CancelledError:
            is_interrupted = True
        share = (time.process_time() - cpu) / (time.perf_counter() - start)
    found = Report(
        date=date,
        machine=machine,
        server=server,
        workload=Workload.of(plan.work),
        shares_prompts=plan.work.shares_prompts,
        seed=plan.seed,
        vocab=plan.vocab,
        warm_up=plan.warm_up,
        limits=plan.limits,
        records=sorted(records, key=lambda record: (record.due, record.sent)),
        is_interrupted=is_interrupted,
        client_cpu=share,
    )
    if out is not None:
        load_report.write(found, out)
    return found


def _warm_up(plan: Plan) -> Work:
    """As long as the first ones that count, but other token ids, and all at once."""
    ids, vocab = random.Random(f"{plan.seed} warm-up"), range(LOWEST_ID, plan.vocab)  # noqa: S311
    items = plan.work.items[: plan.warm_up]
    warm = (Item(0.0, tuple(ids.choices(vocab, k=len(item.prompt_ids))), item.max_tokens) for item in items)
    return Work("warm-up", "load", tuple(warm))


class _Progress:
    """A bar of requests that have ended. Owner of its counts."""

    def __init__(self, bar: Progress, total: int) -> None:
        self._bar, self._total = bar, total
        self._task = bar.add_task("", total=total)
        self._sent = self._ended = self._failed = 0
        self._say()

    def sent(self) -> None:
        self._sent += 1
        self._say()

    def ended(self, record: Record) -> None:
        self._ended += 1
        self._failed += record.error is not None
        self._say()

    def _say(self) -> None:
        said = f"{self._total} requests: {self._sent} sent, {self._ended - self._failed} answered"
        said += f", [red]{self._failed} failed[/]" if self._failed else ""
        self._bar.update(self._task, completed=self._ended, description=said)


@contextmanager
def _progress(total: int, terminal: Console) -> Iterator[_Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, refresh_per_second=4, transient=True) as bar:
        yield _Progress(bar, total)
