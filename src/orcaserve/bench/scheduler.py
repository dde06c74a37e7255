"""What the scheduler itself costs: microseconds of schedule() and update(), without a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orcaserve.bench.measures import quantile
from orcaserve.core.batch import Batch, RowResult, StepResult
from orcaserve.core.orders import ORDERS
from orcaserve.core.policy import POLICIES, parse_policy
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig

PHASES = ("decode", "mixed")
BLOCK = 16
TENANTS = 100
MAX_ITL = 0.05
_TURN = 0.02  # seconds between iterations, of the scheduler's time
_PARAMS = SamplingParams()


class Case(msgspec.Struct, frozen=True):
    """phase: "decode", where all rows decode and none ends; "mixed", where prompts are read and requests end, too.

    max_itl: whether there is a limit of time, of MAX_ITL seconds.
    """

    policy: str
    rows: int
    waiting: int
    phase: str
    max_itl: bool = False


class Found(msgspec.Struct, frozen=True):
    """Microseconds, one for each iteration."""

    case: Case
    schedule: tuple[float, ...]
    update: tuple[float, ...]

    @property
    def both(self) -> list[float]:
        return [a + b for a, b in zip(self.schedule, self.update, strict=True)]


def policies() -> list[str]:
    """All policies, and the default with every other order."""
    return [*POLICIES, *(name for name in ORDERS if name not in POLICIES and name != "fcfs")]


def cases(names: Sequence[str], rows: Sequence[int], waiting: Sequence[int]) -> Iterator[Case]:
    for name in names:
        parsed = parse_policy(name)
        for limited in (False, True) if parsed.chunked and parsed.order == "fcfs" else (False,):
            for phase in PHASES:
                for row in rows:
                    for queue in waiting:
                        yield Case(name, row, queue, phase, limited)


def measure(case: Case, iterations: int, warm_up: int = 60) -> Found:
    """Runs the real scheduler on iterations that take no time, at full batches and with the queue always as long."""
    crowd = _Crowd(case)
    schedule, update = [], []
    clock = time.perf_counter
    for turn in range(crowd.settle + warm_up + iterations):
        crowd.fill()
        now = turn * _TURN
        began = clock()
        batch = crowd.scheduler.schedule(now)
        middle = clock()
        if batch is None:
            raise ValueError(f"{case} makes no batch")
        result = answers(batch)
        after = clock()
        crowd.scheduler.update(batch, result, now + _TURN)
        end = clock()
        schedule.append((middle - began) * 1e6)
        update.append((end - after) * 1e6)
    return Found(case, tuple(schedule[-iterations:]), tuple(update[-iterations:]))


def answers(batch: Batch) -> StepResult:
    """A token for every row that samples."""
    return StepResult(tuple([RowResult(id=row.id, token_id=7 if row.samples else None) for row in batch.rows]))


class _Crowd:
    """A scheduler and the requests that it is given. Owner of their numbers."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._count = 0
        self._longest = 4096 if case.phase == "decode" else 64
        total = 128 + self._longest
        self.settle = 2 * case.rows * 128 // max(512, case.rows) + 2  # iterations until all rows decode
        self.scheduler = Scheduler(
            SchedulerConfig(
                policy=parse_policy(case.policy),
                max_batch_size=case.rows,
                max_batch_tokens=max(512, case.rows),
                num_blocks=case.rows * -(-total // BLOCK) + 1024,
                block_size=BLOCK,
                max_itl=MAX_ITL if case.max_itl else None,
            )
        )

    def fill(self) -> None:
        """Requests come until all rows are taken and the queue is as long as it is to be."""
        scheduler, case = self.scheduler, self._case
        while len(scheduler.requests) < case.rows + case.waiting:
            self._count += 1
            # Lengths are spread over the numbers, so that in every iteration some end and some begin.
            prompt = 128 if case.phase == "decode" else 32 + self._count * 37 % 97
            output = self._longest if case.phase == "decode" else 1 + self._count * 29 % self._longest
            scheduler.add(
                NewRequest(
                    id=self._count,
                    token_ids=(self._count,) * prompt,
                    num_prompt=prompt,
                    max_tokens=output,
                    params=_PARAMS,
                    tenant=f"tenant {self._count % TENANTS}",
                    priority=self._count % 3,
                    deadline=60.0,
                )
            )


def show(found: Sequence[Found], console: Console) -> None:
    """A row for each case."""
    table = Table(box=SIMPLE_HEAD, title="µs an iteration, median and p99")
    for name in ("policy", "phase", "rows", "waiting"):
        table.add_column(name, justify="left" if name in ("policy", "phase") else "right")
    for name in ("schedule", "", "update", "", "both", ""):
        table.add_column(name, justify="right")
    for one in found:
        case = one.case
        name = f"{case.policy}, max-itl" if case.max_itl else case.policy
        cells = [
            f"{quantile(values, share) or 0:.0f}"
            for values in (one.schedule, one.update, one.both)
            for share in (0.5, 0.99)
        ]
        table.add_row(name, case.phase, str(case.rows), str(case.waiting), *cells)
    console.print(table)


def run(among: Sequence[Case], iterations: int, on_case: Callable[[], None] = lambda: None) -> list[Found]:
    """Every case in turn."""
    found = []
    for case in among:
        found.append(measure(case, iterations))
        on_case()
    return found
