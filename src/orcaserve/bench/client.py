"""A streaming client of any OpenAI-compatible server: sends a work's requests when they are due, notes what came when.

While a stream runs, what arrives is only kept with its time; it is read when the stream, or for `run` the last one, has
ended. The client shares its cores with the server.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from orcaserve.bench.workloads import Item, Work

# How the tokens of a reply were counted: by the ids in its chunks; as one a chunk, and the server's usage agrees; by
# usage, which does not agree with what was seen in the chunks; as one a chunk without any usage to check it.
Counted = Literal["ids", "chunks", "usage", "guess"]
_HINTS = {
    400: "if a token id is out of range, give a lower --vocab",
    401: "bench serve takes --api-key; servers are compared without one",
    404: "if the model's name is wrong, give URL#MODEL",
    422: "its completions may not take token ids",
    429: "its queue is full; bench compare takes --concurrency NAME=16",
    503: "wait until the server is ready",
}


T = TypeVar("T")


class BenchError(Exception):
    """What is wrong and what to do about it, in one line."""


class Server(msgspec.Struct, frozen=True):
    """A running server. model: None until it has been asked. concurrency: requests in flight at most, if limited."""

    name: str
    url: str
    model: str | None = None
    version: str | None = None
    concurrency: int | None = None

    @property
    def address(self) -> str:
        return self.url


class Fault(NamedTuple):
    """What went wrong. kind: a few words that are the same for all of the kind; message: one line.

    retry_after: seconds after which the server says that one may ask again.
    """

    kind: str
    message: str
    retry_after: float | None = None


INTERRUPTED = Fault("interrupted", "the run was interrupted before the reply ended")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to one request, in seconds after its work began.

    due: when it arrived; `sent` is later only if the client's own limit held it back, or the client was busy.
    ended: when the reply ended, whatever it was; None if that is not known.
    token_times: one per token. max_tokens, prompt_tokens: what it asked for; seen_prompt_tokens: what the server says
    it read, cached_tokens: how many of them it already knew. retry_after: seconds, with an error of which the server
    says when to come again.
    """

    due: float
    sent: float
    token_times: tuple[float, ...] = ()
    max_tokens: int
    prompt_tokens: int
    seen_prompt_tokens: int | None = None
    cached_tokens: int = 0
    counted: Counted = "guess"
    error: str | None = None
    error_kind: str | None = None
    retry_after: float | None = None
    tenant: str | None = None
    ended: float | None = None

    @property
    def output_tokens(self) -> int:
        return len(self.token_times)

    @property
    def first(self) -> float:
        return self.token_times[0]

    @property
    def last(self) -> float:
        return self.token_times[-1]


class Reply(msgspec.Struct):
    """What has come of one request so far. Owner: `send`. Times are in seconds after the work began."""

    item: Item
    sent: float = 0.0
    arrived: list[tuple[float, bytes]] = []
    fault: Fault | None = None
    ended: float | None = None

    def record(self) -> Record:
        return msgspec.structs.replace(read(self.item, self.sent, self.arrived, self.fault), ended=self.ended)


def servers_from(texts: Sequence[str], limits: Sequence[str] = ()) -> tuple[Server, ...]:
    """Servers as they are written: NAME=URL or NAME=URL#MODEL, with or without /v1, and limits as NAME=16.

    ValueError says what is wrong.
    """
    servers: dict[str, Server] = {}
    for text in texts:
        name, _, url = text.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not url.startswith(("http://", "https://")):
            raise ValueError(f"{text!r} is not NAME=URL or NAME=URL#MODEL, as in ours=http://127.0.0.1:8000")
        if name in servers:
            raise ValueError(f"two servers are called {name!r}")
        server = server_from(name, url)
        if any((other.url, other.model) == (server.url, server.model) for other in servers.values()):
            raise ValueError(
                f"{name} is a server that is there already; it would know the prompts from its prefix cache"
            )
        servers[name] = server
    for text in limits:
        name, _, limit = text.partition("=")
        if name not in servers or not re.fullmatch("[1-9][0-9]{0,5}", limit):
            raise ValueError(f"{text!r} is not NAME=16 with the name of a server")
        servers[name] = msgspec.structs.replace(servers[name], concurrency=int(limit))
    return tuple(servers.values())


