"""One request to any OpenAI-compatible server, streamed or not, and everything that came back of it.

A `Reply` is the same whichever way it came: text, ids, log-probabilities and finish of each choice. What no server may
do, a token after the finish or two finishes, is noted as a fault when it comes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec

# How a client behaves: it stays to the end, hangs up, or has its request cancelled by the server's operator.
Fate = Literal["stays", "leaves", "cancelled"]
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
_OF_A_POOL = 64  # connections
_DEADLINES = {"deadline_passed", "deadline_unreachable", "timeout"}


@dataclass(frozen=True)
class Ask:
    """A request. patience: pieces of a stream, or seconds, after which a client that does not stay acts.

    The seconds are those until the first piece: who waits for an answer in one piece, or in the queue, has no other.
    """

    number: int
    kind: str
    body: dict[str, Any]
    fate: Fate = "stays"
    patience: tuple[int, float] = (0, 0.0)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def has_deadline(self) -> bool:
        return "timeout" in self.body or "x-slo-ttft-ms" in self.headers

    def alone(self, *, stream: bool) -> Ask:
        """The same request of a client that stays and has all the time in the world."""
        body = {name: value for name, value in self.body.items() if name not in ("timeout", "stream_options")}
        return Ask(self.number, self.kind, body | {"stream": stream})


@dataclass
class Choice:
    """What has come of one choice. Owned by its Reply."""

    text: str = ""
    ids: list[int] | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: Any = None
    finish: str | None = None

    def difference(self, whole: Choice) -> str | None:
        """What keeps this from being how the other one begins, or from being it if this one has ended."""
        has_ended = self.finish is not None
        for name, mine, theirs in (
            ("ids", self.ids or [], whole.ids or []),
            ("log-probabilities", self.logprobs, whole.logprobs),
            ("text", self.text, whole.text),
        ):
            at = next((i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None)
            if at is None and (len(mine) > len(theirs) or (has_ended and len(mine) < len(theirs))):
                at = min(len(mine), len(theirs))
            if at is not None:
                return f"{name} from {at} on: {mine[at : at + 3]} instead of {theirs[at : at + 3]}"
        if has_ended and self.finish != whole.finish:
            return f"finish {self.finish} instead of {whole.finish}"
        if self.prompt_logprobs not in (None, whole.prompt_logprobs):
            return "the prompt's log-probabilities"
        return None


@dataclass
class Reply:
    """What has come of a request. Owned by the task that asks.

    error: the code of the error that ended it. is_whole: it came to its end, and was no error. is_done: [DONE] came, or
    it was no stream. broken: what the connection died of. faults: what no server may do.
    """

    status: int = 0
    error: str | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    is_whole: bool = False
    is_done: bool = False
    has_left: bool = False
    broken: str | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def num_pieces(self) -> int:
        return sum(len(choice.ids or choice.text) for choice in self.choices.values())

    def take(self, message: Mapping[str, Any]) -> None:
        """A whole body, or a chunk of a stream."""
        if "choices" not in message:
            error = message.get("error") or message.get("detail") or message
            self.error = str(error.get("code") or error.get("message") if isinstance(error, Mapping) else error)
            return
        self.usage = message.get("usage") or self.usage
        for told in message.get("choices", ()):
            index = told["index"]
            choice = self.choices.setdefault(index, Choice())
            said = told.get("message") or told.get("delta") or told
            text = said.get("content") or said.get("text") or ""
            entries = _entries(told.get("logprobs"))
            if choice.finish is not None and (text or entries or told.get("token_ids") or told.get("finish_reason")):
                self.faults.append(f"choice {index} goes on after its finish: {told}")
            choice.text += text
            choice.logprobs += entries
            if told.get("token_ids") is not None:
                choice.ids = (choice.ids or []) + told["token_ids"]
            choice.prompt_logprobs = told.get("prompt_logprobs") or choice.prompt_logprobs
            choice.finish = told.get("finish_reason") or choice.finish

    def differs(self, whole: Reply) -> str | None:
        """What of this reply is not as in the other, which came to its end; None if nothing is."""
        if set(self.choices) - set(whole.choices):
            return f"choices {sorted(self.choices)} instead of {sorted(whole.choices)}"
        if self.is_whole and set(self.choices) != set(whole.choices):
            return f"only the choices {sorted(self.choices)} of {sorted(whole.choices)}"
        for index, choice in sorted(self.choices.items()):
            if difference := choice.difference(whole.choices[index]):
                return f"choice {index}: {difference}"
        return None


def _entries(logprobs: Mapping[str, Any] | None) -> list[Any]:
    """One entry per token, in either of the APIs' shapes."""
    if not logprobs:
        return []
    if logprobs.get("content") is not None:
        return list(logprobs["content"])
    names = [name for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if logprobs.get(name)]
    return [list(entry) for entry in zip(*(logprobs[name] for name in names), strict=True)]


