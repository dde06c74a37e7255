"""A small world for the real scheduler, KV manager and loop: a ledger instead of a model, an oracle beside it."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from orcaserve.core.config import SwapSpace
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import DEFAULT, Policy, parse_policy
from orcaserve.core.request import NewRequest, Output, SamplingParams, TokenLogprobs
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.ledger import LedgerExecutor, ledger_answer, ledger_entries, ledger_logprobs, ledger_vector
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Abort, Command, Step, Submit

VOCAB = 40
ORDERS = (
    "priority,ageing=5",
    "priority,ageing=inf",
    "priority,ageing=2,preempt=false",
    "fair",
    "fair,weights=a:2+b:0.5,input=1,output=1,credit=0",
    "fair,credit=9",
    "deadline,default=4",
    "deadline,default=4,preempt=true",
    "shortest",
    "shortest,preempt=true,guard=3",
    "mlfq,quantum=8,levels=3,ageing=5,output=2",
    "mlfq,quantum=2,levels=9,ageing=0.5,output=1,preempt=false",
    "orca,order=fair,credit=0",
    "orca,order=deadline",
    "orca,order=priority,preempt=false",
    "static,order=fair,weights=a:3",
    "static,order=shortest",
    "stacked,order=mlfq,preempt=false",
)


class World:
    """Drives an EngineLoop by hand and compares every finished request with the oracle. `steps` counts its turns.

    pace: seconds that pass whenever the clock is read.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        eager: bool = True,
        scheduler: type[Scheduler] = CheckedScheduler,
        pace: float = 0.0,
    ) -> None:
        self.now = 0.0
        self.pace = pace
        self.scheduler = scheduler(config)
        slots = config.swap.num_slots if config.swap else 0
        self.executor = LedgerExecutor(config.num_blocks, config.block_size, VOCAB, eager, slots)
        self.loop = EngineLoop(self.scheduler, self.executor, self, self, self.clock)
        self.commands: list[Command] = []
        self.requests: dict[int, NewRequest] = {}  # unfinished ones
        self.outputs: dict[int, list[Output]] = defaultdict(list)
        self.steps = 0
        self.last: Step | None = None
        self._ids = 0

    def clock(self) -> float:
        self.now += self.pace
        return self.now

    # Inbox and Outbox
    def take(self, block: bool) -> list[Command]:
        assert self.commands or not block, "nothing to wait for"
        commands, self.commands = self.commands, []
        return commands

    def put(self, step: Step) -> None:
        self.last = step
        for output in step.outputs:
            if output.id in self.requests:
                self.outputs[output.id].append(output)
                if output.finish_reason is not None:
                    self._compare(self.requests.pop(output.id))

    def submit(self, token_ids: tuple[int, ...], max_tokens: int, num_prompt: int | None = None, **fields) -> int:
        self._ids += 1
        num_prompt = len(token_ids) if num_prompt is None else num_prompt
        params = fields.pop("params", SamplingParams(logprobs=0))
        new = NewRequest(
            id=self._ids, token_ids=token_ids, num_prompt=num_prompt, max_tokens=max_tokens, params=params, **fields
        )
        self.requests[new.id] = new
        self.commands.append(Submit(new))
        return new.id

    def abort(self, id: int) -> None:
        self.requests.pop(id, None)
        self.outputs.pop(id, None)
        self.commands.append(Abort(id))

    def step(self, turns: int = 1) -> None:
        for _ in range(turns):
            if not self.scheduler.requests and not self.commands:
                return
            self.steps += 1
            assert self.loop.step()

    def drain(self) -> None:
        """Runs to the end; every request must get there in a bounded number of turns, and nothing may be left."""
        work = sum(len(new.token_ids) + new.max_tokens + 1 for new in self.requests.values())
        bound = self.steps + (work + 10) * (2 + len(self.requests)) * 4 * self.scheduler.config.depth
        while self.scheduler.requests or self.commands:
            self.step()
            assert self.steps <= bound, f"no end after {bound} turns"
        assert not self.requests, f"never answered: {sorted(self.requests)}"
        assert self.scheduler.kv.pool.num_held == 0, "KV blocks leak"
        if self.scheduler.kv.swap is not None:
            assert self.scheduler.kv.swap.slots.num_held == 0, "slots of the swap space leak"
        assert set(self.executor.known) == set(self.scheduler.sealer.freed), "workers know who is gone"

    def _compare(self, new: NewRequest) -> None:
        outputs = self.outputs.pop(new.id)
        got = [token for output in outputs for token in output.token_ids]
        already = len(new.token_ids) - new.num_prompt
        expected, reason = ledger_answer(new, VOCAB)
        assert got == expected[already:], f"request {new.id}: {got} instead of {expected[already:]}"
        assert outputs[-1].finish_reason == reason
        assert all(output.finish_reason is None for output in outputs[:-1])
        tokens = [*new.token_ids[: new.num_prompt], *expected]
        entries = ledger_entries(tokens)
        if new.params.logprobs is not None:
            start = len(new.token_ids)
            logprobs = [entry for output in outputs for entry in output.logprobs]
            assert logprobs == [ledger_logprobs(entries[:p], tokens[p]) for p in range(start, len(tokens))]
        prompt_logprobs = [entry for output in outputs for entry in output.prompt_logprobs]
        wanted: list[TokenLogprobs] = []
        if new.params.prompt_logprobs is not None:
            wanted = [ledger_logprobs(entries[:p], tokens[p]) for p in range(1, new.num_prompt)]
        assert prompt_logprobs == wanted
        pooled = [output.pooled for output in outputs if output.pooled]
        pooling = new.params.pooling
        assert pooled == ([] if pooling is None else [ledger_vector(entries[: new.num_prompt], pooling)])


