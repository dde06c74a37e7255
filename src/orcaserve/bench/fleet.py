"""A fleet of equal engines behind a router, from a sample of them: what requests see, and how sure that is.

A router that deals requests out at random gives each engine an equal, independent share of the arrivals. So a few
engines stand for all: each gets every request of the trace as often as a Poisson number of mean copies / engines says
(thinning), and how far the sampled engines differ says how far off their figures may be. A router that looks at the
engines' queues does better: the figures are a bound for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import msgspec

from orcaserve.bench import measures, simulation
from orcaserve.bench.client import Record
from orcaserve.bench.workloads.traces import Row
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.cost import CostModel
from orcaserve.sim.run import Arrival

RESAMPLED = 400
_FIGURES = (("ttft", 0.5), ("ttft", 0.9), ("ttft", 0.99), ("tpot", 0.5), ("tpot", 0.99), ("normalised", 0.5))


class Fleet(msgspec.Struct, frozen=True):
    """engines: equal ones. requests: an hour that all of them get together. sampled: engines that are simulated."""

    engines: int
    requests: float
    sampled: int
    seed: int = 0


class Estimate(msgspec.Struct, frozen=True):
    """A figure in seconds, and the 95 % interval of the sampled engines (bootstrap over engines)."""

    name: str
    value: float
    low: float
    high: float


def thinned(rows: Sequence[Row], fleet: Fleet, engine: int) -> list[Arrival]:
    """What one engine of the fleet gets of a trace whose hour is scaled to the fleet's requests."""
    span = max(row.at for row in rows) or 1.0
    copies = fleet.requests * span / 3600 / len(rows) / fleet.engines
    rng = random.Random(f"{fleet.seed} {engine}")  # noqa: S311
    found = []
    for row in rows:
        # A Poisson number of copies: how many exponential gaps fit.
        place = rng.expovariate(1.0)
        while place < copies:
            # Copies come within a second of their row, so that they are no burst of equal requests.
            found.append(Arrival(row.at + rng.random(), row.input_length, max(1, row.output_length)))
            place += rng.expovariate(1.0)
    return sorted(found, key=lambda arrival: arrival.time)


def simulate(
    rows: Sequence[Row],
    fleet: Fleet,
    config: SchedulerConfig,
    cost: CostModel,
    on_engine: Callable[[], None] = lambda: None,
) -> list[list[Record]]:
    """The records of each sampled engine. ValueError if there is nothing to simulate."""
    if not rows or not 1 <= fleet.sampled <= fleet.engines:
        raise ValueError("a fleet needs a trace with requests, and a sample of 1 engine up to all of them")
    found = []
    for engine in range(fleet.sampled):
        arrivals = thinned(rows, fleet, engine)
        found.append(simulation.run(arrivals, config, cost, seed=fleet.seed + engine) if arrivals else [])
        on_engine()
    return found


def estimates(engines: Sequence[Sequence[Record]], seed: int = 0) -> list[Estimate]:
    """Figures of all requests, each with its interval. The engines are drawn again, not the requests: those of one
    engine depend on each other.
    """
    rng = random.Random(f"{seed} bootstrap")  # noqa: S311
    draws = [rng.choices(range(len(engines)), k=len(engines)) for _ in range(RESAMPLED)]
    found = []
    for name, share in _FIGURES:
        values = [measures.times(name, records) for records in engines]
        whole = measures.quantile([value for own in values for value in own], share)
        if whole is None:
            continue
        drawn = [
            got
            for draw in draws
            if (got := measures.quantile([value for i in draw for value in values[i]], share)) is not None
        ]
        low, high = measures.quantile(drawn, 0.025), measures.quantile(drawn, 0.975)
        found.append(Estimate(f"{name} p{share * 100:g}", whole, whole if low is None else low, high or whole))
    return found
