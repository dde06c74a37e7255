"""The cheapest way to serve a workload within limits: candidates are simulated, with as many replicas as it takes."""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from orcaserve.bench import load_report, simulation
from orcaserve.core.policy import parse_policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.hardware import Parallel, derive, hardware, kv_tokens
from orcaserve.sim.run import Arrival
from orcaserve.sim.shape import ModelShape

MOST_REPLICAS = 256


class Candidate(msgspec.Struct, frozen=True):
    """One way to serve: devices by their name, how many share a model, and what the scheduler is told."""

    hardware: str
    parallel: Parallel
    max_batch_size: int
    policy: str

    def __str__(self) -> str:
        return f"{self.hardware}, {self.parallel}, batch {self.max_batch_size}, {self.policy}"


class Choice(msgspec.Struct, frozen=True):
    """What came of a candidate. replicas: the fewest that meet the limits; None: it does not, and `why` says why.

    price: of all its devices, per hour. met: share of requests within the limits.
    """

    candidate: Candidate
    replicas: int | None = None
    price: float | None = None
    met: float | None = None
    ttft_p99: float | None = None
    tpot_p99: float | None = None
    why: str = ""


def read_prices(path: Path) -> dict[str, float]:
    """Price per device and hour by the hardware's name, from JSON or TOML. ValueError says what is wrong with it."""
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        prices = msgspec.convert(found, dict[str, float])
    except ValueError as error:
        raise ValueError(f"{path} is no price table, which is NAME = PRICE PER HOUR in TOML or JSON: {error}") from None
    for name, price in prices.items():
        hardware(name)
        if not price > 0:
            raise ValueError(f"{path}: the price of {name} is {price}; it is above 0")
    return prices


def candidates(
    names: Sequence[str],
    tensor: Sequence[int],
    pipeline: Sequence[int],
    batches: Sequence[int],
    policies: Sequence[str],
) -> Iterator[Candidate]:
    """All combinations."""
    for name, t, p, batch, policy in itertools.product(names, tensor, pipeline, batches, policies):
        yield Candidate(name, Parallel(t, p), batch, policy)


def choose(
    arrivals: Sequence[Arrival],
    shape: ModelShape,
    limits: Mapping[str, float],
    prices: Mapping[str, float],
    among: Sequence[Candidate],
    *,
    share: float = 0.95,
    seed: int = 0,
    on_candidate: Callable[[], None] = lambda: None,
) -> list[Choice]:
    """Every candidate with the fewest replicas that let `share` of the requests meet the limits, the cheapest first."""
    found = []
    for candidate in among:
        found.append(_tried(candidate, arrivals, shape, dict(limits), prices[candidate.hardware], share, seed))
        on_candidate()
    return sorted(found, key=lambda choice: (choice.price is None, choice.price or 0.0, -(choice.met or 0.0)))


def _tried(
    candidate: Candidate,
    arrivals: Sequence[Arrival],
    shape: ModelShape,
    limits: dict[str, float],
    price: float,
    share: float,
    seed: int,
) -> Choice:
    on, parallel = hardware(candidate.hardware), candidate.parallel
    try:
        config = SchedulerConfig(
            policy=parse_policy(candidate.policy),
            max_batch_size=candidate.max_batch_size,
            max_batch_tokens=max(512, candidate.max_batch_size),
            num_blocks=max(1, kv_tokens(on, shape, parallel) // 16),
            block_size=16,
            depth=parallel.pipeline,
        )
        cost = derive(on, shape, parallel)

        def summary(replicas: int) -> load_report.Summary:
            return load_report.summary(simulation.run(arrivals, config, cost, seed=seed, replicas=replicas), limits)

        # Alone with its engine, a request sees the least that this candidate can do.
        most = min(MOST_REPLICAS, len(arrivals))
        low, high = 0, 1
        while not _meets(best := summary(high), share):
            if high == most:
                met = best.goodput.share if best.goodput else 0.0
                return Choice(candidate, met=met, why=f"{met:.1%} within the limits, even with {most} replicas")
            low, high = high, min(most, 2 * high)
        while high - low > 1:
            middle = (low + high) // 2
            if _meets(tried := summary(middle), share):
                high, best = middle, tried
            else:
                low = middle
    except ValueError as error:
        return Choice(candidate, why=str(error))
    return Choice(
        candidate,
        replicas=high,
        price=high * parallel.devices * price,
        met=best.goodput.share if best.goodput else None,
        ttft_p99=best.times["ttft"].p99,
        tpot_p99=best.times["tpot"].p99,
    )


def _meets(summary: load_report.Summary, share: float) -> bool:
    return summary.goodput is not None and summary.goodput.share >= share


def draw(choices: Sequence[Choice], path: Path) -> None:
    """Writes a PNG: prices of what meets the limits, as bars. Needs matplotlib (the extra `plots`)."""
    from matplotlib.figure import Figure

    shown = [choice for choice in choices if choice.price is not None][:20]
    figure = Figure(figsize=(9, 1.2 + 0.32 * max(1, len(shown))), dpi=150, layout="constrained")
    panel = figure.subplots()
    labels = [f"{choice.replicas} × {choice.candidate}" for choice in shown]
    bars = panel.barh(labels, [choice.price or 0.0 for choice in shown], color="#2f6db5")
    if shown:
        bars[0].set_color("#f2a541")
    panel.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("price per hour of what meets the limits; the cheapest first")
    panel.tick_params(labelsize=8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    figure.savefig(path)
