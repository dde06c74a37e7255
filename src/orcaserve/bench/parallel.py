"""What several ranks bring and cost on this machine: throughput, how busy each is, and the control plane's share.

Orca's section 4.1 and Fig. 8: stages without bubbles, since each always has a batch of its own, against microbatches of
one batch; and batches that travel beside the activations against such that travel with them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.drive import drive
from orcaserve.bench.paper.engine import Engine, Setup
from orcaserve.bench.simulation import arrivals_of
from orcaserve.bench.workloads import Work
from orcaserve.bench.workloads.spec import make
from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.policy import DEFAULT, STATIC
from orcaserve.engine.executor import Pending
from orcaserve.sim.cost import CostModel, Size, size
from orcaserve.sim.fit import Sample, fit_stages
from orcaserve.sim.run import simulate
from orcaserve.sim.stages import share_layers, split_layers

SETTLE = 0.5  # seconds until every rank has said how busy it was
MOST_LEARNED = 200  # requests of a run: ranks tell of its batches at its end, and keep the last few thousand
WARMING = 2  # batches after which a rank is warm
DRAWS = 5  # of residuals, in what is foretold
MICROBATCHED = msgspec.structs.replace(STATIC, name="microbatched", deal=True)
_POLICIES = {policy.name: policy for policy in (DEFAULT, STATIC, MICROBATCHED)}

Layout = tuple[int, int, int, str]  # tensor, pipeline, threads of all, control plane
ONE: Layout = (1, 1, 1, "separate")
STAGES: Layout = (1, 2, 2, "separate")
SHARED: Layout = (2, 1, 2, "separate")
MIXED: Layout = (1, 2, 2, "mixed")

# An engine; the busy seconds of its ranks so far; those of each rank at each batch since they were asked for.
Running = tuple[Engine, Callable[[], tuple[float, ...]], Callable[[], list[list[float]]]]
Ranks = Callable[[int, int, int, str], AbstractContextManager[Running]]
Layouts = Mapping[Layout, Running]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the trace. rate: (prompt + generated) tokens/s; busy: share of the time of each rank.

    predicted: the rate that the simulator foretells from what one rank's iterations took, and what an exchange takes.
    learned: the same from what iterations of another work took on these ranks.
    """

    name: str
    ranks: str
    stages: int
    policy: str
    threads: int
    rate: float
    seconds: float
    iterations: int
    busy: tuple[float, ...]
    predicted: float = 0.0
    learned: float = 0.0


