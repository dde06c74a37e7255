"""What crosses the socket between the frontend and the engine process: typed frames, each led by its length.

A frame is a 4-byte little-endian length and so many bytes of msgpack. Both ends of the socket pair are ours, so a frame
that does not decode is a bug and raises `msgspec.MsgspecError`.
"""

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
    frontend's picture fresh when an abort leaves nothing to iterate over.
    """

    num_tokens: int = 0
    stats: Stats | None = None


ToEngine = Start | Submit | Abort | Stop
FromEngine = Loading | Ready | Failed | Beat | Step

BEAT_SECONDS = 0.25  # how often the engine process says that it is alive, and how often the frontend looks
_HEADER = 4
_encoder = msgspec.msgpack.Encoder()


def encode(frame: ToEngine | FromEngine) -> bytes:
    payload = _encoder.encode(frame)
    return len(payload).to_bytes(_HEADER, "little") + payload


class FrameReader:
    """Cuts a byte stream into frames, however it is torn. Owner of the bytes that are not yet a whole frame."""

    def __init__(self, frames: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(frames)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """The frames that `data` completes."""
        self._buffer += data
        start = 0
        view = memoryview(self._buffer)
        frames = []
        while len(view) - start >= _HEADER:
            end = start + _HEADER + int.from_bytes(view[start : start + _HEADER], "little")
            if end > len(view):
                break
            frames.append(self._decoder.decode(view[start + _HEADER : end]))
            start = end
        view.release()
        del self._buffer[:start]
        return frames
