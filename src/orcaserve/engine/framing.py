"""Typed frames on a stream of bytes, each led by its length: 4 bytes little-endian, then so many bytes of msgpack.

Both ends are ours, so a frame that does not decode is a bug and raises `msgspec.MsgspecError`.
"""

from __future__ import annotations

import msgspec

_HEADER = 4
_encoder = msgspec.msgpack.Encoder()


def encode(frame: msgspec.Struct) -> bytes:
    payload = _encoder.encode(frame)
    return len(payload).to_bytes(_HEADER, "little") + payload


class FrameReader:
    """Cuts a byte stream into frames, however it is torn. Owner of the bytes that are not yet a whole frame."""

    def __init__(self, frames: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(frames)
        self._buffer = bytearray()

    @property
    def rest(self) -> bytes:
        """What has come of the next frame."""
        return bytes(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[object]:
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