class Iteration(msgspec.Struct, frozen=True, kw_only=True):
    """Decodes of so many requests: microseconds of an iteration, the median of its rounds, by who runs it."""

    requests: int
    inside: float
    worker: float
    separate: float
    mixed: float


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of joining two ranks' parts of so many rows, in the tree's order and by a plain all-reduce."""

    rows: int
    fixed: float
    plain: float


class Found(msgspec.Struct, frozen=True):
    """iterations: in this process; in one worker process; in two stages, the planes separate and mixed."""

    work: str
    runs: list[Run]
    iterations: list[Iteration]
    joins: list[Joined]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """inside: an engine in this process, of one thread. batch: most requests of a batch. seed: of the work.

    layers: of each stage, where there are so many. joins: measures what exchanges cost, by ascending rows.
    """

    inside: Engine
    ranks: Ranks
    layers: Callable[[int], Sequence[int]]
    joins: Callable[[], list[Joined]]
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
    say("what an exchange between two ranks costs")
    joins = plan.joins()
    with ExitStack() as stack:
        layouts = {
            layout: stack.enter_context(plan.ranks(*layout))
            for layout in (ONE, STAGES, SHARED, MIXED)  # all there at once: who has no batch waits for one
        }
        learners = {at: _Learner(at, layouts[at]) for at in (ONE, STAGES, SHARED)}
        say("warming up")  # memory that nobody has touched yet is slow
        for learner in learners.values():
            learner.keep_busy(plan)
        runs = _trace(plan, layouts, learners, work, say)
        costs = {layout: learner.cost for layout, learner in learners.items()}
        runs = [_foretold(plan, work, costs, joins, one) for one in runs]
        return Found(text, runs, _iterations(plan, layouts, say), joins)


class _Learner:
    """What iterations cost the stages of an engine while all of them are at work; the device of its own runs."""

    def __init__(self, layout: Layout, running: Running) -> None:
        self._tensor, self._depth, *_ = layout
        engine, _, self._take_seconds = running
        self._engine = msgspec.structs.replace(engine, device=self)
        self._device = engine.device
        self._samples: list[list[Sample]] = [[] for _ in range(self._depth)]
        self._turns: list[float] = []
        self._hops: list[float] = []
        # Of the latest run: what batches held, their seconds, those of the host before each, and when one ended.
        self._sizes: list[Size] = []
        self._trips: list[float] = []
        self._between: list[float] = []
        self._ended: float | None = None

    @property
    def cost(self) -> CostModel:
        """Its turn is the host's, and the way of a batch to the ranks, through them and back."""
        turn = statistics.median(self._turns) + statistics.median(self._hops)
        return msgspec.structs.replace(fit_stages(self._samples), turn=turn)

    def keep_busy(self, plan: Plan, number: int = 0) -> None:
        """With prompts and decodes, not those that are foretold."""
        longest, count = plan.inside.max_model_len, min(plan.requests, MOST_LEARNED)
        text = f"burst:in=16-{min(600, longest * 4 // 5)},out=1-{min(60, longest // 5)},n={count}"
        self._run(plan, text, self._depth, plan.seed + number)

    def learn(self, plan: Plan, number: int) -> None:
        """From other works than the one that is foretold: what stages take from one that keeps them at work.

        What the ways take comes from single batches, whose stages wait for nothing else.
        """
        self.keep_busy(plan, number)
        self._turns += self._between
        stages = self._took()
        for known, own in zip(self._samples, stages, strict=True):
            known += [(size, took) for size, took in zip(self._sizes, own, strict=True) if took > 0][WARMING:]
        self._run(plan, "burst:in=16,out=12,n=4", 1, plan.seed)
        alone = zip(self._trips, *self._took(), strict=True)
        self._hops += [trip - sum(took) for trip, *took in alone][WARMING:]

    def _run(self, plan: Plan, text: str, depth: int, seed: int) -> None:
        self._device.forget_all()
        time.sleep(SETTLE)
        self._take_seconds()
        self._sizes, self._trips, self._between, self._ended = [], [], [], None
        setup = Setup(name="learn", policy=DEFAULT, max_batch_size=plan.batch, depth=depth)
        drive(self._engine, make(text, vocab=self._engine.vocab_size, seed=seed), setup)

    def _took(self) -> list[list[float]]:
        """Of each stage, at each batch of the latest run."""
        time.sleep(SETTLE)
        ranks = self._take_seconds()
        return [own[-len(self._sizes) :] for own in ranks[:: self._tensor]]

    def submit(self, batch: Batch) -> Pending:
        now = time.perf_counter()
        if self._ended is not None:
            self._between.append(now - self._ended)
            self._ended = None
        self._sizes.append(size(batch))
        return _Trip(self, now, self._device.submit(batch))

    def ended(self, began: float) -> None:
        self._ended = time.perf_counter()
        self._trips.append(self._ended - began)

    def forget_all(self) -> None:
        self._device.forget_all()


class _Trip:
    """A batch under way."""

    def __init__(self, learner: _Learner, began: float, pending: Pending) -> None:
        self._learner, self._began, self._pending = learner, began, pending

    def result(self) -> StepResult:
        result = self._pending.result()
        self._learner.ended(self._began)
        return result


def _foretold(plan: Plan, work: Work, costs: Mapping[Layout, CostModel], joins: Sequence[Joined], one: Run) -> Run:
    """With the simulator's rates. One rank's costs are cut at the layers at which the engine cuts them."""
    tensor = len(one.busy) // one.stages
    layers = plan.layers(one.stages)
    setup = Setup(name="", policy=_POLICIES[one.policy], max_batch_size=plan.batch, depth=len(layers))
    tokens = sum(len(item.prompt_ids) + item.max_tokens for item in work.items)

    def rate(model: CostModel) -> float:
        """In the mean of some draws of what iterations vary by."""
        ends = []
        for draw in range(DRAWS):
            records, _ = simulate(arrivals_of(work), setup.config(plan.inside), model.noisy(draw), model.host)
            ends.append(max(record.token_times[-1] for record in records))
        return tokens / statistics.mean(ends)

    alone = costs[ONE]
    [whole] = alone.stages
    if tensor > 1:
        few, many = joins[0], joins[-1]
        per_row = max(0.0, (many.fixed - few.fixed) / (many.rows - few.rows))
        whole = share_layers(whole, sum(layers), tensor, few.fixed, per_row)
    cut = msgspec.structs.replace(alone, stages=split_layers(whole, layers))
    learned = costs[tensor, one.stages, one.threads, "separate"]
    return msgspec.structs.replace(one, predicted=rate(cut), learned=rate(learned))