def random_config(rng: random.Random, policy: str | Policy | None = None, **fixed: float) -> SchedulerConfig:
    """Small enough that memory is short and budgets cut. overlap: how probable it is, where it can be."""
    max_batch_size = fixed.get("max_batch_size", rng.randint(1, 6))
    policy = policy or rng.choice(["default"] * 5 + ["orca", "static", "stacked"] + [rng.choice(ORDERS)] * 5)
    policy, swap = random_pressure(rng, parse_policy(policy) if isinstance(policy, str) else policy)
    may_overlap = not policy.request_level and fixed.get("depth", 2) == 2
    overlap = rng.random() < fixed.get("overlap", 0.4) and may_overlap
    return SchedulerConfig(
        policy=policy,
        swap=swap,
        max_batch_size=max_batch_size,
        max_batch_tokens=max_batch_size + rng.choice([0, 1, 3, 10, 100]),
        num_blocks=fixed.get("num_blocks", rng.choice([2, 3, 5, 8, 13, 20])),
        block_size=fixed.get("block_size", rng.choice([1, 2, 3, 4, 7, 16, 64])),
        depth=2 if overlap else fixed.get("depth", rng.randint(1, 4)),
        overlap=overlap,
    )


def random_pressure(rng: random.Random, policy: Policy) -> tuple[Policy, SwapSpace | None]:
    """What is done when memory is short: the policy with a risk or none, and a swap space or none."""
    if not policy.reserve:
        policy = msgspec.structs.replace(policy, risk=rng.choice([None, None, None, None, 0.1, 0.5, 0.9]))
    if rng.random() < 0.4:
        return policy, None
    return policy, SwapSpace(
        num_slots=rng.choice([1, 3, 10, 40]), copy_seconds=rng.choice([0.1, 1.0, 4.0]), token_seconds=1.0
    )


def random_request(rng: random.Random, world: World) -> dict | None:
    """A request that fits the world's KV; prompts share prefixes of three stems."""
    slots = world.scheduler.kv.num_slots
    total = rng.randint(1, min(slots, 60))
    num_tokens = rng.randint(1, total)
    stem = random.Random(rng.randint(0, 2)).choices(range(VOCAB), k=num_tokens)
    keep = rng.choice([num_tokens, rng.randint(0, num_tokens)])
    if rng.random() < 0.2:
        stem[0] = rng.randrange(VOCAB)  # equal blocks after different beginnings
    token_ids = tuple(stem[:keep] + [rng.randrange(VOCAB) for _ in range(num_tokens - keep)])
    num_prompt = num_tokens if rng.random() < 0.8 else rng.randint(1, num_tokens)  # some come back from a crash
    max_tokens = total - num_prompt
    if num_prompt < num_tokens and max_tokens <= num_tokens - num_prompt:
        num_prompt, max_tokens = num_tokens, total - num_tokens
    is_fresh = num_prompt == num_tokens
    pooling = rng.choice(["mean", "mean", "last"]) if is_fresh and rng.random() < 0.15 else None
    if pooling is not None:
        max_tokens = 0
    params = SamplingParams(
        logprobs=rng.choice([None, 0]),
        prompt_logprobs=0 if is_fresh and rng.random() < 0.2 else None,
        pooling=pooling,
    )
    end = tuple(rng.sample(range(VOCAB), rng.choice([0, 0, 1, 4])))
    end = tuple(token for token in end if token not in token_ids[num_prompt:])
    return {
        "token_ids": token_ids,
        "num_prompt": num_prompt,
        "max_tokens": max_tokens,
        "params": params,
        "end_token_ids": end,
        "seed": rng.randint(0, 3),
        "choice": rng.randint(0, 1),
        "cache_salt": rng.choice(["", "", "other"]),
        "tenant": rng.choice(["", "a", "a", "a", "b", "c"]),
        "priority": rng.choice([0, 0, 1, 3, -2]),
        "deadline": rng.choice([None, 0.5, 3.0, 20.0]),
    }


