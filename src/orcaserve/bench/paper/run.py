"""Runs the parts one after the other on one engine, shows how far it is, and writes the report after each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from orcaserve.bench.client import BenchError
from orcaserve.bench.paper import PARTS, alone, curves, ladder, memory, report, variance
from orcaserve.bench.paper.engine import Engine, orca
from orcaserve.bench.paper.lab import Effort, Lab, Watch
from orcaserve.bench.paper.report import Found, ModelSize, Report
from orcaserve.bench.report import Machine
from orcaserve.bench.workloads import LOWEST_ID

# What each part is called, and who measures it: a field of Found.
MEASURES: dict[str, tuple[str, Callable[[Lab], Any]]] = {
    "alone": (alone.TITLE, alone.measure),
    "mixed": (curves.TITLES["mixed"], curves.mixed),
    "equal": (curves.TITLES["equal"], curves.equal),
    "variance": (variance.TITLE, variance.measure),
    "ladder": (ladder.TITLE, ladder.measure),
    "memory": (memory.TITLE, memory.measure),
}

Draw = Callable[[Report, Path], dict[str, str]]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do. versions: of the packages that compute; they are only reported."""

    engine: Engine
    effort: Effort
    seed: int
    parts: tuple[str, ...] = PARTS
    versions: dict[str, str] = {}


def run(plan: Plan, out: Path, draw: Draw, terminal: Console) -> Report:
    """Measures and writes. Raises BenchError, in one line, if the model cannot do what a part asks for."""
    if plan.engine.vocab_size <= LOWEST_ID:
        raise BenchError(f"the model knows {plan.engine.vocab_size} tokens; prompts are of ids from {LOWEST_ID} on")
    machine, date = Machine.this(), f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    found, seconds = Found(), dict[str, float]()
    with _watching(plan.parts, terminal) as watch:
        lab = Lab(plan.engine, plan.effort, plan.seed, watch)
        lab.run(lab.work("burst:in=16,out=8,n=4"), orca(4), ", to warm up")
        for name in plan.parts:
            title, measure = MEASURES[name]
            watch.part(title)
            began = time.perf_counter()
            found = msgspec.structs.replace(found, **{name: measure(lab)})
            seconds[name] = time.perf_counter() - began
            _write(_report(plan, machine, date, found, seconds), out, draw)
    return _report(plan, machine, date, found, seconds)


def _report(plan: Plan, machine: Machine, date: str, found: Found, seconds: dict[str, float]) -> Report:
    engine = plan.engine
    return Report(
        date=date,
        machine=machine,
        threads=engine.threads,
        versions=plan.versions,
        model=ModelSize(
            name=engine.model,
            architecture=engine.architecture,
            dtype=engine.dtype,
            profile=engine.profile,
            weight_bytes=engine.weight_bytes,
            kv_bytes_per_token=engine.bytes_per_token,
            kv_slots=engine.num_slots,
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
        ),
        effort=plan.effort.name,
        requests=plan.effort.requests,
        seed=plan.seed,
        found=found,
        seconds=dict(seconds),
    )


def _write(found: Report, out: Path, draw: Draw) -> None:
    report.write(found, out, draw(found, out))


class _Watch:
    """A bar of parts, and one of the requests of the run that is under way. Owner of both."""

    def __init__(self, bar: Progress, parts: Sequence[str]) -> None:
        self._bar = bar
        self._parts = bar.add_task("", total=len(parts))
        self._run = bar.add_task("", total=None)
        self._begun = 0

    def part(self, title: str) -> None:
        self._bar.update(self._parts, description=title, completed=self._begun)
        self._begun += 1

    @contextmanager
    def run(self, label: str, total: int) -> Iterator[Watch]:
        self._bar.reset(self._run, description=f"  {label}", total=total)
        yield self

    def ended(self) -> None:
        self._bar.advance(self._run)


@contextmanager
def _watching(parts: Sequence[str], terminal: Console) -> Iterator[_Watch]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, refresh_per_second=2, transient=True) as bar:
        yield _Watch(bar, parts)
