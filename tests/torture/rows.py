"""What a row of the scorecard is told, and what it says in the end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Scale = Literal["short", "full"]


@dataclass(frozen=True)
class Row:
    """One row of the scorecard: `name` is R1 to R17."""

    name: str
    what: str
    target: str


@dataclass(frozen=True)
class Outcome:
    """What one row has shown.

    `figure` is the measurement in words, with counts and units, as it goes into the table. `is_met` is None where
    the row could not be asked (of a neighbour that lacks the feature); `cause` then says why, and where the target
    was missed says what is known of the reason. `trace` is what reproduces a failure, smallest first.
    """

    row: Row
    figure: str
    is_met: bool | None
    cause: str = ""
    trace: tuple[str, ...] = ()

    def line(self) -> str:
        verdict = {True: "met", False: "MISSED", None: "not asked"}[self.is_met]
        return f"{self.row.name:4} {verdict:9} {self.figure}" + (f" ({self.cause})" if self.cause else "")


@dataclass(frozen=True)
class Setup:
    """How a row is to be run.

    `url` is a server that runs already (a neighbour): rows start no server of their own then and ask what any
    OpenAI-compatible server can be asked. `folder` is where a row may leave records. `sizes` overrides counts by
    name, to repeat a failure or to run longer: `requests=1000`.
    """

    scale: Scale
    seed: int
    folder: Path
    url: str | None = None
    model: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    def size(self, name: str, short: int, full: int) -> int:
        """A count of this run: what was asked for, else by the scale."""
        return self.sizes.get(name, short if self.scale == "short" else full)

    def random(self, *names: object) -> random.Random:
        """A generator of this part of the run alone: parts do not disturb one another's draws."""
        return random.Random(":".join(map(str, (self.seed, *names))))
