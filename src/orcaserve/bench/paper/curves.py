"""Figs. 10 and 11: latency against throughput while the rate of Poisson arrivals rises, a curve for each setup."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.engine import Setup, default, orca, static
from orcaserve.bench.paper.lab import Lab, saturation, scaled
from orcaserve.bench.paper.section import Section, listed, times
from orcaserve.bench.report import number

TITLES = {"mixed": "Latency against throughput (Fig. 10)", "equal": "Equal requests (Fig. 11)"}
PROMPT, OUTPUT = (32, 512), (1, 128)
EQUAL = ((32, 32), (256, 256))  # tokens in, tokens out
# Latency bounds, as multiples of the least latency that any setup has at the lowest rate: the first one is drawn. At a
# single one it is chance who is ahead, as curves of few requests cross each other.
BOUNDS = (2.0, 3.0, 4.0, 6.0, 8.0)
OFF = 25.0  # a curve ends at the first point above so many times that latency: the queue only grows


class Point(msgspec.Struct, frozen=True):
    """One run. rate: of arrivals; throughput: what was answered, both in requests/s. latency: median normalised, s."""

    setup: str
    rate: float
    throughput: float
    latency: float
    ttft: float | None


class Curves(msgspec.Struct, frozen=True):
    """lengths: of the workload, as it is written. saturation: requests/s, all at once under the largest orca.

    bound: the first of the latencies, in seconds per token, at which throughputs are compared.
    """

    lengths: str
    requests: int
    saturation: float
    bound: float
    points: list[Point]

    def of(self, setup: str) -> list[Point]:
        return [point for point in self.points if point.setup == setup]

    @property
    def setups(self) -> list[str]:
        return list(dict.fromkeys(point.setup for point in self.points))


class Capacity(msgspec.Struct, frozen=True):
    """Throughput under the bound, in requests/s: None if even the lowest rate is above it.

    is_least: the curve never came to the bound, so that it can do more.
    """

    rate: float | None
    is_least: bool


def mixed(lab: Lab) -> list[Curves]:
    """Lengths that vary (Fig. 10)."""
    factor = lab.factor(PROMPT[1] + OUTPUT[1])
    (a, b), (c, d) = ((scaled(tokens, factor) for tokens in ends) for ends in (PROMPT, OUTPUT))
    largest = max(lab.effort.orca_sizes)
    setups = [static(1), static(8), static(largest), *map(orca, lab.effort.orca_sizes), default(largest)]
    return [_curves(lab, f"in={a}-{b},out={c}-{d}", setups, lab.effort.shares, lab.effort.requests)]


def equal(lab: Lab) -> list[Curves]:
    """Lengths that are all the same (Fig. 11)."""
    factor = lab.factor(sum(EQUAL[-1]))
    setups = [static(8), orca(8), default(8)]
    requests = lab.effort.requests * lab.effort.equal_times
    return [
        _curves(lab, f"in={scaled(a, factor)},out={scaled(b, factor)}", setups, lab.effort.equal_shares, requests)
        for a, b in EQUAL
    ]


def _curves(lab: Lab, lengths: str, setups: Sequence[Setup], shares: Sequence[float], requests: int) -> Curves:
    largest = max(setups, key=lambda setup: (not setup.policy.request_level, setup.max_batch_size))
    full = saturation(lab, lengths, largest)
    points: list[Point] = []
    ended: set[str] = set()
    idle = 0.0
    for share in shares:
        rate = f"{share * full:.6f}".rstrip("0")
        count = max(min(requests, lab.effort.fewest), round(requests * min(1.0, share)))
        work = lab.work(f"poisson:rate={rate},{lengths},n={count}")
        for setup in setups:
            if setup.name in ended:
                continue
            records = lab.run(work, setup, f" at {number(float(rate))} requests/s").records
            point = Point(
                setup.name,
                rate=float(rate),
                throughput=measures.request_rate(records) or 0.0,
                latency=measures.normalised_latency(records),
                ttft=measures.ttft(records, 0.5),
            )
            points.append(point)
        if share == shares[0]:
            idle = min(point.latency for point in points)
        ended |= {point.setup for point in points if point.latency > OFF * idle}
    return Curves(lengths, requests, full, BOUNDS[0] * idle, points)


def capacity(points: Sequence[Point], bound: float) -> Capacity:
    """The highest throughput whose latency is within the bound, on straight lines between the points."""
    within = [point.throughput for point in points if point.latency <= bound]
    for a, b in itertools.pairwise(points):
        if (a.latency <= bound) != (b.latency <= bound):
            share = (bound - a.latency) / (b.latency - a.latency)
            within.append(a.throughput + share * (b.throughput - a.throughput))
    return Capacity(max(within) if within else None, is_least=all(point.latency <= bound for point in points))


class Ratio(msgspec.Struct, frozen=True):
    """How many times the throughput of `rival`, the best static setup under a bound; None: that cannot be told.

    says: whether the truth may be more or less than that, since a curve never came to the bound: "at least " or so.
    """

    rival: str
    factor: float | None
    says: str = ""


def ratio(curves: Curves, best: str, bound: float) -> Ratio:
    """Of `best` to the best static setup. None if one of them answers nothing, or neither came to the bound."""
    static = {name: capacity(curves.of(name), bound) for name in curves.setups if "static" in name}
    rival = max(static, key=lambda name: static[name].rate or 0.0)
    mine, most = capacity(curves.of(best), bound), static[rival].rate
    # Any static curve that can do more may be the best one of them.
    is_rival_least = any(of.is_least for of in static.values())
    if not mine.rate or not most or (mine.is_least and is_rival_least):
        return Ratio(rival, None)
    return Ratio(rival, mine.rate / most, "at least " if mine.is_least else "at most " if is_rival_least else "")


def ratios(curves: Curves, best: str) -> dict[float, Ratio]:
    """The same by the bounds of BOUNDS at which it is known what static setups can do, and both answer anything.

    At larger ones the ratio would only be the one of the last points again, however large the bound.
    """
    found = {bound: ratio(curves, best, curves.bound * bound / BOUNDS[0]) for bound in BOUNDS}
    return {bound: of for bound, of in found.items() if of.factor is not None and of.says != "at most "}


def _found(curves: Curves) -> tuple[list[str], list[str]]:
    """Sentences, and those that are not as expected."""
    said, surprises = [], []
    names = curves.setups
    best = [name for name in names if name.startswith("orca")][-1], names[-1]
    for name in best:
        some, wrong = _on_average(curves, name)
        said += [*some, *_at_first(curves, name)]
        surprises += wrong
        if capacity(curves.of(name), curves.bound).rate is None:
            surprises.append(f"{name} is above {_bound(curves)} at every rate measured.")
    peak = {name: max(point.throughput for point in curves.of(name)) for name in names}
    rival = max((name for name in names if "static" in name), key=lambda name: peak[name])
    said.append(
        f"Whatever the latency, {best[0]} comes to {number(peak[best[0]])} requests/s and {rival} to "
        f"{number(peak[rival])}: {times(peak[best[0]] / peak[rival])}."
    )
    return said, surprises


def _bound(curves: Curves) -> str:
    return f"{number(1000 * curves.bound)} ms per token"


def _on_average(curves: Curves, name: str) -> tuple[list[str], list[str]]:
    """What is said of all bounds together, and whether it is a surprise."""
    every = ratios(curves, name)
    factors = [of.factor for of in every.values() if of.factor is not None]
    if not factors:
        return [], []
    mean, least = statistics.geometric_mean(factors), "at least " * any(of.says for of in every.values())
    bounds = [f"{bound:g}" for bound in every]
    where = f"on average over bounds of {listed(bounds)}" if len(bounds) > 1 else f"at a bound of {bounds[0]}"
    said = [
        f"Under the same bound of latency, {name} answers {least}{times(mean)} what the best static setup does, "
        f"{where} times the least latency ({times(min(factors))} to {times(max(factors))})."
    ]
    wins = bool(curves.lengths.count("-")) and mean < 1 and not least
    return said, [f"Over all bounds the best static setup answers more requests than {name}."] if wins else []


def _at_first(curves: Curves, name: str) -> list[str]:
    """What is said of the first bound alone."""
    mine, of = capacity(curves.of(name), curves.bound), ratio(curves, name, curves.bound)
    if not mine.rate:
        return []
    said = f"At {_bound(curves)}, {name} answers {'at least ' * mine.is_least}{number(mine.rate)} requests/s"
    if of.factor is not None:
        return [f"{said}, {of.says}{times(of.factor)} what {of.rival} does."]
    rival = capacity(curves.of(of.rival), curves.bound)
    if rival.rate is None:
        return [f"{said}; no static setup is within it."]
    return [
        f"{said}, and {of.rival} {'at least ' * rival.is_least}{number(rival.rate)}: as {name} and a static setup "
        "never came to the bound, no ratio can be told."
    ]


def section(kind: str, found: list[Curves]) -> Section:
    said: list[str] = []
    surprises: list[str] = []
    for curves in found:
        some, wrong = _found(curves)
        said += [f"({curves.lengths}) {some[0]}", *some[1:]] if len(found) > 1 else some
        surprises += wrong
    looks = {
        "mixed": "Static curves turn upwards first, since a batch lasts as long as its longest member and whoever "
        "arrives meanwhile waits; iteration-level curves stay low until the machine is full.",
        "equal": "Where all lengths are equal nobody waits for a longer member, so the gain shrinks to what waiting "
        "for the running batch costs.",
    }
    return Section(
        title=TITLES[kind],
        look=looks[kind],
        found=said,
        surprises=surprises,
        head=["tokens", "setup", "arrivals/s", "answered/s", "s/token (median)", "TTFT p50, s", "under the bound/s"],
        rows=[
            [
                curves.lengths,
                point.setup,
                number(point.rate),
                number(point.throughput),
                number(point.latency),
                number(point.ttft),
                _capacity(curves, name) if point is curves.of(name)[0] else "",
            ]
            for curves in found
            for name in curves.setups
            for point in curves.of(name)
        ],
        notes=[
            f"{found[0].requests} requests a point, fewer below saturation, the same for every setup; Poisson "
            "arrivals, no end token; rates "
            "are shares of what is answered when all come at once "
            f"({', '.join(f'{number(curves.saturation)} requests/s' for curves in found)}). The bound is {BOUNDS[0]:g} "
            "times the least latency at the lowest rate, as the paper compares at 190 ms; between points it is read "
            "off straight lines. Averages leave out bounds that a static curve never came to: it could do more there. "
            f"A curve ends at {OFF:g} times that latency. setup(n): at most n "
            "requests in a batch; default(n): as `orcaserve serve --max-itl 0` schedules, without a limit of time."
        ],
    )


def _capacity(curves: Curves, name: str) -> str:
    of = capacity(curves.of(name), curves.bound)
    return "none" if of.rate is None else f"{'≥ ' * of.is_least}{number(of.rate)}"
