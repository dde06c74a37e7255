"""`Bodies`: reads and parses the requests' bodies, which are what anybody may send, within bounds of size and time."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from orcaserve.serve import errors
from orcaserve.serve.decode_body import decode
from orcaserve.serve.disconnect import ClientGone
from orcaserve.serve.door import check_length
from orcaserve.serve.frontend import Frontend
from orcaserve.serve.tally import Tally

_LARGE_AT_ONCE = 4  # of the longest: more than that is not read at the same time
_SMALL, _SMALL_AT_ONCE = 64 << 10, 16 << 20  # bytes; bodies up to this have room of their own beside large ones
_RETRY_SECONDS = 1.0
_LEAST_RATE = 64 << 10  # bytes a second of a body that is on its way
_LARGE = 1 << 20  # bytes; parsed in a thread, so that others have their turn between its steps
T = TypeVar("T", bound=msgspec.Struct)


def most_bytes(limit: int) -> int:
    """Of all bodies that are read or decoded at the same time; limit: of one."""
    return _LARGE_AT_ONCE * limit + _SMALL_AT_ONCE


class Bodies:
    """Owner of the count of bytes that are being read or decoded.

    patience: seconds after which a body must go on, and that it may be slower than the least rate in all.
    """

    def __init__(self, frontend: Frontend, patience: float = 15.0) -> None:
        self._frontend = frontend
        self._patience = patience
        self._num_bytes = 0
        self._large = asyncio.Semaphore(1)  # of large bodies one is parsed at a time

    async def read(self, request: Request, type: type[T]) -> T:
        """One request's body. Raises ApiError, ClientGone.

        It is read no further than is allowed, and no further than all of them together are, nor longer than it takes to
        send it; parsed only if that will not take long.
        """
        limit = self._frontend.options.max_body_bytes
        check_length(request.headers.get("content-length", "0").encode(), limit)
        parts: list[bytes] = []
        size = kept = 0
        tally = Tally()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._patience) as limit_of_time:
                async for part in request.stream():
                    size += len(part)
                    limit_of_time.reschedule(min(loop.time(), began + size / _LEAST_RATE) + self._patience)
                    if size > limit:
                        raise errors.body_too_large(limit)
                    if tally.excess is None:
                        tally.add(part)
                        parts.append(part)
                        kept += len(part)
                        self._num_bytes += len(part)
                    else:
                        parts.clear()
                        self._num_bytes -= kept
                        kept = 0
                    if self._num_bytes > _LARGE_AT_ONCE * limit + (_SMALL_AT_ONCE if kept <= _SMALL else 0):
                        self._frontend.metrics.rejected("queue_full")
                        raise errors.refused("queue_full", _RETRY_SECONDS)
            if tally.excess is not None:
                raise errors.body_too_complex(*tally.excess)
            if size <= _LARGE:
                return self._decode(parts, type)
            async with self._large:
                return await asyncio.to_thread(self._decode, parts, type)
        except TimeoutError:
            raise errors.body_too_slow() from None
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._num_bytes -= kept

    def _decode(self, parts: list[bytes], type: type[T]) -> T:
        return decode(b"".join(parts), type, self._frontend.unknown_fields)