def random_life(
    seed: int, scheduler: type[Scheduler] = CheckedScheduler, policy: str | Policy | None = None, **fixed: float
) -> World:
    """One random world from start to drained. Raises if anything is wrong."""
    rng = random.Random(seed)
    config, eager, pace = random_config(rng, policy, **fixed), rng.random() < 0.5, rng.choice([0.0, 0.02, 0.5])
    world = World(config, eager, scheduler, pace)
    for _ in range(rng.randint(1, 25)):
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            world.submit(**random_request(rng, world))
        if world.requests and rng.random() < 0.15:
            world.abort(rng.choice(sorted(world.requests)))
        world.step(rng.randint(0, 12))
    world.drain()
    return world


def pressed_config(rng: random.Random) -> SchedulerConfig:
    """Little memory beside a small swap space."""
    overlap = rng.random() < 0.4
    space = SwapSpace(num_slots=rng.choice([2, 4, 9, 30]), copy_seconds=rng.choice([0.0, 0.5, 1.0]), token_seconds=1.0)
    return SchedulerConfig(
        policy=msgspec.structs.replace(DEFAULT, risk=rng.choice([None, None, 0.5])),
        max_batch_size=rng.randint(2, 6),
        max_batch_tokens=rng.choice([6, 9, 40]),
        num_blocks=rng.randint(6, 20),
        block_size=rng.choice([1, 2, 3, 4]),
        depth=2 if overlap else rng.choice([1, 1, 2, 3]),
        overlap=overlap,
        swap=space,
    )


def press(world: World, rng: random.Random) -> None:
    """Many short prompts that become long answers, some of which begin alike; from start to drained."""
    slots = world.scheduler.kv.num_slots
    for _ in range(rng.randint(2, 12)):
        for _ in range(rng.randint(0, 3)):
            stem = random.Random(rng.randint(0, 1)).choices(range(VOCAB), k=rng.randint(1, min(slots - 1, 9)))
            scores = SamplingParams(
                logprobs=rng.choice([None, None, 0]), prompt_logprobs=rng.choice([None, None, None, 0])
            )
            world.submit(tuple(stem), rng.randint(1, slots - len(stem)), params=scores, choice=rng.randint(0, 1))
        if world.requests and rng.random() < 0.2:
            world.abort(rng.choice(sorted(world.requests)))
        world.step(rng.randint(0, 12))
    world.drain()


def pressed_life(seed: int, scheduler: type[Scheduler] = CheckedScheduler) -> World:
    """A world where nearly everybody is preempted. Raises if anything is wrong."""
    rng = random.Random(seed)
    world = World(pressed_config(rng), eager=rng.random() < 0.5, scheduler=scheduler)
    press(world, rng)
    return world


Arrival = tuple[int, int, int]  # tokens of a prompt, of its output, and turns until the next request comes


def small_configs(policy: str, depth: int, overlap: bool) -> Iterator[SchedulerConfig]:
    """Every small pool, with little room in a batch."""
    for num_blocks, block_size, max_batch_size in itertools.product([4, 5], [1, 2], [1, 2]):
        yield SchedulerConfig(
            policy=parse_policy(policy),
            max_batch_size=max_batch_size,
            max_batch_tokens=2,
            num_blocks=num_blocks,
            block_size=block_size,
            depth=depth,
            overlap=overlap,
        )


def small_arrivals(count: int) -> Iterator[tuple[Arrival, ...]]:
    """So many requests of every small size, arriving at every small distance."""
    sizes = [(1, 1), (1, 3), (2, 2), (3, 0), (3, 1)]
    for shapes in itertools.product(sizes, repeat=count):
        for gaps in itertools.product([0, 1, 2], repeat=count - 1):
            yield tuple((*shape, gap) for shape, gap in zip(shapes, (*gaps, 0), strict=True))


def small_life(config: SchedulerConfig, arrivals: Sequence[Arrival]) -> World:
    """From start to drained. Requests differ in whose they are, and how urgent."""
    world = World(config)
    params = SamplingParams(logprobs=None if config.overlap else 0)
    for index, (prompt, output, gap) in enumerate(arrivals):
        urgency = {"tenant": "aba"[index % 3], "priority": -index, "deadline": 3.0 - index}
        world.submit(tuple(range(7, 7 + prompt)), output, params=params, **urgency)
        world.step(gap)
    world.drain()
    return world


class Life(RuleBasedStateMachine):
    """The same world, with hypothesis choosing and shrinking what happens."""

    @initialize(seed=st.integers(0, 2**32), eager=st.booleans())
    def begin(self, seed: int, eager: bool) -> None:
        self.rng = random.Random(seed)
        self.world = World(random_config(self.rng), eager=eager, pace=self.rng.choice([0.0, 0.1]))

    @rule(count=st.integers(1, 4))
    def submit(self, count: int) -> None:
        for _ in range(count):
            self.world.submit(**random_request(self.rng, self.world))

    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        ids = sorted(self.world.requests)
        if ids:
            self.world.abort(ids[which % len(ids)])

    @rule(turns=st.integers(1, 20))
    def step(self, turns: int) -> None:
        self.world.step(turns)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()