async def ask(client: httpx.AsyncClient, one: Ask, on_piece: Callable[[Reply], None] = lambda _: None) -> Reply:
    """Asks and reads, as long as the client has patience. Never raises: what went wrong is in the reply."""
    reply = Reply()
    leaves = one.fate == "leaves"
    try:
        async with asyncio.timeout(one.patience[1] if leaves else None) as patience:
            if not one.streams:
                response = await client.post(PATHS[one.kind], json=one.body, headers=one.headers)
                reply.status = response.status_code
                reply.take(msgspec.json.decode(response.content))
                reply.is_whole = reply.is_done = reply.status == 200 and reply.error is None
                return reply
            async with client.stream("POST", PATHS[one.kind], json=one.body, headers=one.headers) as response:
                reply.status = response.status_code
                if reply.status != 200:
                    reply.take(msgspec.json.decode(await response.aread()))
                    return reply
                if leaves:
                    patience.reschedule(None)
                reply.has_left = await _read(response, one, reply, on_piece)
    except TimeoutError:
        reply.has_left = True
    except (httpx.HTTPError, msgspec.MsgspecError) as error:
        reply.broken = f"{type(error).__name__}: {error}"
    return reply


async def _read(response: httpx.Response, one: Ask, reply: Reply, on_piece: Callable[[Reply], None]) -> bool:
    """Reads a stream; whether the client has left it before its end."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        if reply.is_done:
            reply.faults.append(f"after [DONE] came {line}")
        elif line == "data: [DONE]":
            reply.is_done = True
        else:
            reply.take(msgspec.json.decode(line[5:]))
            on_piece(reply)
            if one.fate == "leaves" and reply.num_pieces >= one.patience[0]:
                return True
    reply.is_whole = reply.error is None
    return False


def faults(one: Ask, reply: Reply) -> list[str]:
    """What is wrong with a reply by itself, whatever the tokens are."""
    found = list(reply.faults)
    if reply.has_left:
        return found
    if reply.broken is not None:
        return [*found, f"the connection broke: {reply.broken}"]
    if not reply.is_whole:
        expected = (_DEADLINES if one.has_deadline else set()) | ({"cancelled"} if one.fate == "cancelled" else set())
        return found if reply.error in expected else [*found, f"status {reply.status}, error {reply.error}"]
    wanted = one.body.get("n") or 1
    if sorted(reply.choices) != list(range(wanted)):
        found.append(f"choices {sorted(reply.choices)} instead of {wanted}")
    most = one.body.get("max_tokens")
    for index, choice in sorted(reply.choices.items()):
        if choice.finish not in ("stop", "length"):
            found.append(f"choice {index} finished by {choice.finish}")
        if choice.ids is None or most is None:
            continue
        if len(choice.ids) > most or (choice.finish == "length" and len(choice.ids) < most):
            found.append(f"choice {index} has {len(choice.ids)} of {most} tokens and finished by {choice.finish}")
    ids = [choice.ids for choice in reply.choices.values()]
    if reply.usage is not None and None not in ids:
        delivered = sum(map(len, filter(None, ids)))
        if reply.usage["completion_tokens"] != delivered:
            found.append(f"usage says {reply.usage['completion_tokens']} tokens, {delivered} were delivered")
    return found


def new_client(url: str, in_flight: int, silence: float = 600) -> httpx.AsyncClient:
    """silence: seconds without a word after which a connection counts as broken."""
    return httpx.AsyncClient(
        base_url=url, timeout=httpx.Timeout(silence), transport=_Spread(in_flight), trust_env=False
    )


class _Spread(httpx.AsyncBaseTransport):
    """Many connections in several pools, by turns.

    A pool looks at each of its connections for each request. With hundreds in one, a client that should ask a hundred
    times a second falls seconds behind, and then asks for all of that at once.
    """

    def __init__(self, in_flight: int) -> None:
        count = -(-in_flight // _OF_A_POOL)
        each = -(-in_flight // count)
        limits = httpx.Limits(max_connections=each, max_keepalive_connections=each, keepalive_expiry=2)
        tls = httpx.create_ssl_context(trust_env=False)
        self._pools = [httpx.AsyncHTTPTransport(verify=tls, limits=limits) for _ in range(count)]
        self._turns = itertools.cycle(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await next(self._turns).handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


async def ask_all(
    client: httpx.AsyncClient,
    asks: Sequence[Ask],
    in_flight: int,
    on_piece: Callable[[Reply], None] = lambda _: None,
) -> dict[int, Reply]:
    """All of them, so many at a time, by their numbers."""
    waiting = iter(asks)
    replies: dict[int, Reply] = {}

    async def one_after_another() -> None:
        for one in waiting:
            replies[one.number] = await ask(client, one, on_piece)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(in_flight):
            tasks.create_task(one_after_another())
    return replies
