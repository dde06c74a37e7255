"""A body that is on its way takes room that others wait for: it has to come in time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from orcaserve.serve.bodies import Bodies
from orcaserve.serve.decode_body import UnknownFields
from orcaserve.serve.errors import ApiError
from orcaserve.serve.frontend import HttpOptions
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.protocol import CompletionRequest

BODY = b'{"prompt": "x"}'


async def read(bodies: Bodies, pause: float, size: int) -> CompletionRequest:
    """The body in pieces of so many bytes, with a pause after each."""
    pieces = [BODY[at : at + size] for at in range(0, len(BODY), size)]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        if len(piece) + sum(map(len, pieces)) < len(BODY):
            await asyncio.sleep(pause)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    return await bodies.read(Request(scope, receive), CompletionRequest)


@pytest.fixture
def bodies() -> Bodies:
    frontend = SimpleNamespace(options=HttpOptions(), metrics=Metrics("m"), unknown_fields=UnknownFields())
    return Bodies(frontend, patience=0.2)


@pytest.mark.parametrize(("pause", "size"), [(60.0, 5), (0.03, 1)], ids=["stands still", "trickles"])
def test_a_body_that_does_not_come_in_time_is_given_up(bodies: Bodies, pause: float, size: int) -> None:
    with pytest.raises(ApiError) as raised:
        asyncio.run(read(bodies, pause, size))
    assert (raised.value.status, raised.value.body.error.code) == (408, "body_too_slow")
    assert bodies._num_bytes == 0, "and its room is free"


def test_a_body_in_pieces_is_read(bodies: Bodies) -> None:
    assert asyncio.run(read(bodies, 0.0, 4)).prompt == "x"
    assert bodies._num_bytes == 0
