"""`drive`: a workload through the real scheduler, loop and model in real time, and when each request got each token.

The same EngineLoop as in serving, without HTTP and processes around it. An open loop: requests come when they are due.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from orcaserve.bench.client import BenchError, Record
from orcaserve.bench.paper.ends import END, EndsAt
from orcaserve.bench.paper.engine import Engine, Setup
from orcaserve.bench.workloads import Item, Work
from orcaserve.core.batch import Batch
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.executor import Executor, Pending
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit


class Sample(msgspec.Struct, frozen=True):
    """One iteration: when it began and how long it took, in seconds.

    stored: tokens whose K and V are in the KV memory, those of this iteration included; held: tokens that the blocks
    that are taken could hold. waiting: requests that have no KV. rows: of the iteration.
    """

    at: float
    seconds: float
    stored: int
    held: int
    waiting: int
    rows: int


class Trial(msgspec.Struct, frozen=True):
    """One workload under one setup. slots: tokens of KV memory. Times are in seconds after it began.

    preemptions, swapped: requests that lost their KV, and those of them that had it moved away and brought back.
    """

    setup: str
    slots: int
    records: list[Record]
    samples: list[Sample]
    preemptions: int
    cached_tokens: int
    swapped: int = 0

    @property
    def busy(self) -> float:
        """Seconds inside the executor."""
        return sum(sample.seconds for sample in self.samples)


def drive(engine: Engine, work: Work, setup: Setup, on_end: Callable[[], None] = lambda: None) -> Trial:
    """Runs a workload to its end; requests are greedy and get exactly the tokens they are to get.

    Raises BenchError for a request that the model or the KV memory can never hold, or that failed.
    """
    engine.device.forget_all()
    run = Run(engine, work, setup, setup.config(engine), engine.device, on_end)
    while run.is_open:
        run.step()
    return run.trial()


class Run:
    """A workload on its way under one setup. Owner of its scheduler, its loop and its clock, which runs in `step`."""

    def __init__(
        self,
        engine: Engine,
        work: Work,
        setup: Setup,
        config: SchedulerConfig,
        device: Executor,
        on_end: Callable[[], None],
    ) -> None:
        self._work, self._setup, self._clock = work, setup, _Clock()
        self._scheduler = Scheduler(config)
        self._clients = _Clients(engine, work, setup, on_end, self._clock.now)
        self._sampled = _Sampled(device, self._scheduler, self._clock.now)
        executor: Executor = self._sampled
        if setup.max_tokens is not None:
            executor = EndsAt(self._sampled, {id: item.max_tokens for id, item in enumerate(work.items)})
        self._loop = EngineLoop(self._scheduler, executor, self._clients, self._clients, self._clock.now)
        self._total = sum(item.max_tokens for item in work.items)

    @property
    def is_open(self) -> bool:
        return self._clients.num_open > 0

    @property
    def progress(self) -> float:
        """The share of all tokens that have come."""
        return self._clients.num_tokens / self._total

    def step(self) -> None:
        with self._clock:
            self._loop.step()

    def trial(self) -> Trial:
        kv = self._scheduler.kv
        return Trial(
            setup=self._setup.name,
            slots=kv.num_slots,
            records=[
                Record(
                    due=item.at,
                    sent=item.at,
                    token_times=tuple(times),
                    max_tokens=item.max_tokens,
                    prompt_tokens=len(item.prompt_ids),
                    counted="ids",
                )
                for item, times in zip(self._work.items, self._clients.token_times, strict=True)
            ],
            samples=self._sampled.samples,
            preemptions=self._scheduler.num_preemptions,
            cached_tokens=self._clients.num_cached,
            swapped=0 if kv.swap is None else kv.swap.num_swapped,
        )


class _Clock:
    """Seconds that went by while it ran, in its `with` blocks."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def now(self) -> float:
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._before, self._since = self.now(), None


class _Sampled:
    """An executor whose iterations are timed while they are submitted: they run then, but for those that overlap.

    Owner of what was seen of each.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._clock = clock
        self.samples: list[Sample] = []

    def submit(self, batch: Batch) -> Pending:
        kv, waiting = self._scheduler.kv, len(self._scheduler.waiting)
        stored = sum(request.num_computed for request in self._scheduler.running)
        held = kv.pool.num_held * kv.block_size
        began = self._clock()
        pending = self._executor.submit(batch)
        self.samples.append(Sample(began, self._clock() - began, stored, held, waiting, len(batch.rows)))
        return pending


class _Clients:
    """Inbox and outbox: those who send requests when they are due and note what comes. Owner of what has come."""

    def __init__(
        self, engine: Engine, work: Work, setup: Setup, on_end: Callable[[], None], now: Callable[[], float]
    ) -> None:
        self._coming = deque(
            (item.at, Submit(_request(id, item, setup, engine.max_model_len))) for id, item in enumerate(work.items)
        )
        self._on_end = on_end
        self.token_times: list[list[float]] = [[] for _ in work.items]
        self.num_cached = 0  # prompt tokens that the prefix cache spared when requests were first let in
        self.num_open = len(work.items)
        self.num_tokens = 0  # that have come
        self._now = now

    def take(self, block: bool) -> list[Command]:
        if block and self._coming:
            time.sleep(max(0.0, self._coming[0][0] - self._now()))
        commands: list[Command] = []
        now = self._now()
        while self._coming and self._coming[0][0] <= now:
            commands.append(self._coming.popleft()[1])
        return commands

    def put(self, step: Step) -> None:
        now = self._now()
        for output in step.outputs:
            if output.error is not None:
                raise BenchError(f"request {output.id} of the workload: {output.error}")
            self.token_times[output.id] += [now] * len(output.token_ids)
            self.num_tokens += len(output.token_ids)
            self.num_cached += output.num_cached
            if output.finish_reason is not None:
                self.num_open -= 1
                self._on_end()


def _request(id: int, item: Item, setup: Setup, max_model_len: int) -> NewRequest:
    declared = max(item.max_tokens, setup.max_tokens or 0)
    if (longest := len(item.prompt_ids) + declared) > max_model_len:
        raise BenchError(f"the workload has requests of {longest} tokens, but the model takes {max_model_len}")
    return NewRequest(
        id=id,
        token_ids=item.prompt_ids,
        num_prompt=len(item.prompt_ids),
        max_tokens=declared,
        params=SamplingParams(temperature=0),
        end_token_ids=() if setup.max_tokens is None else (END,),
    )
