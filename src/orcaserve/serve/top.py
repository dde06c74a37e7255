"""`Picture`: what the feed of the live page tells, drawn in a terminal; `watch` keeps it up to date."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress

import httpx
import msgspec
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orcaserve.core.config import BudgetLine
from orcaserve.serve.timeline import Arrived, Ended, Event, Iterated, Present

_RETRY_SECONDS = 1.0
_MOST_COLUMNS = 400
_WINDOW_SECONDS = 3.0
# What a cell of the timeline is: its sign, which says it without colour, and its style.
_SIGNS = {
    "decode": ("█", "blue"),
    "prefill": ("▓", "yellow"),
    "again": ("▒", "red"),
    "idle": ("░", "bright_black"),
    "queued": ("·", "bright_black"),
    "preempted": ("×", "magenta"),
}


class Hello(msgspec.Struct):
    """Of the page's, what is shown here."""

    life: str
    model: str
    policy: str
    max_batch_size: int
    max_batch_tokens: int
    num_blocks: int
    state: str
    budget: tuple[BudgetLine, ...] = ()


class Message(msgspec.Struct):
    begin: int
    next: int
    now: float
    events: list[Event]
    hello: Hello | None = None
    present: list[Present] | None = None


_decode = msgspec.json.Decoder(Message).decode


