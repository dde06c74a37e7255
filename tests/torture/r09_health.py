"""R9: /health is asked again and again while requests are in flight that are made to keep the event loop busy."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx

from torture.hostile import Answer, Target, address, exchange, is_quiet, post, target, word_from
from torture.rows import Outcome, Row, Setup

HAS_NEIGHBOURS = True
ROWS = (
    Row("R9", "/health while a 27 MB prompt, a 5 000-deep schema and `(a+)+b` are in flight", "p99.9 ≤ 50 ms, no 5xx"),
)
_BOUND = 300  # seconds of silence after a hostile request
_FROZEN = 120  # seconds that a probe takes, or counts as if it had taken, to which there is no answer
_PAUSE = 0.005
_COMPLETIONS = "/v1/completions"
_CHAT = "/v1/chat/completions"


def attacks(model: str, megabytes: int) -> dict[str, bytes]:
    """Requests that are dear to read: by name, all bytes of each."""
    size = megabytes << 20
    ask = {"model": model, "max_tokens": 8}
    turns = [{"role": "user", "content": "Tell me a story."}]

    def filled(path: str, before: str, unit: str, after: str) -> bytes:
        named = f'{{"model":{json.dumps(model)},{before}'
        return post(path, f"{named}{unit * (size // len(unit.encode()))}{after}}}".encode())

    def deep(text: str, end: str) -> str:
        return text * 5_000 + "{}" + end * 5_000

    schema = deep('{"type":"object","properties":{"a":', "}}")
    pattern = {**ask, "prompt": "a" * 30, "guided_regex": "(a+)+b", "max_tokens": 64, "temperature": 0}
    nested = f'{{"model":{json.dumps(model)},"messages":{json.dumps(turns)},"response_format":'
    nested += f'{{"type":"json_schema","json_schema":{{"name":"a","schema":{schema}}}}}}}'
    return {
        "a prompt": filled(_COMPLETIONS, '"prompt":"', "Once, there was a whale. ", '"'),
        "a conversation": filled(_CHAT, '"messages":[{"role":"user","content":"', "Tell me, please. ", '"}]'),
        "a deep schema": post(_CHAT, nested.encode()),
        "a deep schema as text": post(_CHAT, json.dumps({**ask, "messages": turns, "guided_json": schema}).encode()),
        "(a+)+b": post(_COMPLETIONS, json.dumps(pattern).encode()),
        "(a|a)*b": post(_COMPLETIONS, json.dumps({**pattern, "guided_regex": "((a|a)*)*b"}).encode()),
        "a long repetition": post(
            _COMPLETIONS, json.dumps({**pattern, "guided_regex": "((a{1,999}){1,999}){1,999}"}).encode()
        ),
        "a prompt of escapes": filled(_COMPLETIONS, '"prompt":"', "\\u4e16", '"'),
        "token ids": filled(_COMPLETIONS, '"prompt":[', "50,", "5]"),
        "lists": filled(_COMPLETIONS, '"prompt":[', "[],", "[]]"),
        "texts": filled(_COMPLETIONS, '"prompt":[', '"x",', '"x"]'),
        "messages": filled(_CHAT, '"messages":[', '{"role":"user"},', '{"role":"user"}]'),
        "fractions": filled(_CHAT, '"messages":[],"chat_template_kwargs":{"a":[', "1.2345678901234567e-301,", "1]}"),
        "blanks": filled(_COMPLETIONS, '"prompt":"x"', " ", ""),
        "unknown fields": filled(_COMPLETIONS, '"prompt":"x",', '"y":0,', '"z":0'),
        "a wide schema": filled(_CHAT, '"messages":[],"response_format":{"a":[', '"x",', '"x"]}'),
        "a schema of one text": filled(
            _COMPLETIONS, '"prompt":"x","guided_json":{"type":"string","const":"', "whale ", '"}'
        ),
        "a regex of one text": filled(_COMPLETIONS, '"prompt":"x","guided_regex":"', "whale", '"'),
    }


class _Fire:
    """Sends the requests one after the other, in turn, from two threads. Owner of the threads."""

    def __init__(self, url: str, requests: dict[str, bytes], bound: float) -> None:
        self._url = url
        self._bound = bound
        self._requests = list(requests.items())
        self._next = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.under_way: dict[int, str] = {}  # by thread
        self.answers: list[tuple[str, Answer]] = []
        self._threads = [threading.Thread(target=self._shoot, args=(number,)) for number in range(2)]

    @property
    def has_been_round(self) -> bool:
        return len({name for name, _ in self.answers}) == len(self._requests)

    def _shoot(self, number: int) -> None:
        while not self._stop.is_set():
            with self._lock:
                name, data = self._requests[self._next % len(self._requests)]
                self._next += 1
            self.under_way[number] = name
            try:
                answer = exchange(self._url, data, self._bound)
            except OSError as error:  # nobody listens
                answer = Answer(-1, str(error).encode(), 0.0)
                time.sleep(_PAUSE)
            self.under_way.pop(number)
            self.answers.append((name, answer))

    def __enter__(self) -> _Fire:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Probe(NamedTuple):
    """Milliseconds of one /health, those of them in which it or we waited for a core, and what was in flight."""

    taken: float
    waited: float
    what: str


def _waits(pid: int | None) -> dict[str, int]:
    """Nanoseconds that each thread of a process has waited for a core in all."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat") if pid is not None else ():
        with contextlib.suppress(OSError):  # it has ended
            found[str(path)] = int(path.read_text().split()[1])
    return found


