"""A ledger world with a step log, whose time passes only while an iteration is waited for."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec
from core.ledger_world import World, random_config, random_request

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.policy import Policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.core.timing import Timing
from orcaserve.engine.executor import Pending
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Step
from orcaserve.engine.step_log import Header, StepLog


class Logged(World):
    """seconds: of the next iteration. `data` is the log, `timings` what each answered request was told at its end."""

    def __init__(self, config: SchedulerConfig, seconds: Callable[[], float], eager: bool = True) -> None:
        super().__init__(config, eager)
        self.seconds = seconds
        self.now = 0.0
        self.data = bytearray()
        self.timings: dict[int, Timing | None] = {}
        log = StepLog(Header(config=config), self.data.extend, b"key")
        self.loop = EngineLoop(self.scheduler, _Slow(self), self, self, lambda: self.now, log)

    def put(self, step: Step) -> None:
        for output in step.outputs:
            if output.id in self.requests and output.finish_reason is not None:
                self.timings[output.id] = output.timing
        super().put(step)


class _Slow:
    def __init__(self, world: Logged) -> None:
        self.world = world

    def submit(self, batch: Batch) -> _SlowPending:
        return _SlowPending(self.world, self.world.executor.submit(batch))


class _SlowPending:
    def __init__(self, world: Logged, pending: Pending) -> None:
        self.world = world
        self.pending = pending

    def result(self) -> StepResult:
        self.world.now = round(self.world.now + self.world.seconds(), 6)
        return self.pending.result()


def plain(config: SchedulerConfig) -> SchedulerConfig:
    """Without a swap space and a risk: what is counted here knows of neither."""
    policy = msgspec.structs.replace(config.policy, risk=None)
    return msgspec.structs.replace(config, policy=policy, swap=None)


def logged_life(seed: int, policy: str | Policy | None = None) -> Logged:
    """A random life with everything in it: prefixes shared, preemption, stops, aborts, crashes come back from."""
    rng = random.Random(seed)
    world = Logged(plain(random_config(rng, policy)), lambda: rng.choice([0.01, 0.5]), eager=rng.random() < 0.5)
    for _ in range(rng.randint(1, 20)):
        for _ in range(rng.choice([0, 1, 1, 2, 5])):
            world.submit(**random_request(rng, world))
        if world.requests and rng.random() < 0.2:
            world.abort(rng.choice(sorted(world.requests)))
        world.step(rng.randint(0, 12))
        if not world.scheduler.requests:  # a loop that has work does not pause
            world.now = round(world.now + rng.choice([0.0, 0.1]), 6)
    world.drain()
    return world