class Picture:
    """What the feed has told: who is here, and the last iterations. Rich draws it."""

    def __init__(self) -> None:
        self.hello: Hello | None = None
        self.next = 0
        self.trouble = "connecting"
        self._requests: dict[int, Present] = {}
        self._kinds: dict[int, str] = {}
        self._columns: deque[tuple[Iterated, dict[int, str]]] = deque(maxlen=_MOST_COLUMNS)

    def take(self, message: Message) -> None:
        if message.hello is not None:
            if self.hello is None or message.hello.life != self.hello.life or message.begin != self.next:
                self._requests.clear()
                self._kinds.clear()
                self._columns.clear()
            self.hello = message.hello
        for event in message.events:
            self._event(event)
        if message.present is not None:
            self._requests = {one.id: one for one in message.present}
            self._kinds = {one.id: self._kind(one) for one in message.present}
        self.next = message.next
        self.trouble = ""

    def _kind(self, one: Present) -> str:
        if one.began is None:
            return "queued"
        return self._kinds.get(one.id, "decode") if one.has_kv else "preempted"

    def _event(self, event: Event) -> None:
        match event:
            case Arrived():
                self._requests[event.id] = Present(
                    id=event.id,
                    prompt=event.prompt,
                    max_tokens=event.max_tokens,
                    arrived=event.at,
                    name=event.name,
                    tenant=event.tenant,
                )
                self._kinds[event.id] = "queued"
            case Ended():
                self._requests.pop(event.id, None)
                self._kinds.pop(event.id, None)
            case Iterated():
                self._iterated(event)

    def _iterated(self, event: Iterated) -> None:
        ran = dict.fromkeys(event.decode, "decode") | dict.fromkeys(event.idle, "idle")
        ran |= {id: "prefill" for id, _, _ in event.prefill} | {id: "again" for id, _, _ in event.again}
        for id in event.preempted:
            self._kinds[id] = "preempted"
        for id, kind in ran.items():
            self._kinds[id] = kind
            if (one := self._requests.get(id)) is not None:
                one.began = event.at if one.began is None else one.began
                one.generated += kind == "decode"
        for id in event.first:
            if (one := self._requests.get(id)) is not None and one.first is None:
                one.first, one.generated = event.at, max(1, one.generated)
        for id, spared in event.cached:
            if (one := self._requests.get(id)) is not None:
                one.cached = spared
        waits = {id: kind for id, kind in self._kinds.items() if kind in ("queued", "preempted")}
        self._columns.append((event, waits | ran))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lanes = max(3, (options.max_height - 8) // 2)
        yield self._head()
        yield self._timeline(options.max_width, lanes)
        yield Text("  ").join(Text.assemble((sign, style), f" {kind}") for kind, (sign, style) in _SIGNS.items())
        yield self._table(lanes)

    def _head(self) -> Group:
        hello = self.hello
        if hello is None:
            return Group(Text(self.trouble or "connecting", style="red"))
        now = self._columns[-1][0].at if self._columns else 0.0
        recent = [event for event, _ in self._columns if event.at > now - _WINDOW_SECONDS]
        last: dict[int, Iterated] = {event.engine: event for event, _ in self._columns}
        held = sum(event.held for event in last.values()) if self._requests else 0
        running = sum(kind not in ("queued", "preempted") for kind in self._kinds.values())
        why = next((event.why for event in last.values() if event.why), None)
        state = self.trouble or hello.state
        first = Text.assemble(
            (hello.model, "bold"),
            f"  {hello.policy}, at most {hello.max_batch_size} rows and {hello.max_batch_tokens} tokens  ",
            (state, "green" if state == "ready" else "red"),
        )
        generated = sum(event.generated for event in recent) / _WINDOW_SECONDS if self._requests else 0.0
        second = Text(
            f"{running} running  {len(self._kinds) - running} waiting{f' ({why})' if why and running else ''}  "
            f"KV {100 * held / max(1, hello.num_blocks):.0f} %  {generated:.0f} tokens/s"
        )
        return Group(first, second)

    def _timeline(self, width: int, most: int) -> Group:
        """A lane for each request that is here, an iteration in each column, the latest at the right."""
        room = max(8, width - 8)
        columns = [ran for _, ran in self._columns][-room:]
        shown = list(self._requests)[:most]
        lines = []
        for id in shown:
            line = Text(f"{f'#{id}':>7} ", no_wrap=True, style="dim")
            for ran in columns:
                sign, style = _SIGNS[ran[id]] if id in ran else (" ", "")
                line.append(sign, style)
            lines.append(line)
        lines += [Text("")] * (most - len(lines))
        return Group(*lines)

    def _table(self, most: int) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("request", "tenant", "state"):
            table.add_column(name, no_wrap=True, overflow="ellipsis")
        for name in ("prompt", "cached", "generated", "first token"):
            table.add_column(name, justify="right", no_wrap=True)
        for one in list(self._requests.values())[: most - 1]:
            first = "–" if one.first is None else f"{one.first - one.arrived:.2f} s"
            table.add_row(
                f"#{one.id}",
                Text(one.tenant[:24]),  # a text of others, in which nothing is markup
                self._kinds.get(one.id, ""),
                str(one.prompt),
                str(one.cached or "–"),
                f"{one.generated} of {one.max_tokens}",
                first,
            )
        return table


class NotWatchable(Exception):
    """The server refuses, or is no such server; the message is one clear line."""


def glance(url: str, headers: Mapping[str, bytes]) -> Picture:
    """What is there now. Raises NotWatchable."""
    picture = Picture()
    with _client(url, headers) as client:
        try:
            picture.take(next(_messages(client, picture)))
        except httpx.HTTPStatusError as error:
            raise NotWatchable(f"the server answers {error.response.status_code}; try again later") from None
        except (httpx.HTTPError, StopIteration):
            raise NotWatchable(f"no answer from {url}; is a server running there?") from None
    return picture


def watch(url: str, headers: Mapping[str, bytes]) -> None:
    """Until Ctrl-C; a server that is gone is waited for. Raises NotWatchable."""
    picture = Picture()
    with (
        _client(url, headers) as client,
        suppress(KeyboardInterrupt),
        # Drawn by this thread alone: another one would meet the picture while it changes.
        Live(picture, screen=True, auto_refresh=False) as live,
    ):
        while True:
            with suppress(httpx.HTTPError):
                for message in _messages(client, picture):
                    picture.take(message)
                    live.refresh()
            picture.trouble = "no answer; trying again"
            live.refresh()
            time.sleep(_RETRY_SECONDS)


def _client(url: str, headers: Mapping[str, bytes]) -> httpx.Client:
    return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10, read=15))


def _messages(client: httpx.Client, picture: Picture) -> Iterator[Message]:
    """Of one connection. A picture that knows something is told what it lacks.

    Raises NotWatchable for what stays so, httpx.HTTPError for what may pass: an error of a proxy does, too.
    """
    known = {} if picture.hello is None else {"life": picture.hello.life, "after": str(picture.next)}
    with client.stream("GET", "/page/events", params=known) as response:
        if response.status_code == 401:
            raise NotWatchable("the server wants an API key: give it with --api-key")
        if response.status_code == 403:
            raise NotWatchable("the server shows this to its operator alone: give a key of theirs with --api-key")
        if response.status_code >= 500:
            response.raise_for_status()
        if response.status_code != 200:
            raise NotWatchable(f"the server answers {response.status_code}: it has no live page")
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                try:
                    yield _decode(data)
                except msgspec.DecodeError:
                    raise NotWatchable("the server answers, but not as an OrcaServe whose page is read here") from None
