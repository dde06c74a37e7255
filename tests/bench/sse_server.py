"""A completions server for the tests: a real socket, HTTP/1.1 with keep-alive, and answers that the test writes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

# What a reply sends: (seconds to wait, event or bytes). An event is JSON; bytes go out as they are; None cuts the line.
Script = Iterable[tuple[float, dict[str, Any] | bytes | None]]
Answer = Callable[[dict[str, Any]], Script | tuple[int, Any]]
DONE = b"data: [DONE]\n\n"


def text(*texts: str, **more: Any) -> dict[str, Any]:
    """A chunk."""
    return {"choices": [{"index": 0, "text": one, **more} for one in texts]}


def usage(body: dict[str, Any], count: int | None = None) -> dict[str, Any]:
    """The last chunk; says what was asked for unless told otherwise."""
    counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"] if count is None else count}
    return {"choices": [], "usage": counts}


def steady(step: float = 0.0, first: float = 0.0) -> Answer:
    """A token every `step` seconds, the first after `first`; one chunk a token."""

    def answer(body: dict[str, Any]) -> Script:
        chunks = [(step if i else first, text("x")) for i in range(body["max_tokens"])]
        return [*chunks, (0, usage(body)), (0, DONE)]

    return answer


class FakeServer:
    """Answers POST /v1/completions by a script, and GET /v1/models. Owner of its thread and of what it saw.

    bodies, heads: every request's, the heads in lower case; most: how many replies were under way at the same time.
    """

    def __init__(self, answer: Answer, models: Any = None) -> None:
        self._answer = answer
        self._models = {"data": [{"id": "fake"}]} if models is None else models
        self._now = 0
        self.most = 0
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                line, *fields = head.splitlines()
                length = next((int(field[15:]) for field in fields if field.startswith("content-length:")), 0)
                content = await reader.readexactly(length)
                if line.startswith("get /v1/models "):
                    writer.write(_whole(200, self._models))
                elif line.startswith("post /v1/completions "):
                    self.heads.append(head)
                    self._now += 1
                    self.most = max(self.most, self._now)
                    await self._reply(writer, json.loads(content))
                    self._now -= 1
                else:
                    writer.write(_whole(404, {"error": {"message": "no such page"}}))
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass  # the client is done
        finally:
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        self.bodies.append(body)
        script = self._answer(body)
        if isinstance(script, tuple):
            writer.write(_whole(*script))
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for delay, event in script:
            await asyncio.sleep(delay)
            if event is None:
                writer.close()
                return
            data = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")


def _whole(status: int, content: Any) -> bytes:
    data = json.dumps(content).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status,
        len(data),
        data,
    )