def _trace(
    plan: Plan, layouts: Layouts, learners: Mapping[Layout, _Learner], work: Work, say: Callable[[str], None]
) -> list[Run]:
    """One stage of one thread, then two: continuous, and static with a batch's rows dealt out as microbatches.

    Before each round what iterations cost is learned, at the pace that the machine has then.
    """
    ways = [
        ("one stage", ONE, DEFAULT),
        ("two stages", STAGES, DEFAULT),
        ("two ranks share the layers", SHARED, DEFAULT),
        ("two stages, static microbatches", STAGES, MICROBATCHED),
        ("one stage, static", ONE, STATIC),
    ]
    found: dict[str, list[Run]] = {name: [] for name, *_ in ways}
    for number in range(plan.rounds):
        say(f"round {number + 1} of {plan.rounds}: what iterations cost")
        for learner in learners.values():
            learner.learn(plan, number + 1)
        for name, layout, policy in ways:
            say(f"round {number + 1} of {plan.rounds}: {name}")
            tensor, pipeline, threads, _ = layout
            engine, busy, _ = layouts[layout]
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
                    stages=pipeline,
                    policy=policy.name,
                    threads=threads,
                    rate=measures.total_rate(trial.records) or 0.0,
                    seconds=seconds,
                    iterations=len(trial.samples),
                    busy=shares,
                )
            )
    return [sorted(runs, key=lambda one: one.rate)[len(runs) // 2] for runs in found.values()]


def _iterations(plan: Plan, layouts: Layouts, say: Callable[[str], None]) -> list[Iteration]:
    """How long iterations take, in turns, so that the machine's moods meet all alike; of sizes near the trace's."""
    found = []
    most = min(plan.inside.num_slots // 24, 4 * plan.requests)
    sizes = [count for count in (1, 16, 256) if count <= most]
    engines = {"worker": layouts[ONE][0], "separate": layouts[STAGES][0], "mixed": layouts[MIXED][0]}
    for count in sizes:
        say(f"iterations of {count} requests")
        took: dict[str, list[float]] = {}
        for _ in range(max(3, plan.rounds)):
            for name, engine in {"inside": plan.inside, **engines}.items():
                took.setdefault(name, []).append(_decode(engine, count))
        medians = {name: 1e6 * statistics.median(each) for name, each in took.items()}
        found.append(Iteration(requests=count, **medians))
    return found


def _decode(engine: Engine, size: int) -> float:
    """Seconds of an iteration in which so many requests decode, one batch at a time."""
    work = make(f"burst:in=4,out=20,n={size}", vocab=engine.vocab_size, seed=1)
    setup = Setup(name="decode", policy=DEFAULT, max_batch_size=size, batch_tokens=4 * size)
    records = drive(engine, work, setup).records
    ends = sorted({time for record in records for time in record.token_times})
    return statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def show(found: Found, console: Any) -> None:
    """Three tables on a rich console."""
    from rich.table import Table

    console.print(
        f"All at once: {found.work}; medians of rounds. Foretold from one rank's iterations, and by its ranks'."
    )
    base = found.runs[0].rate
    head = ("", "ranks", "threads", "tokens/s", "foretold", "by its ranks", "by one stage", "iterations", "busy")
    table = Table(*head, box=None)
    for one in found.runs:
        table.add_row(
            one.name,
            one.ranks,
            str(one.threads),
            f"{one.rate:.0f}",
            f"{one.predicted:.0f}",
            f"{one.learned:.0f}",
            f"{one.rate / base:.2f}",
            str(one.iterations),
            " ".join(f"{share:.0%}" for share in one.busy),
        )
    console.print(table)
    columns = ("requests", "in this process", "one worker", "two stages", "two stages, mixed planes")
    table = Table(*columns, title="Microseconds of an iteration, one batch at a time", box=None)
    for at in found.iterations:
        table.add_row(str(at.requests), *(f"{x:.0f}" for x in (at.inside, at.worker, at.separate, at.mixed)))
    console.print(table)
    table = Table("rows", "in the tree's order", "all-reduce", "ratio", box=None)
    table.title = "Microseconds of joining two ranks' parts"
    for join in found.joins:
        fixed, plain = 1e6 * join.fixed, 1e6 * join.plain
        table.add_row(str(join.rows), f"{fixed:.0f}", f"{plain:.0f}", f"{fixed / plain:.2f}")
    console.print(table)


def save(found: Found, path: Any) -> None:
    """As JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found)))
