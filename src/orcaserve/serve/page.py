"""`Page`: the live page at `/`, its feed, and what it can ask for: cancelling, comparing, a trace.

All but the page's files is the operator's alone, since it tells of everybody's requests. The feed is one stream: who
looks on is given the same bytes, about twenty times a second, and nothing is made while nobody looks on.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orcaserve import __version__
from orcaserve.core.config import BudgetLine, EngineOptions
from orcaserve.core.policy import POLICIES, Policy, parse_policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.serve import errors
from orcaserve.serve.compare import TooLittle, compare
from orcaserve.serve.console import in_bytes
from orcaserve.serve.decode_body import decode
from orcaserve.serve.frontend import Frontend
from orcaserve.serve.page_files import PAGE_FILES
from orcaserve.serve.sse import EventStream
from orcaserve.serve.timeline import Present, Timeline, events_of
from orcaserve.serve.trace import chrome_trace

Answer = Response | EventStream

TICK_SECONDS = 0.05
BEAT_SECONDS = 5.0  # a sign of life while nothing happens
_MOST_BODY = 1024
_MOST_BEHIND = 4096  # events that one who is slow, or has been away, is still given; else it begins anew
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# What is no affair of who looks on: secrets, and where things lie. That they are set is said.
_PRIVATE = (
    "model",
    "api_keys",
    "secret_file",
    "ssl_certfile",
    "ssl_keyfile",
    "step_log",
    "swap_dir",
    "head_address",
    "otlp_traces_endpoint",
)
_SIZES = ("kv_memory", "memory", "swap_space", "max_body_bytes")
_LEFT_OUT = ("host", "port", "model", "served_model_name", "commands")


class Option(msgspec.Struct, frozen=True):
    """An option that is not at its default, both in words."""

    name: str
    value: str
    default: str


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine lives. life: of this server; numbers of events mean nothing in another one.

    now: the timeline's clock; unix_time: the same moment. swap: KV blocks that fit in the swap space.
    """

    life: str
    now: float
    unix_time: float
    state: str
    version: str
    model: str
    policy: str
    max_batch_size: int
    max_batch_tokens: int
    replicas: int
    has_keys: bool
    has_chat: bool
    options: tuple[Option, ...]
    architecture: str = ""
    dtype: str = ""
    profile: str = ""
    deterministic: bool = True
    threads: int = 0
    max_model_len: int = 0
    block_size: int = 0
    num_blocks: int = 0
    swap: int = 0
    budget: tuple[BudgetLine, ...] = ()


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the feed sends: events up to `next`. hello, present: what a page begins with, after the events.

    begin: the first event's number. One who does not have all before it has missed something.
    """

    begin: int
    next: int
    now: float
    events: msgspec.Raw
    hello: Hello | None = None
    present: list[Present] | None = None


class Cancellation(msgspec.Struct, frozen=True):
    """id: the request's number, as the feed has it."""

    id: int


