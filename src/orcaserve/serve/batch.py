"""`run_batch`: a file of requests in OpenAI's batch format, answered without a server, by the server's own application.

Every request goes through the same door as over HTTP. Answers are appended as they come, so that a batch that was
interrupted goes on where it was.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import httpx
import msgspec

from orcaserve.core.config import EngineOptions
from orcaserve.serve.admission import Limits
from orcaserve.serve.app import make_app
from orcaserve.serve.frontend import Frontend, HttpOptions
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.pool import EngineFailed, Pool
from orcaserve.serve.served_model import ServedModel

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
_NEVER = httpx.Timeout(None)
_UNBOUNDED = Limits(max_queue_requests=1 << 40, max_queue_tokens=1 << 40)  # we decide how many are on their way


class BatchError(ValueError):
    """The batch cannot be run; the message is one clear line."""


class Line(msgspec.Struct, kw_only=True):
    """One request. custom_id: of its own in the file."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: Literal["POST"] = "POST"


class Answer(msgspec.Struct, kw_only=True):
    """What the application answered, an error of it included."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Answered(msgspec.Struct, kw_only=True):
    """One line of the output."""

    id: str
    custom_id: str
    response: Answer
    error: None = None


class _Done(msgspec.Struct):
    """As much of an output line as tells that it is one."""

    custom_id: str


def read_lines(data: bytes) -> list[Line]:
    """The requests of a file. BatchError names the first line that is wrong."""
    lines: list[Line] = []
    seen: set[str] = set()
    for number, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BatchError(f"line {number} is no request of a batch: {error}") from None
        if line.url not in URLS:
            raise BatchError(f"line {number} asks for {line.url!r}; there are {', '.join(URLS)}")
        if line.body.get("stream"):
            raise BatchError(f"line {number} asks for a stream, which a file cannot give")
        if line.custom_id in seen:
            raise BatchError(f"line {number} has the custom_id {line.custom_id!r} of an earlier line")
        seen.add(line.custom_id)
        lines.append(line)
    if not lines:
        raise BatchError("the batch has no request")
    return lines


def answered(file: BinaryIO) -> set[str]:
    """The ids that an output file has answers to. A last line that was cut off is taken away.

    BatchError for a file that is something else.
    """
    file.seek(0)
    done: set[str] = set()
    end = 0
    for number, text in enumerate(file, 1):
        if not text.endswith(b"\n"):
            break
        try:
            done.add(msgspec.json.decode(text, type=_Done).custom_id)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise BatchError(f"line {number} of the output is no answer of a batch: give another file") from None
        end += len(text)
    file.truncate(end)
    file.seek(end)
    return done


async def run_batch(
    name: str,
    engine: EngineOptions,
    source: Path,
    target: Path,
    *,
    at_once: int,
    on_answer: Callable[[int, int], None],
) -> int:
    """Answers what the target has no answer to yet; returns how many answers are errors.

    at_once: requests on their way. on_answer: told (done, total) at first and after every answer.
    Raises BatchError, ModelError, EngineFailed, OSError.
    """
    lines = read_lines(source.read_bytes())
    target.touch()
    with target.open("r+b") as file:
        done = answered(file)
        left = iter([line for line in lines if line.custom_id not in done])
        counted = [len(lines) - sum(line.custom_id not in done for line in lines), 0]
        on_answer(counted[0], len(lines))
        if counted[0] == len(lines):
            return 0
        pool = Pool(engine, limits=_UNBOUNDED)
        frontend = Frontend(name, pool, Metrics(name), HttpOptions())
        try:
            await pool.start()
            frontend.model = await asyncio.to_thread(ServedModel, name, engine.model)
            await pool.ready()
            transport = httpx.ASGITransport(make_app(frontend))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=_NEVER) as client:

                def write(answer: Answered) -> None:
                    file.write(msgspec.json.encode(answer) + b"\n")
                    file.flush()
                    counted[0] += 1
                    counted[1] += answer.response.status_code != 200
                    on_answer(counted[0], len(lines))

                async with asyncio.TaskGroup() as group:
                    for _ in range(at_once):
                        group.create_task(_ask(left, client, write, pool))
                if pool.failure is not None and counted[0] < len(lines):
                    raise EngineFailed(pool.failure)
        finally:
            await pool.close()
    return counted[1]


async def _ask(left: Iterator[Line], client: httpx.AsyncClient, write: Callable[[Answered], None], pool: Pool) -> None:
    """One after the other, as long as there are any, and an engine: without one nothing is an answer."""
    for line in left:
        response = await client.post(line.url, json=line.body)
        if response.status_code >= 500 and pool.failure is not None:
            return
        answer = Answer(
            status_code=response.status_code,
            request_id=response.headers["x-request-id"],
            body=msgspec.Raw(response.content),
        )
        write(Answered(id=f"batch_req_{secrets.token_hex(12)}", custom_id=line.custom_id, response=answer))
