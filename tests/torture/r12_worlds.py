"""R12: scheduler, KV manager and loop over the ledger: random walks, all small worlds, and a core broken on purpose.

Every invariant is checked after every call, every answer compared with the sequential oracle's, and every world must
come to its end. At the full scale mutants of the core, drawn by the seed, run against its quick tests: who survives is
listed in the folder, for those who look for tests that lack.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from core.ledger_world import (
    ORDERS,
    Arrival,
    Life,
    World,
    pressed_life,
    random_life,
    small_arrivals,
    small_configs,
    small_life,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

import orcaserve.core
from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from torture import mutants
from torture.rows import Outcome, Row, Setup

ROWS = (
    Row("R12", "random and all small worlds of scheduler, KV manager and loop", "≥ 10 M steps, no invariant broken"),
)
PROCESSES = 2
MOST_FAILURES = 5
UNMUTATED = ("invariants", "config")  # the net itself, and what holds no decision
End = Literal["killed", "hangs", "survives"]
TESTS = Path(__file__).parent.parent / "core"
QUICK = (
    "test_token_bucket.py",
    "test_lengths.py",
    "test_budget.py",
    "test_scheduler.py",
    "test_algorithm_1.py",
    "test_pressure.py",
    "test_decisions.py",
    "test_overlap.py",
    "test_stacked.py",
    "test_timing.py",
    "test_router.py",
    "test_watched_loop.py",
    "test_backlog.py",
    "test_pace.py",
    "test_orders.py",
    "test_making_way.py",
    "test_fair.py",
    "test_slack.py",
    "test_mutants.py::test_the_original_is_not_caught",
)


@dataclass
class Tally:
    """What some worlds have shown. failures: what repeats each of them."""

    worlds: int = 0
    steps: int = 0
    preemptions: int = 0
    swaps: int = 0
    failures: list[str] = field(default_factory=list)

    def live(self, what: str, life: Callable[[], World]) -> None:
        try:
            world = life()
        except Exception as error:  # whatever it is, it is a failure of that world
            self.failures.append(f"{what}: {type(error).__name__}: {error}"[:300])
            return
        self.worlds += 1
        self.steps += world.steps
        self.preemptions += world.scheduler.num_preemptions
        self.swaps += world.loop.stats().num_swapped

    def add(self, other: Tally) -> None:
        self.worlds += other.worlds
        self.steps += other.steps
        self.preemptions += other.preemptions
        self.swaps += other.swaps
        self.failures += other.failures


def torture(setup: Setup) -> Iterator[Outcome]:
    num_processes = 1 if setup.scale == "short" else PROCESSES
    steps = setup.size("steps", 2_000, 10_000_000)
    base = setup.random("R12").randrange(1 << 40)
    began = time.perf_counter()
    walked = _shared(num_processes, _walk, base, steps // num_processes)
    seconds = time.perf_counter() - began
    total = num_small_worlds()
    share = setup.size("small", 400, total)
    small = _shared(num_processes, _small, num_processes, max(1, total // share), base)
    broken = _machine(setup)
    failures = [*walked.failures, *small.failures, *broken]
    figure = (
        f"{walked.steps} steps of {walked.worlds} random worlds ({walked.preemptions} preemptions, {walked.swaps} "
        f"swaps) at {walked.steps / seconds:.0f} steps/s with {num_processes} processes; {small.worlds} of {total} "
        f"small worlds, {small.steps} steps; {len(failures)} failed"
    )
    if num_mutants := setup.size("mutants", 0, 200):
        figure += f"; {_killed(setup, num_mutants)}"
    yield Outcome(ROWS[0], figure, not failures and walked.steps >= steps, trace=tuple(failures[:MOST_FAILURES]))


def _shared(count: int, work: Callable[..., Tally], *arguments: object) -> Tally:
    """The sum of what `work` gives in so many processes, each told which of them it is."""
    if count == 1:
        return work(0, *arguments)
    total = Tally()
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        futures: list[Future[Tally]] = [pool.submit(work, index, *arguments) for index in range(count)]
        for future in futures:
            total.add(future.result())
    return total


def _walk(index: int, base: int, steps: int) -> Tally:
    """Random worlds until they have taken so many steps."""
    tally = Tally()
    for seed in itertools.count(base + (index << 41)):
        life = pressed_life if seed % 4 == 0 else random_life
        tally.live(f"{life.__name__}({seed})", lambda life=life, seed=seed: life(seed))
        if tally.steps >= steps or len(tally.failures) >= MOST_FAILURES:
            return tally
    raise AssertionError("there are seeds without end")


# -- all small worlds ----------------------------------------------------------------------------------------------


def _kinds() -> list[tuple[str, int, bool]]:
    """Every policy and order with every depth, and with overlap where that can be."""
    policies = (*sorted(POLICIES), *ORDERS)
    plain = [(policy, depth, False) for policy in policies for depth in (1, 2, 3)]
    return plain + [(policy, 2, True) for policy in policies if "static" not in policy]


def _small_worlds() -> Iterator[tuple[SchedulerConfig, tuple[Arrival, ...]]]:
    for kind in _kinds():
        yield from itertools.product(small_configs(*kind), _small_arrivals())


def _small_arrivals() -> list[tuple[Arrival, ...]]:
    return [arrivals for count in (1, 2, 3) for arrivals in small_arrivals(count)]


def num_small_worlds() -> int:
    return sum(1 for kind in _kinds() for _ in small_configs(*kind)) * len(_small_arrivals())


def _small(index: int, processes: int, every: int, base: int) -> Tally:
    """This process's part of every so manyth small world."""
    tally = Tally()
    start = (base % every) + index * every
    for config, arrivals in itertools.islice(_small_worlds(), start, None, every * processes):
        tally.live(
            f"small_life({config}, {arrivals})", lambda config=config, arrivals=arrivals: small_life(config, arrivals)
        )
        if len(tally.failures) >= MOST_FAILURES:
            break
    return tally


