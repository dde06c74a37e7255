"""`chrome_trace`: a timeline in the trace format that Perfetto (ui.perfetto.dev) and chrome://tracing read.

The format is Google's "Trace Event Format": complete events (X) with a begin and a duration in microseconds, counters
(C), and names of processes and threads (M). An engine is a process, its iterations and each request are threads of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from orcaserve.serve.timeline import Arrived, Ended, Event, Iterated

_ITERATIONS = 0  # the thread that has them; requests have 1 + their number


def chrome_trace(events: Sequence[Event], model: str) -> bytes:
    """JSON. events: a timeline's; times count from its beginning."""
    lanes = _Lanes()
    for event in events:
        match event:
            case Arrived():
                lanes.arrived(event)
            case Iterated():
                lanes.iterated(event)
            case Ended():
                lanes.ended(event)
    return msgspec.json.encode(
        {
            "traceEvents": lanes.finish(),
            "displayTimeUnit": "ms",
            "otherData": {"model": model, "from": "OrcaServe"},
        }
    )


class _Lanes:
    """Owner of the lines so far, and of every request's open slice: equal iterations in a row become one."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self._engines: dict[int, int] = {}  # number of iterations
        self._engine_of: dict[int, int] = {}
        self._names: dict[int, str] = {}
        self._open: dict[int, tuple[str, float, float, dict[str, Any]]] = {}  # kind, begin, end, arguments
        self._since: dict[int, float] = {}  # when who waits began to
        self._back: dict[int, float] = {}  # when an engine's latest iteration came back
        self._latest = 0.0

    def arrived(self, event: Arrived) -> None:
        tenant = f" {event.tenant}" if event.tenant else ""
        self._names[event.id] = f"#{event.id}{tenant}, {event.prompt} + {event.max_tokens} tokens at most"
        self._since[event.id] = event.at

    def iterated(self, event: Iterated) -> None:
        # What arrives late is not taken for what lasted long.
        begin = max(event.at - event.seconds, self._back.get(event.engine, 0.0))
        self._back[event.engine] = self._latest = event.at
        number = self._engines[event.engine] = self._engines.get(event.engine, 0) + 1
        rows = len(event.decode) + len(event.prefill) + len(event.again) + len(event.idle)
        arguments = {
            "tokens": event.tokens,
            "decode": len(event.decode),
            "prefill": len(event.prefill),
            "again": len(event.again),
            "idle": len(event.idle),
            "number": number,
        }
        self._slice(event.engine, _ITERATIONS, f"{rows} rows", begin, event.at, arguments)
        for name, values in (
            ("requests", {"running": event.running, "waiting": event.waiting}),
            ("KV blocks held", {"blocks": event.held}),
            ("tokens", {"computed": event.tokens}),
        ):
            line = {"ph": "C", "pid": event.engine, "name": name, "ts": _us(event.at), "args": values}
            self._lines.append(line)
        for id in event.preempted:
            self._close(id)
            self._since[id] = begin
            self._names.setdefault(id, f"#{id}")
            place = {"pid": event.engine, "tid": 1 + id, "ts": _us(begin)}
            self._lines.append({"ph": "i", "s": "t", "name": "preempted", **place})
        cached = dict(event.cached)
        for kind, chunks in (("prefill", event.prefill), ("again", event.again)):
            for id, start, count in chunks:
                spared = {"cached": cached[id]} if id in cached else {}
                self._row(event, id, kind, begin, {"from": start, "tokens": count, **spared})
        for kind, ids in (("decode", event.decode), ("idle", event.idle)):
            for id in ids:
                self._row(event, id, kind, begin, {"tokens": 1})

    def ended(self, event: Ended) -> None:
        self._close(event.id)
        self._names.setdefault(event.id, f"#{event.id} {event.tenant}".rstrip())
        if event.id in self._since:
            self._slice(self._engine_of.get(event.id, 0), 1 + event.id, "queued", self._since.pop(event.id), event.at)
        place = {"pid": self._engine_of.get(event.id, 0), "tid": 1 + event.id, "ts": _us(event.at)}
        what = {"generated": event.generated, "cached": event.cached, "name": event.name}
        self._lines.append({"ph": "i", "s": "t", "name": event.how, "args": what, **place})

    def finish(self) -> list[dict[str, Any]]:
        for id in list(self._open):
            self._close(id)
        for id, since in self._since.items():
            self._slice(self._engine_of.get(id, 0), 1 + id, "queued", since, max(since, self._latest))
        names: list[dict[str, Any]] = []
        for engine in self._engines or {0: 0}:
            names.append({"ph": "M", "pid": engine, "name": "process_name", "args": {"name": f"engine {engine}"}})
            names.append(_thread(engine, _ITERATIONS, "iterations"))
        names += [_thread(self._engine_of.get(id, 0), 1 + id, name) for id, name in self._names.items()]
        return names + self._lines

    def _row(self, event: Iterated, id: int, kind: str, begin: float, arguments: dict[str, Any]) -> None:
        if self._engine_of.get(id) != event.engine:
            self._close(id)  # what is open was on the other engine
        self._engine_of[id] = event.engine
        self._names.setdefault(id, f"#{id}")
        if id in self._since:
            since = self._since.pop(id)
            begin = max(begin, since)
            self._slice(event.engine, 1 + id, "queued", since, begin)
        known = self._open.get(id)
        if known is not None and known[0] == kind and kind in ("decode", "idle") and begin - known[2] < event.seconds:
            known[3]["tokens"] += 1
            self._open[id] = (kind, known[1], event.at, known[3])
            return
        self._close(id)
        self._open[id] = (kind, begin, event.at, arguments)

    def _close(self, id: int) -> None:
        if (slice := self._open.pop(id, None)) is not None:
            kind, begin, end, arguments = slice
            self._slice(self._engine_of[id], 1 + id, kind, begin, end, arguments)

    def _slice(
        self, engine: int, thread: int, name: str, begin: float, end: float, arguments: dict[str, Any] | None = None
    ) -> None:
        begin = max(0.0, begin)
        line: dict[str, Any] = {"ph": "X", "pid": engine, "tid": thread, "name": name, "ts": _us(begin)}
        self._lines.append({**line, "dur": _us(max(0.0, end - begin)), "args": arguments or {}})


def _thread(engine: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": engine, "tid": thread, "name": "thread_name", "args": {"name": name}}


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 1)
