"""What crosses the socket between the frontend and the engine process, in frames as `engine.framing` has them."""

from __future__ import annotations

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.engine.messages import Abort, Stats, Step, Stop, Submit


class Start(msgspec.Struct, frozen=True, tag=True):
    """Load this. The first frame to an engine process, and sent once."""

    options: EngineOptions


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How far a stage of the start has come, in the stage's own unit; total 0: not known."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded; requests may come."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The model cannot be served; the engine process ends after this line for the operator."""

    message: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """The engine process is alive.

    num_tokens: tokens of the batches in flight, 0 when there is none. stats: None until the loop runs; they keep the
    frontend's picture fresh when an abort leaves nothing to iterate over. busy_seconds: that each rank has worked,
    where there are several, or a device that works by itself.
    """

    num_tokens: int = 0
    stats: Stats | None = None
    busy_seconds: tuple[float, ...] = ()


class Watch(msgspec.Struct, frozen=True, tag=True):
    """Whether somebody looks on from now on, who wants to know why requests wait."""

    on: bool


ToEngine = Start | Submit | Abort | Stop | Watch
FromEngine = Loading | Ready | Failed | Beat | Step

BEAT_SECONDS = 0.25  # how often the engine process says that it is alive, and how often the frontend looks
