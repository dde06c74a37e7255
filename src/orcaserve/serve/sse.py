"""`EventStream`: a response of server-sent events, one write per event, cancelled when the client hangs up.

It begins with the first event, so that what fails before that is answered with a status of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import NamedTuple

from starlette.types import Receive, Scope, Send

from orcaserve.serve.disconnect import ClientGone, while_connected
from orcaserve.serve.errors import ApiError, internal

_log = logging.getLogger("orcaserve.serve")
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
# Not ends of a line to the standard, but to clients that cut by Unicode's idea of lines.
_LINE_ENDS = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))
DONE = b"data: [DONE]\n\n"


class Named(NamedTuple):
    """An event with a name. data: its JSON."""

    name: str
    data: bytes


class EventStream:
    """An ASGI response. events: the JSON of each event. An ApiError from it becomes the last event, or is raised.

    end: what follows the last event.
    """

    def __init__(self, events: AsyncGenerator[bytes] | AsyncGenerator[Named], end: bytes = DONE) -> None:
        self._events = events
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientGone, OSError):
            await while_connected(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            first = await anext(events, None)
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                if first is not None:
                    await send(_event(first))
                async for event in events:
                    await send(_event(event))
            except ApiError as error:
                await send(_event(error.encode()))
            except (asyncio.CancelledError, OSError):
                raise
            except Exception:
                _log.exception("a stream failed")
                await send(_event(internal().encode()))
        await send({"type": "http.response.body", "body": self._end, "more_body": False})


def _event(event: bytes | Named) -> dict[str, object]:
    name, data = (b"event: %s\n" % event.name.encode(), event.data) if isinstance(event, Named) else (b"", event)
    for character, escape in _LINE_ENDS:
        if character in data:
            data = data.replace(character, escape)
    return {"type": "http.response.body", "body": name + b"data: " + data + b"\n\n", "more_body": True}
