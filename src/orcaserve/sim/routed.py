"""`simulate_routed`: arrivals through a router to several equal engines, each on a virtual clock of its own."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import msgspec

from orcaserve.core.batch import Batch
from orcaserve.core.router import Router
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.sim.cost import Seconds
from orcaserve.sim.executor import SimExecutor, VirtualClock
from orcaserve.sim.run import Arrival, Record, World


class Routed(msgspec.Struct, frozen=True):
    """What came of a workload.

    records: in the order of the arrivals. replicas: who got each. loads: what each replica had to do at every arrival.
    prefix_hits, prefix_queries: of every replica's prefix cache, in tokens.
    """

    records: tuple[Record, ...]
    replicas: tuple[int, ...]
    loads: tuple[tuple[int, ...], ...]
    prefix_hits: tuple[int, ...]
    prefix_queries: tuple[int, ...]


class _Engine:
    """A simulated replica: owner of its clock, its loop, and of what it has to do."""

    def __init__(self, config: SchedulerConfig, cost: Callable[[Batch], Seconds]) -> None:
        self._clock = VirtualClock()
        self.world = World((), self._clock)
        self.scheduler = Scheduler(config)
        copy_seconds = config.swap.copy_seconds if config.swap else 0.0
        executor = SimExecutor(cost, self._clock, None, self.world.sample, copy_seconds)
        self._loop = EngineLoop(self.scheduler, executor, self.world, self.world, self._clock)
        self._ends: list[tuple[float, int]] = []  # when a request ended, and its load: some lie ahead of others' time
        self._open: dict[int, int] = {}
        self.load = 0

    def offer(self, arrival: Arrival, load: int) -> int:
        id = self.world.offer(arrival)
        self._open[id] = load
        self.load += load
        return id

    def run_until(self, time: float) -> None:
        """Iterates until its clock has come so far or it has nothing to do; `load` is that of this time."""
        while self.world.is_open and self._clock.now < time:
            self._loop.step()
            for id in [id for id in self._open if not self.world.is_unfinished(id)]:
                heapq.heappush(self._ends, (self._clock.now, self._open.pop(id)))
        while self._ends and self._ends[0][0] <= time:
            self.load -= heapq.heappop(self._ends)[1]


def simulate_routed(
    arrivals: Sequence[Arrival],
    config: SchedulerConfig,
    costs: Sequence[Callable[[Batch], Seconds]],
    router: Router,
    load: Callable[[Arrival], int] = lambda arrival: 1,
) -> Routed:
    """Runs a workload to its end, on as many engines as there are `costs` (seconds of a batch in every stage).

    arrivals: in the order of their times. load: what a request adds to its replica's, from its arrival to its end.
    """
    engines = [_Engine(config, cost) for cost in costs]
    for number in range(len(engines)):
        router.begin(number, config.num_blocks)
    places: list[tuple[int, int]] = []
    loads: list[tuple[int, ...]] = []
    for index, arrival in enumerate(arrivals):
        for engine in engines:
            engine.run_until(arrival.time)
        loads.append(tuple(engine.load for engine in engines))
        keys = router.keys(arrival.prompt_ids or (-1 - index,) * arrival.num_prompt, "")
        chosen = router.choose(keys, dict(enumerate(loads[-1])))
        router.sent(keys, chosen)
        places.append((chosen, engines[chosen].offer(arrival, load(arrival))))
    for engine in engines:
        engine.run_until(float("inf"))
    found = [engine.world.records() for engine in engines]
    return Routed(
        tuple(found[replica][place] for replica, place in places),
        tuple(replica for replica, _ in places),
        tuple(loads),
        tuple(engine.scheduler.kv.num_hits for engine in engines),
        tuple(engine.scheduler.kv.num_queries for engine in engines),
    )
