"""`Lab`: where a part of the report does its runs; how much it does, how long requests are, and who watches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.client import BenchError
from orcaserve.bench.paper.drive import Trial, drive
from orcaserve.bench.paper.engine import Engine, Setup
from orcaserve.bench.paper.in_turn import drive_in_turn
from orcaserve.bench.workloads import Work
from orcaserve.bench.workloads.spec import make

SHORTEST = 64  # tokens of context below which the paper's requests lose their shape


class Effort(msgspec.Struct, frozen=True, kw_only=True):
    """How much is done.

    requests: of a curve's point at saturation; below it fewer, down to `fewest`, since nothing waits there and the time
        goes by in waiting for arrivals. Where all come at once there are `burst` times as many. rounds: of the engine
        alone.
    shares: rates of Fig. 10, as shares of the measured saturation; equal_shares: of Fig. 11, whose requests are
    `equal_times` as many, for static batches must come and go. orca_sizes: batches of the iteration-level curves.
    scale: what all lengths are multiplied by.
    """

    name: str
    requests: int
    fewest: int
    burst: int
    rounds: int
    shares: tuple[float, ...]
    equal_shares: tuple[float, ...]
    equal_times: int
    orca_sizes: tuple[int, ...]
    scale: float


QUICK = Effort(
    name="quick",
    requests=24,
    fewest=24,
    burst=2,
    rounds=3,
    shares=(0.4, 0.8, 1.2, 2.0),  # so few requests make a queue only if they come fast
    equal_shares=(0.5, 1.0, 2.0),
    equal_times=2,
    orca_sizes=(1, 8, 32),
    scale=0.5,
)
FULL = Effort(
    name="full",
    requests=48,
    fewest=16,
    burst=3,
    rounds=3,
    shares=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    equal_shares=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    equal_times=1,
    orca_sizes=(1, 8, 16, 32),
    scale=1.0,
)


class Watch(Protocol):
    """Who shows how far a run is."""

    def run(self, label: str, total: int) -> AbstractContextManager[Watch]:
        """A run of so many requests begins."""
        ...

    def ended(self) -> None:
        """One of its requests has ended."""
        ...


class Lab(msgspec.Struct, frozen=True):
    """An engine, what to do with it, and the seed that all lengths, arrivals and ids follow from."""

    engine: Engine
    effort: Effort
    seed: int
    watch: Watch

    def work(self, text: str) -> Work:
        return make(text, vocab=self.engine.vocab_size, seed=self.seed)

    def run(self, work: Work, setup: Setup, what: str = "") -> Trial:
        with self.watch.run(f"{setup.name}{what}", len(work.items)) as watch:
            return drive(self.engine, work, setup, watch.ended)

    def in_turn(self, work: Work, setups: Sequence[Setup], what: str) -> list[Trial]:
        """The same under each setup, side by side: a ratio of two of them is none of two minutes."""
        with self.watch.run(what, len(setups) * len(work.items)) as watch:
            return drive_in_turn(self.engine, work, setups, watch.ended)

    def factor(self, longest: int) -> float:
        """What lengths are multiplied by: the effort's scale, or less where `longest` tokens are too many."""
        if self.engine.max_model_len < SHORTEST:
            raise BenchError(
                f"the model takes {self.engine.max_model_len} tokens, which is too short for the paper's requests: "
                f"take one of at least {SHORTEST}"
            )
        return min(self.effort.scale, self.engine.max_model_len / longest)


def scaled(tokens: int, factor: float) -> int:
    """A length of the paper made to fit; at least a token."""
    return max(1, int(tokens * factor))


def saturation(lab: Lab, lengths: str, setup: Setup) -> float:
    """Requests a second that are answered when all are there from the start."""
    trial = lab.run(lab.work(f"burst:{lengths},n={lab.effort.requests}"), setup, ", all at once")
    return measures.request_rate(trial.records) or 0.0
