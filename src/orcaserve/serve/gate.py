"""`Gate`: what happens to every request around its endpoint: request id, key or origin, the door, one shape of errors.

The request id is the client's, if it is one, or drawn; endpoints find it as `request.state.request_id`, and the tenant
whose key came with it as `request.state.tenant`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orcaserve.serve import errors
from orcaserve.serve.disconnect import ClientGone
from orcaserve.serve.door import Door
from orcaserve.serve.keys import Keys
from orcaserve.serve.origins import Origins
from orcaserve.serve.page_files import PAGE_FILES

_log = logging.getLogger("orcaserve.serve")
# Of probes, which have no key, and of the page, which asks for one; everything else is shut by default.
_OPEN_PATHS = (b"/health", b"/ready", *(path.encode() for path in PAGE_FILES))
ARRIVAL = "orcaserve.arrival"  # where a scope has the Arrival of a request that the door has let in
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")


class Gate:
    """ASGI middleware around the whole application.

    api_keys: KEY or NAME=KEY; none lets in everybody but the web pages that `origins` keeps out. guarded: paths to
    which POST requests come through the door.
    """

    def __init__(
        self, app: ASGIApp, api_keys: Sequence[str], origins: Origins, door: Door, guarded: Collection[str]
    ) -> None:
        self._app = app
        self._origins = origins
        self._keys = Keys(api_keys)
        self._door = door
        self._guarded = frozenset(guarded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = dict(scope["headers"])  # of repeated ones the last
        request_id = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        scope = {**scope, "state": {**scope.get("state", {}), "request_id": request_id.decode()}}
        has_started = is_in = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        try:
            if not self._keys.are_required:
                self._origins.check(scope["method"], headers)
            tenant = self._keys.tenant(headers.get(b"authorization", b""))
            if self._keys.are_required and tenant is None and scope.get("raw_path") not in _OPEN_PATHS:
                raise errors.unauthorized()
            scope["state"]["tenant"] = tenant
            if scope["path"] in self._guarded and scope["method"] == "POST":
                scope[ARRIVAL] = self._door.knock(headers, tenant)
            is_in = True
            await self._app(scope, receive, send_with_id)
        except errors.ApiError as error:
            # Of the body of who is turned away the rest is skipped, and the connection can be used again. Who asked
            # whether to send it may or may not do so, and then nobody could tell it from the next request.
            if not is_in and b"expect" in headers:
                error.headers["connection"] = "close"
            if not has_started:
                await send_error(error, send_with_id)
        except ClientGone:
            pass
        except Exception:
            _log.exception("request %s failed", request_id.decode())
            if has_started:
                raise  # the server cuts the connection, so that nobody takes half a response for a whole one
            await send_error(errors.internal(), send_with_id)


async def send_error(error: errors.ApiError, send: Send) -> None:
    body = error.encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
