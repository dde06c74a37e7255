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

BODIES_AT_ONCE = 4  # of the longest: more than that is not read at the same time
_RETRY_SECONDS = 1.0
_LARGE = 1 << 20  # bytes; parsed in a thread, so that others have their turn between its steps
T = TypeVar("T", bound=msgspec.Struct)


class Bodies:
    """Owner of the count of bytes that are being read or decoded."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._num_bytes = 0
        self._large = asyncio.Semaphore(1)  # of large bodies one is parsed at a time

    async def read(self, request: Request, type: type[T]) -> T:
        """One request's body. Raises ApiError, ClientGone.

        It is read no further than is allowed, and no further than all of them together are; parsed only if that will
        not take long.
        """
        limit = self._frontend.options.max_body_bytes
        check_length(request.headers.get("content-length", "0").encode(), limit)
        parts: list[bytes] = []
        size = 0
        tally = Tally()
        try:
            async for part in request.stream():
                size += len(part)
                self._num_bytes += len(part)
                if size > limit:
                    raise errors.body_too_large(limit)
                if self._num_bytes > BODIES_AT_ONCE * limit:
                    self._frontend.metrics.rejected("queue_full")
                    raise errors.refused("queue_full", _RETRY_SECONDS)
                if tally.excess is None:
                    tally.add(part)
                    parts.append(part)
                else:
                    parts.clear()
            if tally.excess is not None:
                raise errors.body_too_complex(*tally.excess)
            if size <= _LARGE:
                return self._decode(parts, type)
            async with self._large:
                return await asyncio.to_thread(self._decode, parts, type)
        except ClientDisconnect:
            raise ClientGone from None
        finally:
            self._num_bytes -= size

    def _decode(self, parts: list[bytes], type: type[T]) -> T:
        return decode(b"".join(parts), type, self._frontend.unknown_fields)