def server_from(name: str, text: str) -> Server:
    """A server at URL or URL#MODEL, with or without /v1. ValueError says what is wrong."""
    match = re.fullmatch(r"(https?://[^/#\s][^#\s]*?)(?:/v1)?/*(?:#(.+))?", text)
    try:
        parts = urlsplit(match[1] if match else "")
        is_url = parts.hostname is not None and parts.port != 0
    except ValueError:
        is_url = False
    if match is None or not is_url:
        raise ValueError(f"{text} is not a URL, as http://127.0.0.1:8000 is")
    return Server(name, match[1], match[2])


def in_loop(main: Coroutine[Any, Any, T]) -> T:
    """Runs it on the quickest event loop there is: what the client computes, it takes from the server."""
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.run(main)
    return uvloop.run(main)


async def usable(server: Server, warm_up: Work, api_key: str | None = None) -> Server:
    """`asked`, when it has done the warm-up, too. BenchError if it cannot."""
    server = await asked(server, api_key)
    replies = [Reply(item) for item in warm_up.items]
    await send(server, replies, api_key=api_key)
    for record in (reply.record() for reply in replies):
        if record.error or not record.token_times:
            raise BenchError(f"{server.name}: {record.error or 'it delivers no tokens'}")
    return server


async def asked(server: Server, api_key: str | None = None) -> Server:
    """The server with its model and version filled in. BenchError if nobody answers."""
    async with _client(api_key) as client:
        version = model = None
        try:
            if server.model is None:
                status, body = await _get(client, f"{server.url}/v1/models")
                if status != 200:
                    raise BenchError(f"{server.name}: {_refusal(status, body).message}")
                model = str(json.loads(body)["data"][0]["id"])
            status, body = await _get(client, f"{server.url}/version")
            if status == 200:
                version = str(json.loads(body)["version"])
        except (aiohttp.ClientError, TimeoutError) as error:
            raise BenchError(f"{server.name}: {_broken(error, server.url).message}") from None
        except (ValueError, LookupError, TypeError):
            if server.model is None and model is None:
                raise BenchError(
                    f"{server.name}: {server.url} lists no model at /v1/models; if it is an OpenAI-compatible server, "
                    f"name the model: {server.url}#MODEL"
                ) from None
    return msgspec.structs.replace(server, model=server.model or model, version=version)


async def _get(client: aiohttp.ClientSession, url: str) -> tuple[int, bytes]:
    async with client.get(url, allow_redirects=False, timeout=aiohttp.ClientTimeout(30)) as response:
        return response.status, await response.read()


async def run(server: Server, work: Work, on_reply: Callable[[], None] = lambda: None) -> list[Record]:
    """Sends the work's requests, each when it is due, never waiting for replies but at the server's own limit.

    A request that fails has a record with its error; the others go on.
    """
    replies = [Reply(item) for item in work.items]
    await send(server, replies, on_end=lambda _: on_reply())
    return [reply.record() for reply in replies]