def _machine(setup: Setup) -> list[str]:
    """Hypothesis chooses what happens, and makes what fails small."""
    examples = setup.size("examples", 10, 2000)
    try:
        run_state_machine_as_test(
            Life,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                database=None,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            ),
        )
    except Exception as error:  # whatever it is, it is a failure
        notes = " ".join(getattr(error, "__notes__", ()))
        return [f"state machine: {type(error).__name__}: {error} {notes}"[:1000]]
    return []


# -- mutants -------------------------------------------------------------------------------------------------------


def _killed(setup: Setup, wanted: int) -> str:
    """Runs so many mutants, and leaves a list of those that survive."""
    files = mutants.sources(orcaserve.core, UNMUTATED)
    everyone = [(name, index) for name, path in files.items() for index in range(mutants.count(path))]
    chosen = setup.random("R12", "mutants").sample(everyone, min(wanted, len(everyone)))
    tests = [str(TESTS / test) for test in QUICK]
    began = time.perf_counter()
    original = run_tests(None, tests, None)
    assert original == "survives", "the quick tests of the core fail as it is"
    limit = 30 + 5 * (time.perf_counter() - began)
    ends: dict[End, list[str]] = {"killed": [], "hangs": [], "survives": []}
    with ThreadPoolExecutor(PROCESSES) as pool:
        ended = pool.map(lambda mutant: run_tests(mutant, tests, limit), chosen)
        for (name, index), end in zip(chosen, ended, strict=True):
            ends[end].append(mutants.words(files[name], index))
            (setup.folder / "r12-survivors.txt").write_text("".join(f"{said}\n" for said in sorted(ends["survives"])))
    return (
        f"{len(ends['killed'])} of {len(chosen)} mutants killed by a test, {len(ends['hangs'])} by the limit of "
        f"{limit:.0f} s; {len(ends['survives'])} survive, some of which change nothing that could be seen "
        f"({len(everyone)} there are)"
    )


def run_tests(mutant: tuple[str, int] | None, tests: Sequence[str], seconds: float | None) -> End:
    """What becomes of a mutant, the module's name and which one it is; None: of what there is."""
    name, index = mutant or ("", -1)
    command = [sys.executable, "-m", "torture.mutants", name, str(index), "--", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run([*command, *tests], capture_output=True, timeout=seconds, check=False, cwd=TESTS.parent)
    except subprocess.TimeoutExpired:
        return "hangs"
    return "survives" if done.returncode == 0 else "killed"
