"""What several ranks bring and cost on this machine: throughput, how busy each is, and the control plane's share.

Orca's section 4.1 and Fig. 8: stages without bubbles, since each always has a batch of its own, against microbatches of
one batch; and batches that travel beside the activations against such that travel with them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.drive import drive
from orcaserve.bench.paper.engine import Engine, Setup
from orcaserve.bench.workloads import Work
from orcaserve.bench.workloads.spec import make
from orcaserve.core.policy import DEFAULT, STATIC

SETTLE = 0.5  # seconds until every rank has said how busy it was
MICROBATCHED = msgspec.structs.replace(STATIC, name="static", deal=True)

# (tensor, pipeline, threads of all, control plane) -> an engine, and the busy seconds of its ranks so far
Ranks = Callable[[int, int, int, str], AbstractContextManager[tuple[Engine, Callable[[], tuple[float, ...]]]]]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the trace. rate: (prompt + generated) tokens/s; busy: share of the time of each rank."""

    name: str
    ranks: str
    policy: str
    threads: int
    rate: float
    seconds: float
    iterations: int
    busy: tuple[float, ...]


class Iteration(msgspec.Struct, frozen=True, kw_only=True):
    """Decodes of so many requests: microseconds of an iteration, the median of its rounds, by who runs it."""

    requests: int
    inside: float
    worker: float
    separate: float
    mixed: float


class Found(msgspec.Struct, frozen=True):
    """iterations: in this process; in one worker process; in two stages, the planes separate and mixed."""

    work: str
    runs: list[Run]
    iterations: list[Iteration]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """inside: an engine in this process, of one thread. batch: most requests of a batch. seed: of the work."""

    inside: Engine
    ranks: Ranks
    requests: int
    batch: int
    rounds: int
    seed: int


def run(plan: Plan, say: Callable[[str], None]) -> Found:
    """Measures. say: told what comes next. Raises BenchError for a model that is too short for the work."""
    longest = plan.inside.max_model_len
    a, b = min(512, longest * 4 // 5), min(128, longest // 5)
    text = f"burst:in=32-{a},out=1-{b},n={plan.requests}"
    work = make(text, vocab=plan.inside.vocab_size, seed=plan.seed)
    return Found(text, _trace(plan, work, say), _iterations(plan, say))


def _trace(plan: Plan, work: Work, say: Callable[[str], None]) -> list[Run]:
    """One stage of one thread, then two: continuous, and static with a batch's rows dealt out as microbatches."""
    ways = [
        ("one stage", 1, 1, 1, DEFAULT),
        ("two stages", 1, 2, 2, DEFAULT),
        ("two ranks share the layers", 2, 1, 2, DEFAULT),
        ("two stages, static microbatches", 1, 2, 2, MICROBATCHED),
        ("one stage, static", 1, 1, 1, STATIC),
    ]
    found: dict[str, list[Run]] = {name: [] for name, *_ in ways}
    for number in range(plan.rounds):
        for name, tensor, pipeline, threads, policy in ways:
            say(f"round {number + 1} of {plan.rounds}: {name}")
            with plan.ranks(tensor, pipeline, threads, "separate") as (engine, busy):
                setup = Setup(name=name, policy=policy, max_batch_size=plan.batch, depth=pipeline)
                drive(engine, make("burst:in=40,out=8,n=4", vocab=engine.vocab_size, seed=1), setup)
                time.sleep(SETTLE)
                before = busy()
                trial = drive(engine, work, setup)
                seconds = measures.wall(trial.records)
                time.sleep(SETTLE)
                shares = tuple((after - then) / seconds for after, then in zip(busy(), before, strict=True))
            found[name].append(
                Run(
                    name=name,
                    ranks=f"TP {tensor} x PP {pipeline}",
                    policy=policy.name,
                    threads=threads,
                    rate=measures.total_rate(trial.records) or 0.0,
                    seconds=seconds,
                    iterations=len(trial.samples),
                    busy=shares,
                )
            )
    return [sorted(runs, key=lambda one: one.rate)[len(runs) // 2] for runs in found.values()]


def _iterations(plan: Plan, say: Callable[[str], None]) -> list[Iteration]:
    """How long iterations take, in turns, so that the machine's moods meet all alike."""
    found = []
    sizes = [size for size in (1, 16, 256) if 24 * size <= plan.inside.num_slots]
    with (
        plan.ranks(1, 1, 1, "separate") as (worker, _),
        plan.ranks(1, 2, 2, "separate") as (separate, _),
        plan.ranks(1, 2, 2, "mixed") as (mixed, _),
    ):
        for size in sizes:
            say(f"iterations of {size} requests")
            took: dict[str, list[float]] = {}
            for _ in range(max(3, plan.rounds)):
                for name, engine in (
                    ("inside", plan.inside),
                    ("worker", worker),
                    ("separate", separate),
                    ("mixed", mixed),
                ):
                    took.setdefault(name, []).append(_decode(engine, size))
            medians = {name: 1e6 * statistics.median(each) for name, each in took.items()}
            found.append(Iteration(requests=size, **medians))
    return found


def _decode(engine: Engine, size: int) -> float:
    """Seconds of an iteration in which so many requests decode, one batch at a time."""
    work = make(f"burst:in=4,out=20,n={size}", vocab=engine.vocab_size, seed=1)
    setup = Setup(name="decode", policy=DEFAULT, max_batch_size=size, batch_tokens=4 * size)
    records = drive(engine, work, setup).records
    ends = sorted({time for record in records for time in record.token_times})
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def show(found: Found, console: Any) -> None:
    """Two tables on a rich console."""
    from rich.table import Table

    console.print(f"All at once: {found.work}; medians of rounds.")
    base = found.runs[0].rate
    table = Table("", "ranks", "threads", "tokens/s", "by one stage", "iterations", "busy", box=None)
    for one in found.runs:
        table.add_row(
            one.name,
            one.ranks,
            str(one.threads),
            f"{one.rate:.0f}",
            f"{one.rate / base:.2f}",
            str(one.iterations),
            " ".join(f"{share:.0%}" for share in one.busy),
        )
    console.print(table)
    head = ("requests", "in this process", "one worker", "two stages", "two stages, mixed planes")
    table = Table(*head, title="Microseconds of an iteration, one batch at a time", box=None)
    for at in found.iterations:
        table.add_row(str(at.requests), *(f"{x:.0f}" for x in (at.inside, at.worker, at.separate, at.mixed)))
    console.print(table)


def save(found: Found, path: Any) -> None:
    """As JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
