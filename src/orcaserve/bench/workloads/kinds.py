"""Kinds of workloads: a small function for each, which draws requests; and the table of them.

All are open loops: nothing depends on a reply.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orcaserve.bench.workloads import traces
from orcaserve.bench.workloads.lengths import Lengths
from orcaserve.bench.workloads.work import LOWEST_ID, Item, load


class Draw:
    """The chance in a workload. Owner of its random generators.

    Arrivals, lengths and token ids have one each, so that another rate leaves the lengths as they are.
    """

    def __init__(self, text: str, part: int, *, vocab: int, seed: int) -> None:
        self.arrivals = random.Random(f"{seed} {part} arrivals")  # noqa: S311
        self.lengths = random.Random(f"{seed} {part} lengths")  # noqa: S311
        # A server that has done the same workload at another rate must know none of these prompts.
        self._ids = random.Random(f"{seed} {part} {text}")  # noqa: S311
        self._key = f"{seed} {part} {text}"
        self._vocab = list(range(LOWEST_ID, vocab))  # ids out of a list share its integers: 8 bytes each, not 36

    def ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._ids.choices(self._vocab, k=count))

    def block(self, name: int, count: int) -> tuple[int, ...]:
        """The ids of a block with a name: always the same."""
        return tuple(random.Random(f"{self._key} {name}").choices(self._vocab, k=count))  # noqa: S311


def burst(rng: random.Random) -> Iterator[float]:
    """All at once."""
    return itertools.repeat(0.0)


def poisson(rng: random.Random, rate: float) -> Iterator[float]:
    """`rate` arrivals a second; gaps are exponential."""
    return itertools.accumulate(rng.expovariate(rate) for _ in itertools.count())


def gamma(rng: random.Random, rate: float, cv: float) -> Iterator[float]:
    """Gaps of mean 1/rate whose standard deviation is cv times that: Gamma of shape 1/cv². 1 is Poisson."""
    return itertools.accumulate(rng.gammavariate(cv**-2, cv**2 / rate) for _ in itertools.count())


def onoff(rng: random.Random, rate: float, on: float, off: float) -> Iterator[float]:
    """Poisson for `on` seconds, then nobody for `off` seconds, and again."""
    return (at + at // on * off for at in poisson(rng, rate))


def arriving(arrivals: Callable[..., Iterator[float]]) -> Callable[..., Iterable[Item]]:
    """Requests that have nothing to do with each other, at these times."""

    def make(draw: Draw, n: int, prompts: Lengths, outputs: Lengths, **options: float) -> Iterable[Item]:
        for at in itertools.islice(arrivals(draw.arrivals, **options), n):
            yield Item(at, draw.ids(prompts.draw(draw.lengths)), outputs.draw(draw.lengths))

    return make


def chat(
    draw: Draw,
    sessions: int,
    rate: float,
    turns: Lengths,
    think: float,
    system: int,
    prompts: Lengths,
    outputs: Lengths,
) -> Iterable[Item]:
    """Sessions begin as in `poisson`. A turn's prompt is the turn before, its answer, and new words.

    Nobody knows what the server will answer, so that random ids stand in the history instead.
    """
    shared = draw.ids(system)
    for begin in itertools.islice(poisson(draw.arrivals, rate), sessions):
        at, history = begin, shared
        for _ in range(turns.draw(draw.lengths)):
            item = Item(at, history + draw.ids(prompts.draw(draw.lengths)), outputs.draw(draw.lengths))
            yield item
            history = item.prompt_ids + draw.ids(item.max_tokens)
            at += draw.arrivals.expovariate(1 / think)


class Scale(NamedTuple):
    """How a trace is made to fit. n: its first so many requests. speed, lengths: factors; max: in tokens."""

    n: int | None
    speed: float
    lengths: float
    max_in: int | None
    max_out: int | None

    def prompt(self, tokens: int) -> int:
        return _scaled(tokens, self.lengths, self.max_in)

    def output(self, tokens: int) -> int:
        return _scaled(tokens, self.lengths, self.max_out)


def _scaled(tokens: int, factor: float, limit: int | None) -> int:
    scaled = max(1, round(tokens * factor))
    return scaled if limit is None else min(scaled, limit)


def azure(draw: Draw, path: Path, **scale: Any) -> Iterable[Item]:
    """The trace has lengths only; prompts have nothing in common."""
    by = Scale(**scale)
    for row in traces.azure(path)[: by.n]:
        yield Item(row.at / by.speed, draw.ids(by.prompt(row.input_length)), by.output(row.output_length))


def mooncake(draw: Draw, path: Path, spread: float, **scale: Any) -> Iterable[Item]:
    """Blocks of one hash id are of the same ids, so that prompts share what they shared."""
    by = Scale(**scale)
    # A hash id covers what is before its block, too, so it always stands at the same place: there it keeps its ids.
    size = round(traces.BLOCK * by.lengths) + 1
    known: dict[int, tuple[int, ...]] = {}
    for row in traces.mooncake(path, draw.arrivals, spread)[: by.n]:
        ids: list[int] = []
        for i, name in enumerate(row.hash_ids):
            block = known.get(name) or known.setdefault(name, draw.block(name, size))
            ids += block[: round(traces.BLOCK * (i + 1) * by.lengths) - round(traces.BLOCK * i * by.lengths)]
        ids = ids[: by.prompt(row.input_length)]
        yield Item(row.at / by.speed, tuple(ids) or draw.ids(1), by.output(row.output_length))


def saved(draw: Draw, path: Path, n: int | None, speed: float) -> Iterable[Item]:
    """What a file says."""
    for item in load(path, draw.ids).items[:n]:
        yield msgspec.structs.replace(item, at=item.at / speed)


class Kind(NamedTuple):
    """make: from a Draw and the options. optional: their defaults as they are written; None where there is none."""

    make: Callable[..., Iterable[Item]]
    what: str
    example: str
    needs: tuple[str, ...]
    optional: dict[str, str | None]


_SCALE = {"n": None, "speed": "1", "lengths": "1", "max-in": None, "max-out": None}
KINDS = {
    "burst": Kind(arriving(burst), "all at once", "burst:in=512,out=exp128max1536,n=100", ("in", "out", "n"), {}),
    "poisson": Kind(
        arriving(poisson),
        "arrivals at random, independent of each other",
        "poisson:rate=2,in=32-512,out=1-128,n=100",
        ("rate", "in", "out", "n"),
        {},
    ),
    "gamma": Kind(
        arriving(gamma),
        "arrivals in clusters (cv above 1) or evenly (below)",
        "gamma:rate=2,cv=1.41,in=256,out=256,n=100",
        ("rate", "cv", "in", "out", "n"),
        {},
    ),
    "onoff": Kind(
        arriving(onoff),
        "Poisson arrivals for a time, then none for a time",
        "onoff:rate=20,on=3,off=27,in=32-512,out=1-128,n=100",
        ("rate", "on", "off", "in", "out", "n"),
        {},
    ),
    "chat": Kind(
        chat,
        "sessions whose turns repeat all before them, and a system prompt that they share",
        "chat:sessions=10,rate=0.5,turns=2-6,think=8,system=200,in=10-60,out=20-80",
        ("sessions", "rate", "turns", "think", "in", "out"),
        {"system": "0"},
    ),
    "azure": Kind(azure, "a trace of Azure (CSV)", "azure:path=FILE,speed=0.2,lengths=0.25", ("path",), _SCALE),
    "mooncake": Kind(
        mooncake,
        "a trace of Mooncake (JSON lines), with the prefixes that its prompts share",
        "mooncake:path=FILE,n=200,lengths=0.05,max-in=1000",
        ("path",),
        {**_SCALE, "spread": "3"},
    ),
    "saved": Kind(saved, "a file of an earlier run", "saved:path=FILE", ("path",), {"n": None, "speed": "1"}),
}