def probe(aim: Target, count: int, fire: _Fire | None = None) -> list[Probe]:
    """So many at least, and until all has been in flight; or until nobody is there to answer any more."""
    connection = http.client.HTTPConnection(*address(aim.url), timeout=_FROZEN)
    found = []
    while len(found) < count or (fire is not None and not fire.has_been_round):
        before = [_waits(aim.pid), _waits(os.getpid())]
        began = time.perf_counter()
        try:
            connection.request("GET", "/health")
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise AssertionError(f"/health answered {response.status}")
            seconds = time.perf_counter() - began
        except (OSError, http.client.HTTPException):
            connection.close()  # the next probe connects anew
            seconds = float(_FROZEN)
        after = [_waits(aim.pid), _waits(os.getpid())]
        # Of the threads the one that waited longest: they may have waited at the same time.
        longest = [
            max((now[name] - then.get(name, 0) for name in now), default=0)
            for then, now in zip(before, after, strict=True)
        ]
        what = " and ".join(sorted((fire.under_way if fire else {}).values()))
        found.append(Probe(1000 * seconds, min(1000 * seconds, sum(longest) / 1e6), what))
        if seconds == _FROZEN and not _listens(aim.url):
            break
        time.sleep(_PAUSE)
    connection.close()
    return sorted(found)


def _listens(url: str) -> bool:
    try:
        socket.create_connection(address(url), timeout=_FROZEN).close()
    except OSError:
        return False
    return True


def quantile(found: Sequence[float], share: float) -> float:
    return sorted(found)[min(len(found) - 1, int(share * len(found)))]


def torture(setup: Setup) -> Iterator[Outcome]:
    count = setup.size("probes", 100, 2_000)
    megabytes = setup.size("megabytes", 4, 27)
    bound = setup.size("bound", _BOUND, _BOUND)
    with target(setup) as aim:
        before = word_from(aim.url, aim.model)
        calm = [one.taken for one in probe(aim, count)]
        with _Fire(aim.url, attacks(aim.model, megabytes), bound) as fire:
            found = probe(aim, count, fire)
        cause = _changed(aim, before)
        is_well = not cause
    statuses = sorted({answer.status for _, answer in fire.answers})
    broken = [f"{name}: {answer.status}, {answer.text[-200:]!r}" for name, answer in fire.answers if _is_bad(answer)]
    worst = [f"{one.taken:.0f} ms, {one.waited:.0f} of them for a core: {one.what}" for one in reversed(found[-10:])]
    taken = [one.taken for one in found]
    high = quantile(taken, 0.999)
    figure = (
        f"{len(found)} probes under {len(fire.answers)} hostile requests of up to {megabytes} MB: "
        f"p50 {quantile(taken, 0.5):.1f} ms, p99.9 {high:.1f} ms, longest {taken[-1]:.1f} ms; "
        f"calm p50 {quantile(calm, 0.5):.1f} ms, p99.9 {quantile(calm, 0.999):.1f} ms; statuses {statuses}"
    )
    if high > 50 and aim.pid is not None:
        net = quantile([one.taken - one.waited for one in found], 0.999)
        cause = cause or f"without what its threads and ours waited for a core p99.9 is {net:.1f} ms"
    is_met = is_well and not broken and high <= 50 and taken[-1] < 1000 * _FROZEN
    yield Outcome(ROWS[0], figure, is_met, cause, tuple(broken[:10] or (worst if high > 50 else ())))


def _changed(aim: Target, before: str) -> str:
    """What is not as it was: it must serve as before, and nothing run on. Nothing: all is well."""
    if not _listens(aim.url):
        return "it has died"
    try:
        is_well = word_from(aim.url, aim.model) == before and is_quiet(aim.url)
    except httpx.HTTPError as error:
        return f"it did not serve any more: {type(error).__name__}"
    return "" if is_well else "it did not serve as before"


def _is_bad(answer: Answer) -> bool:
    return answer.status >= 500 or answer.status < 0