async def send(
    server: Server,
    replies: Sequence[Reply],
    *,
    on_sent: Callable[[], None] = lambda: None,
    on_end: Callable[[Reply], None] = lambda _: None,
    api_key: str | None = None,
    silence: float = 600,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Sends requests, which stand in the order in which they are due, and fills the replies in.

    headers: further ones of every request.
    silence: seconds without a byte after which a reply has failed. If this is cancelled, the replies that are under way
    end with INTERRUPTED, and there are none for what has not been sent.
    """
    limit: AbstractAsyncContextManager[Any] = nullcontext()
    if server.concurrency is not None:
        limit = asyncio.Semaphore(server.concurrency)
    async with _client(api_key, silence, headers) as client, asyncio.TaskGroup() as tasks:
        start = time.perf_counter()

        async def one(reply: Reply) -> None:
            async with limit:
                reply.sent = time.perf_counter() - start
                on_sent()
                try:
                    reply.fault = await _stream(
                        client,
                        server,
                        reply.item,
                        lambda data: reply.arrived.append((time.perf_counter() - start, data)),
                    )
                except asyncio.CancelledError:
                    reply.fault = INTERRUPTED
                    on_end(reply)
                    raise
                reply.ended = time.perf_counter() - start
            on_end(reply)

        for reply in replies:
            # A loop's timer may be a fraction of a millisecond early, and nothing may be sent before it is due.
            while (wait := start + reply.item.at - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(reply))


async def _stream(
    client: aiohttp.ClientSession, server: Server, item: Item, take: Callable[[bytes], None]
) -> Fault | None:
    """Streams one reply into `take`; what went wrong, if something did."""
    body = {
        "model": server.model,
        "prompt": item.prompt_ids,
        "max_tokens": item.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if item.tenant is not None:
        body["user"] = item.tenant
    if item.priority:
        body["priority"] = item.priority
    url, content = f"{server.url}/v1/completions", msgspec.json.encode(body)
    try:
        async with client.post(url, data=content, allow_redirects=False) as response:
            if response.status != 200:
                refusal = _refusal(response.status, await response.read())
                return refusal._replace(retry_after=_seconds(response.headers.get("retry-after")))
            async for data in response.content.iter_any():
                take(data)
    except (aiohttp.ClientError, TimeoutError) as error:
        return _broken(error, server.url)
    return None


def read(item: Item, sent: float, arrived: Sequence[tuple[float, bytes]], fault: Fault | None = None) -> Record:
    """The record of a reply, of which these bytes came at these times, however they were cut into pieces.

    A server may hold back text that ends within a character, and may send several tokens in one chunk. `usage` says how
    many there were; if the chunks tell another number, their times are spread evenly over the tokens.
    """
    times: list[float] = []
    counted: Counted = "guess"
    usage: _Usage | None = None
    rest = b""
    for now, data in (*arrived, *((now, b"\n") for now, _ in arrived[-1:])):  # a last line may lack its end
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            try:
                chunk = _decode(line[5:])
            except msgspec.MsgspecError as problem:
                said = _one_line("the server sent an event that is no completion", str(problem))
                fault = fault or Fault("no completion", said)
                continue
            if chunk.error is not None:
                said = f"the server gave up after {len(times)} tokens: {_message(chunk.error)}"
                fault = fault or Fault("server gave up", _one_line(said, "look at its own log"))
            usage = chunk.usage or usage
            for choice in chunk.choices or ():
                if choice.token_ids is not None:
                    counted = "ids"
                    times += [now] * len(choice.token_ids)
                elif choice.text:
                    times.append(now)
    if usage is None:
        if not times and fault is None:
            fault = Fault("no token", "the stream ended without a token; look at the server's own log")
    elif usage.completion_tokens != len(times):
        counted = "usage"
        times = _spread(times or [arrived[-1][0]], usage.completion_tokens)
    elif counted == "guess":
        counted = "chunks"
    return Record(
        due=item.at,
        sent=round(sent, 6),
        token_times=tuple(round(time, 6) for time in times),
        max_tokens=item.max_tokens,
        prompt_tokens=len(item.prompt_ids),
        seen_prompt_tokens=None if usage is None else usage.prompt_tokens,
        cached_tokens=0 if usage is None else usage.cached_tokens,
        counted=counted,
        error=None if fault is None else fault.message,
        error_kind=None if fault is None else fault.kind,
        retry_after=None if fault is None else fault.retry_after,
        tenant=item.tenant,
    )


def _spread(times: list[float], count: int) -> list[float]:
    """`count` times evenly out of these, the first and the last among them."""
    return [times[i * (len(times) - 1) // max(1, count - 1)] for i in range(count)]


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int | None = None
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def _client(
    api_key: str | None = None, silence: float = 600, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    own = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key is not None:
        own["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        headers={**own, **(headers or {})},
        # Servers drop idle connections after some five seconds; a request must not meet one that is just being dropped.
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=silence),
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _refusal(status: int, body: bytes) -> Fault:
    try:
        message = _message(msgspec.json.decode(body))
    except msgspec.MsgspecError:
        message = body.decode(errors="replace")
    hint = _HINTS.get(status, "the server's own log may say more")
    return Fault(f"HTTP {status}", _one_line(f"HTTP {status}: {message}", hint))


def _seconds(retry_after: str | None) -> float | None:
    return float(retry_after) if retry_after is not None and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", retry_after) else None


def _message(error: Any) -> str:
    """The words in an error of any server's shape."""
    while isinstance(error, dict):
        error = next((error[key] for key in ("error", "message", "detail") if key in error), str(error))
    return str(error)


def _broken(error: aiohttp.ClientError | TimeoutError, url: str) -> Fault:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Fault("no connection", f"nobody answers at {url}; is the server running there?")
    if isinstance(error, TimeoutError):
        return Fault("silence", "it has stopped answering; is the server stuck?")
    return Fault("connection cut", _one_line(f"the server cut the connection ({error})", "look at its own log"))


def _one_line(message: str, hint: str) -> str:
    message = " ".join(message.split())
    return f"{message[:300]}{'…' * (len(message) > 300)} ({hint})"