class Page:
    """Owner of who looks on. Called from the event loop."""

    def __init__(
        self, frontend: Frontend, timeline: Timeline, engine: EngineOptions, options: tuple[Option, ...] = ()
    ) -> None:
        self._frontend = frontend
        self._timeline = timeline
        self._engine = engine
        self._options = options
        self._life = secrets.token_hex(8)
        self._watchers = 0
        self._ticking: asyncio.Task[None] | None = None
        self._tick = asyncio.Event()
        self._ticks = 0
        self._is_closed = False
        self._reading = asyncio.Lock()  # of all that is kept, one at a time: it takes a core for a moment

    @property
    def routes(self) -> list[Route]:
        own = [Route(path, self._file, methods=["GET"]) for path in PAGE_FILES]
        return [
            *own,
            Route("/page/events", self._for_operator(self._events), methods=["GET"]),
            Route("/page/cancel", self._for_operator(self._cancel), methods=["POST"]),
            Route("/page/compare", self._for_operator(self._compare), methods=["GET"]),
            Route("/trace", self._for_operator(self._trace), methods=["GET"]),
        ]

    def close(self) -> None:
        """Ends the feed for everybody."""
        self._is_closed = True
        self._wake()

    # -- the endpoints -------------------------------------------------------------------------------------------

    def _for_operator(self, endpoint: Callable[[Request], Awaitable[Answer]]) -> Callable[[Request], Awaitable[Answer]]:
        async def guarded(request: Request) -> Answer:
            if not self._frontend.options.may_watch(request.state.tenant):
                raise errors.not_the_operator()
            return await endpoint(request)

        return guarded

    async def _file(self, request: Request) -> Response:
        content, media_type = PAGE_FILES[request.url.path]
        return Response(content, headers=_HEADERS, media_type=media_type)

    async def _events(self, request: Request) -> EventStream:
        """?life=…&after=N: goes on after what a page of this life has seen, if that is still there."""
        after = request.query_params.get("after", "")
        goes_on = request.query_params.get("life") == self._life and after.isdecimal()
        return EventStream(self._follow(int(after[:18]) if goes_on else None))

    async def _cancel(self, request: Request) -> Response:
        # A web page from elsewhere could send a form's media types without asking, but not this one.
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise errors.invalid("The body has to be application/json.", "content-type")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BODY:
                raise errors.body_too_large(_MOST_BODY)
        wish = decode(body, Cancellation, self._frontend.unknown_fields)
        if not self._frontend.pool.cancel(wish.id):
            raise errors.no_such_request(wish.id)
        return Response(b"{}", media_type="application/json")

    async def _compare(self, request: Request) -> Response:
        info = self._frontend.info
        name = request.query_params.get("policy", "static")
        if name not in POLICIES:
            raise errors.invalid(f"There is no such policy; there are {', '.join(POLICIES)}.", "policy")
        if info is None:
            raise errors.unavailable("loading", None)
        if self._reading.locked():
            raise errors.busy_comparing()
        ours, other = self._config(parse_policy(self._engine.policy)), self._config(POLICIES[name])
        async with self._reading:
            lines = self._timeline.lines()
            try:
                body = await asyncio.to_thread(lambda: msgspec.json.encode(compare(events_of(lines), ours, other)))
            except TooLittle:
                raise errors.nothing_to_compare() from None
        return Response(body, media_type="application/json")

    async def _trace(self, request: Request) -> Response:
        async with self._reading:
            lines = self._timeline.lines()
            body = await asyncio.to_thread(lambda: chrome_trace(events_of(lines), self._frontend.model_name))
        name = f"orcaserve-{int(time.time())}.json"
        headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
        return Response(body, headers=headers, media_type="application/json")

    def _config(self, policy: Policy) -> SchedulerConfig:
        info = self._frontend.info
        blocks = info.num_blocks if info is not None else 1
        size = self._engine.max_batch_size
        return SchedulerConfig(
            policy=policy,
            max_batch_size=size,
            max_batch_tokens=max(self._engine.max_batch_tokens, size),
            num_blocks=blocks // len(self._frontend.pool.replicas),
            block_size=self._engine.block_size,
        )

    # -- the feed ------------------------------------------------------------------------------------------------

    async def _follow(self, after: int | None) -> AsyncGenerator[bytes]:
        """What one who looks on is sent. after: the number of the first event that it lacks; None: it knows nothing."""
        timeline = self._timeline
        self._comes()
        try:
            said: object = ()  # what the last hello was about
            at = after
            while not self._is_closed:
                tick, about = self._ticks, (self._frontend.info, self._frontend.state)
                if at is None or not max(timeline.first, timeline.next - _MOST_BEHIND) <= at <= timeline.next:
                    at, said = timeline.tail(), ()  # it begins anew
                message = self._message(at, None if about == said else self._hello())
                at, said = timeline.next, about
                yield message
                if tick == self._ticks:
                    await self._tick.wait()
        finally:
            self._goes()

    def _message(self, begin: int, hello: Hello | None) -> bytes:
        timeline = self._timeline
        events = msgspec.Raw(timeline.since(begin))
        present = None if hello is None else timeline.present
        return msgspec.json.encode(Message(begin, timeline.next, timeline.now, events, hello, present))

    def _hello(self) -> Hello:
        frontend, engine = self._frontend, self._engine
        info, model = frontend.info, frontend.model
        known: dict[str, Any] = {}
        if info is not None:
            names = ("architecture", "dtype", "profile", "deterministic", "threads", "max_model_len", "block_size")
            known = {name: getattr(info, name) for name in (*names, "num_blocks", "budget")}
            known["swap"] = 0 if info.swap is None else info.swap.num_slots
        return Hello(
            life=self._life,
            now=self._timeline.now,
            unix_time=time.time(),
            state=frontend.state,
            version=__version__,
            model=frontend.model_name,
            policy=engine.policy,
            max_batch_size=engine.max_batch_size,
            max_batch_tokens=max(engine.max_batch_tokens, engine.max_batch_size),
            replicas=len(frontend.pool.replicas),
            has_keys=bool(frontend.options.api_keys),
            has_chat=model is not None and model.tokenizer.chat_template is not None,
            options=self._options,
            **known,
        )

    def _comes(self) -> None:
        self._watchers += 1
        if self._watchers == 1:
            self._frontend.pool.watch(True)
            self._ticking = asyncio.create_task(self._keep_ticking())

    def _goes(self) -> None:
        self._watchers -= 1
        if self._watchers == 0:
            if self._ticking is not None:
                self._ticking.cancel()
            self._frontend.pool.watch(False)
            self._timeline.forget_reasons()

    async def _keep_ticking(self) -> None:
        """One clock for all, so that they ask for the same piece of the timeline, which is then made once."""
        beat = time.monotonic()
        seen: object = ()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            state = self._timeline.next, self._frontend.info, self._frontend.state
            if state != seen or time.monotonic() - beat > BEAT_SECONDS:
                seen, beat = state, time.monotonic()
                self._wake()

    def _wake(self) -> None:
        self._ticks += 1
        self._tick.set()
        self._tick = asyncio.Event()


def changed_options(*groups: msgspec.Struct) -> tuple[Option, ...]:
    """The options that are not at their defaults, without secrets and places."""
    changed = []
    for group in groups:
        for field in msgspec.structs.fields(group):
            value = getattr(group, field.name)
            if field.name not in _LEFT_OUT and value != field.default and field.default is not msgspec.NODEFAULT:
                shown = in_bytes(value) if field.name in _SIZES and value else _in_words(value)
                shown = "set" if field.name in _PRIVATE else shown
                changed.append(Option(field.name.replace("_", "-"), shown, _in_words(field.default)))
    return tuple(changed)


def _in_words(value: object) -> str:
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
