"""What crosses between the request pool and an engine, as typed values."""

from __future__ import annotations

import msgspec

from orcaserve.core.batch import ScheduledRequest
from orcaserve.core.decisions import Decision
from orcaserve.core.request import NewRequest, Output


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Take this request in. waited: seconds that it has lain in the loop's inbox."""

    request: NewRequest
    waited: float = 0.0


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget this request; unknown ids are ignored. No output follows."""

    id: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the loop; what still runs is dropped."""


Command = Submit | Abort | Stop


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's state after an iteration; the counters count from the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_held_blocks: int = 0
    num_preemptions: int = 0
    num_swapped: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_steps: int = 0


class Step(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What one iteration gave. started: requests that left the queue in a batch since the last message.

    num_tokens: tokens the iteration computed; seconds: how long the loop waited for it.
    rows, freed: its batch's. decisions: what was decided against requests since the last message, while the loop is
        watched.
    """

    outputs: tuple[Output, ...] = ()
    started: tuple[int, ...] = ()
    num_tokens: int = 0
    num_rows: int = 0
    seconds: float = 0.0
    rows: tuple[ScheduledRequest, ...] = ()
    freed: tuple[int, ...] = ()
    decisions: tuple[Decision, ...] = ()
    stats: Stats
