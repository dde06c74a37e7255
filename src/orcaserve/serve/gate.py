"""`Gate`: what happens to every request around its endpoint: request id, API key, and errors in one shape."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orcaserve.serve import errors
from orcaserve.serve.disconnect import ClientGone

_log = logging.getLogger("orcaserve.serve")
_OPEN_PATHS = (b"/health", b"/ready")  # of probes, which have no key; everything else is shut by default
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")


class Gate:
    """ASGI middleware around the whole application. api_keys: none lets everybody in."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        headers = dict(scope["headers"])  # of repeated ones the last
        request_id = headers.get(b"x-request-id", b"")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        try:
            if not self._may_pass(scope, headers):
                raise errors.unauthorized()
            await self._app(scope, receive, send_with_id)
        except errors.ApiError as error:
            if not has_started:
                await send_error(error, send_with_id)
        except ClientGone:
            pass
        except Exception:
            _log.exception("request %s failed", request_id.decode())
            if has_started:
                raise  # the server cuts the connection, so that nobody takes half a response for a whole one
            await send_error(errors.internal(), send_with_id)

    def _may_pass(self, scope: Scope, headers: dict[bytes, bytes]) -> bool:
        if not self._digests or scope.get("raw_path") in _OPEN_PATHS:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever fits
        return scheme.lower() == b"bearer" and any(matches)


async def send_error(error: errors.ApiError, send: Send) -> None:
    body = error.encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _digest(key: bytes) -> bytes:
    """Of one length, so that not even the length of a key can be timed."""
    return hashlib.sha256(key).digest()
