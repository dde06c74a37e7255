"""`CostModel`: seconds of an iteration in every pipeline stage, from what its batch holds. Terms of a roofline.

A stage takes

    fixed + max(weights, per_token x tokens) + per_token_sent x tokens + per_row x rows
          + per_context x context + per_attended x attended [+ head if a row samples] + per_sample x samples

Linear maps either wait for their weights or for their arithmetic, whichever takes longer (the roofline); attention has
no weights, and reads `context` tokens of KV. Every term is at least 0, so that more work never takes less time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from orcaserve.core.batch import Batch

Seconds = tuple[float, ...]  # in every stage, in the order in which a batch goes through them


class Size(NamedTuple):
    """What a batch holds: tokens; rows; rows that sample; tokens whose K and V are read; pairs of query and key."""

    tokens: int
    rows: int
    samples: int
    context: int
    attended: int


def size_of(rows: list[tuple[int, int, bool]]) -> Size:
    """Of rows as (start, tokens, samples)."""
    tokens = samples = context = attended = 0
    for start, count, does_sample in rows:
        tokens += count
        context += start + count
        attended += count * start + count * (count + 1) // 2
        samples += does_sample
    return Size(tokens, len(rows), samples, context, attended)


def size(batch: Batch) -> Size:
    tokens = samples = context = attended = 0
    for row in batch.rows:
        start, count = row.start, row.num_tokens
        tokens += count
        context += start + count
        attended += count * start + count * (count + 1) // 2
        samples += row.samples
    return Size(tokens, len(batch.rows), samples, context, attended)


class StageCost(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stage's terms, in seconds; ValueError if one is below 0. The first lines of this file say what they mean.

    per_token_sent: communication: all-reduces inside the stage, and the hand-off to it.
    """

    fixed: float = 0.0
    weights: float = 0.0
    per_token: float = 0.0
    per_token_sent: float = 0.0
    per_row: float = 0.0
    per_context: float = 0.0
    per_attended: float = 0.0
    head: float = 0.0
    per_sample: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"a cost is a number of seconds from 0, but {name} is {getattr(self, name)}")

    def __call__(self, size: Size) -> float:
        tokens, rows, samples, context, attended = size
        arithmetic = self.per_token * tokens
        return (
            self.fixed
            + (arithmetic if arithmetic > self.weights else self.weights)
            + self.per_token_sent * tokens
            + self.per_row * rows
            + self.per_context * context
            + self.per_attended * attended
            + (self.head + self.per_sample * samples if samples else 0.0)
        )


class Door(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Seconds outside of the engine. What a frontend does, it does for one after the other.

    arrive: from when a request is due to when the engine may take it; busy: of these, how long the door is shut for
        the next one. deliver: from a result to the client; per_row: of every row before it in its batch.
    """

    arrive: float = 0.0
    busy: float = 0.0
    deliver: float = 0.0
    per_row: float = 0.0


class Residuals(msgspec.Struct, frozen=True):
    """Observed over predicted time, sorted, of iterations that were predicted to take a stage `above` seconds or more.

    What disturbs an iteration (another process, a page fault) does so for a while, whatever the iteration's length, so
    that short ones vary more.
    """

    above: float
    factors: tuple[float, ...]


class CostModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine's iterations cost.

    turn, turn_per_row: host seconds before an iteration starts (scheduling, taking results in), in which no stage works
        for it. residuals: by `above`, the first of 0; () without noise. made_from: in words.
    """

    stages: tuple[StageCost, ...]
    turn: float = 0.0
    turn_per_row: float = 0.0
    door: Door = Door()
    residuals: tuple[Residuals, ...] = ()
    made_from: str = ""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a cost model has at least one stage")
        if self.turn < 0 or self.turn_per_row < 0:
            raise ValueError("a cost is a number of seconds from 0")
        if any(not band.factors or min(band.factors) <= 0 for band in self.residuals):
            raise ValueError("a residual is a factor above 0")

    def __call__(self, batch: Batch) -> Seconds:
        of = size(batch)
        return tuple(stage(of) for stage in self.stages)

    def host(self, batch: Batch) -> float:
        """Host seconds before this batch starts."""
        return self.turn + self.turn_per_row * len(batch.rows)

    def noisy(self, seed: int) -> Callable[[Batch], Seconds]:
        """The same with a residual for an iteration in every stage, drawn by a hash of the seed and their numbers."""
        if not self.residuals:
            return self
        bands = [(band.above, band.factors) for band in reversed(self.residuals)]

        def cost(batch: Batch) -> Seconds:
            return tuple(one * factor(one, stage, batch.step) for stage, one in enumerate(self(batch)))

        def factor(seconds: float, stage: int, step: int) -> float:
            factors = next((factors for above, factors in bands if seconds >= above), bands[-1][1])
            return factors[mixed(mixed(seed, -stage) if stage else seed, step) % len(factors)]

        return cost


def mixed(seed: int, number: int) -> int:
    """64 bits that look random and follow from two whole numbers (SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    mask = (1 << 64) - 1
    z = (seed * 0xD1B54A32D192ED03 + number * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
