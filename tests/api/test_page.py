"""The live page over HTTP: its files, its feed, and what it can ask for."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_world import Server, events
from click.testing import CliRunner

from orcaserve.cli import main
from orcaserve.serve.page_files import PAGE_FILES
from orcaserve.serve.top import NotWatchable, glance, watch

NEEDLE = "xylophone"


@pytest.fixture(scope="module")
def shown(model_dir: Path) -> Iterator[Server]:
    """A server whose iterations last long enough to be seen."""
    with Server(model_dir, "--step-seconds", "0.004", "--blocks", "64") as server:
        yield server.ready()


@pytest.fixture
def slow(model_dir: Path) -> Iterator[Server]:
    """One whose responses take half a minute."""
    with Server(model_dir, "--step-seconds", "0.06") as server:
        yield server.ready()


class Feed:
    """One who looks on: the messages so far. Owner of the connection."""

    def __init__(self, server: Server, headers: dict[str, str] | None = None, **known: Any) -> None:
        self._client = server.client(headers=headers or {})
        self._stream = self._client.stream("GET", "/page/events", params=known)
        self.response = self._stream.__enter__()
        self._lines = self.response.iter_lines()
        self.messages: list[Any] = []

    def read(self) -> Any:
        for line in self._lines:
            if line.startswith("data: {"):
                self.messages.append(json.loads(line.removeprefix("data: ")))
                return self.messages[-1]
        raise EOFError

    def until(self, kind: str, count: int) -> list[Any]:
        """Reads until so many events of this kind have come; gives all events."""
        while sum(event["type"] == kind for event in self.events) < count:
            self.read()
        return self.events

    def more(self, kind: str, count: int) -> list[Any]:
        """Reads until so many more events of this kind have come."""
        return self.until(kind, count + sum(event["type"] == kind for event in self.events))

    @property
    def events(self) -> list[Any]:
        return [event for message in self.messages for event in message["events"]]

    def close(self) -> None:
        self._stream.__exit__(None, None, None)
        self._client.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def ask(client: httpx.Client, count: int, **fields: Any) -> None:
    """So many requests at once, answered."""

    def one(number: int) -> None:
        body = {"prompt": f"{NEEDLE} {number} " * (1 + number % 5), "max_tokens": 3 + 5 * (number % 4), "seed": number}
        client.post("/v1/completions", json={**body, "ignore_eos": True, **fields}).raise_for_status()

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))


@pytest.mark.parametrize("path", PAGE_FILES)
def test_files_need_no_key_and_nothing_from_elsewhere(model_dir: Path, shown: Server, path: str) -> None:
    with shown.client() as client:
        response = client.get(path)
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "://" not in response.text.replace("http://www.w3.org/2000/svg", "").replace("chrome://tracing", "")
    assert "style=" not in response.text and "onclick" not in response.text, "the policy would forbid it"
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert name not in response.text


TOLD = ("/page/events", "/page/compare", "/trace")


def test_with_keys_the_page_opens_but_only_the_operator_is_told_of_others(model_dir: Path) -> None:
    keys = {"api_keys": ["a=sesame", "b=barley", "b=rye"], "operator": "b"}
    with Server(model_dir, "--step-seconds", "0.01", http=keys) as server:
        server.ready()
        with server.client() as client:
            for path in PAGE_FILES:
                assert client.get(path).status_code == 200
            for path in (*TOLD, "/page"):
                assert client.get(path).status_code == 401, path
            assert client.post("/page/cancel", json={"id": 0}).status_code == 401
        one, operator = ({"Authorization": f"Bearer {key}"} for key in ("sesame", "rye"))
        with Feed(server, operator) as feed, server.client() as client:
            feed.read()
            assert feed.messages[0]["hello"]["has_keys"]
            assert "sesame" not in json.dumps(feed.messages[0]["hello"]["options"])
            for path in TOLD:
                refused = client.get(path, headers=one)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_the_operator"), path
            with pytest.raises(NotWatchable, match="operator"):
                glance(server.url, one)
            body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body, headers=one) as stream:
                arrived = next(event for event in feed.until("arrived", 1) if event["type"] == "arrived")
                assert arrived["tenant"] == "a"
                wish = {"id": arrived["id"]}
                assert client.post("/page/cancel", json=wish, headers=one).status_code == 403, "though it is theirs"
                assert client.post("/page/cancel", json=wish, headers=operator).status_code == 200
                assert events(stream)[-1]["error"]["code"] == "cancelled"


@pytest.mark.parametrize(("keys", "status"), [(["a=1", "a=2"], 200), (["1"], 200), (["a=1", "b=2"], 403)])
def test_an_operator_who_is_not_named_is_the_only_tenant(model_dir: Path, keys: list[str], status: int) -> None:
    with Server(model_dir, http={"api_keys": keys}).ready() as server, server.client() as client:
        assert client.get("/trace", headers={"Authorization": "Bearer 1"}).status_code == status


def test_the_feed_begins_with_everything_and_goes_on(shown: Server) -> None:
    with Feed(shown) as feed, shown.client() as client:
        hello = feed.read()["hello"]
        assert (hello["policy"], hello["num_blocks"], hello["max_batch_tokens"]) == ("default", 64, 256)
        assert {"name": "max-batch-tokens", "value": "256", "default": "512"} in hello["options"]
        ask(client, 6, user="alice")
        feed.more("ended", 6)
    numbers = [(message["begin"], message["next"], len(message["events"])) for message in feed.messages]
    for (begin, next, count), (after, _, _) in pairwise(numbers):
        assert begin + count == next == after, "nothing is missing"
    told = [event for message in feed.messages[1:] for event in message["events"]]
    assert {event["tenant"] for event in told if event["type"] == "ended"} == {"alice"}


def test_it_catches_up_after_a_reconnect(shown: Server) -> None:
    with Feed(shown) as feed, shown.client() as client:
        first = feed.read()
        feed.close()
        ask(client, 4)
        with Feed(shown, life=first["hello"]["life"], after=first["next"]) as again:
            assert again.read()["begin"] == first["next"]
            assert sum(event["type"] == "arrived" for event in again.until("ended", 4)) == 4
        with Feed(shown, life="another", after=first["next"]) as other:
            assert other.read()["begin"] < first["next"] or first["next"] == 0, "another life's numbers mean nothing"
        for nonsense in ("99999999", "-1", "x", "9" * 30):
            with Feed(shown, life=first["hello"]["life"], after=nonsense) as other:
                message = other.read()
                assert message["begin"] <= message["next"] < 99999999


def test_who_comes_late_knows_who_is_here(shown: Server) -> None:
    with shown.client() as client:
        body = {"prompt": "a b c", "max_tokens": 300, "ignore_eos": True, "stream": True, "user": "late"}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(8):
                next(lines)
            with Feed(shown) as feed:
                [present] = [one for one in feed.read()["present"] if one.get("tenant") == "late"]
                assert present["has_kv"] and present["generated"] >= 4 and present["blocks"]
                feed.read()  # it goes on


def test_many_see_the_same(shown: Server) -> None:
    with shown.client() as client:
        feeds = [Feed(shown) for _ in range(20)]
        for feed in feeds:
            feed.read()
        ask(client, 3)
        for feed in feeds:
            while sum(event["type"] == "ended" for message in feed.messages[1:] for event in message["events"]) < 3:
                feed.read()
            feed.close()
        begin = max(feed.messages[0]["next"] for feed in feeds)
        seen = [
            [event for message in feed.messages[1:] if message["begin"] >= begin for event in message["events"]]
            for feed in feeds
        ]
        shortest = min(map(len, seen))
        assert shortest > 5
        assert all(one[-shortest:] == seen[0][-shortest:] for one in seen)


def test_no_text_is_told(shown: Server) -> None:
    with Feed(shown) as feed, shown.client() as client:
        feed.read()
        ask(client, 3)
        feed.more("ended", 3)
        told = json.dumps(feed.messages) + client.get("/trace").text + client.get("/page/compare").text
    assert NEEDLE not in told


@pytest.mark.parametrize(
    ("body", "media_type", "status"),
    [
        ('{"id": 123456}', "application/json", 404),
        ('{"id": 0}', "text/plain", 400),  # which any web page may send without being asked
        ('{"id": "x"}', "application/json", 400),
        ("nonsense", "application/json", 400),
        ('{"id": 1, "more": "' + 2000 * "x" + '"}', "application/json", 413),
    ],
)
def test_what_cannot_be_cancelled(shown: Server, body: str, media_type: str, status: int) -> None:
    with shown.client() as client:
        answer = client.post("/page/cancel", content=body, headers={"content-type": media_type})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_cancelled_request_is_told_so(shown: Server) -> None:
    with Feed(shown) as feed, shown.client() as client:
        feed.read()
        answers: list[httpx.Response] = []
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "user": "me"}
        thread = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
        thread.start()
        while not any(event.get("tenant") == "me" for event in feed.events):
            feed.read()
        id = next(event["id"] for event in feed.events if event.get("tenant") == "me")
        assert client.post("/page/cancel", json={"id": id}).status_code == 200
        thread.join()
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (410, "cancelled")
        assert answers[0].headers["x-should-retry"] == "false"
        while not any(event["type"] == "ended" and event["id"] == id for event in feed.events):
            feed.read()


def test_the_trace_is_one(shown: Server) -> None:
    with shown.client() as client:
        ask(client, 8)
        trace = client.get("/trace").json()["traceEvents"]
    slices = defaultdict(list)
    for event in trace:
        assert event["ph"] in "XCMi"
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    assert {name for of in slices.values() for *_, name in of} >= {"queued", "prefill", "decode"}
    for of in slices.values():
        of.sort()
        for (_, end, _), (begin, _, _) in pairwise(of):
            assert begin >= end - 1, "slices of a request, and iterations, do not overlap"
    names = [event["args"]["name"] for event in trace if event["name"] == "thread_name"]
    assert "iterations" in names and any(name.startswith("#0") for name in names)


def test_the_same_requests_under_the_static_policy(model_dir: Path) -> None:
    with Server(model_dir, "--step-seconds", "0.003").ready() as server, server.client() as client:
        answer = client.get("/page/compare")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "too_little_recorded")
        assert client.get("/page/compare?policy=nonsense").status_code == 400
        ask(client, 20)
        found = client.get("/page/compare?policy=static").json()
    recorded, simulated = found["recorded"], found["simulated"]
    assert (recorded["policy"], simulated["policy"]) == ("default", "static")
    assert len(recorded["requests"]) == len(simulated["requests"]) == 20
    assert [one["id"] for one in recorded["requests"]] == [one["id"] for one in simulated["requests"]]
    # Every request computes as many new tokens in both, and a closed batch lets nobody in before all have ended.
    for run in (recorded, simulated):
        decodes = sum(len(event.get("decode", ())) for event in run["iterations"])
        assert decodes == sum(3 + 5 * (number % 4) - 1 for number in range(20))
    members: set[int] = set()
    ended = {one["id"]: one["ended"] for one in simulated["requests"]}
    for event in simulated["iterations"]:
        here = {*event.get("decode", ()), *event.get("idle", ()), *(chunk[0] for chunk in event.get("prefill", ()))}
        if here - members:
            assert all(ended[id] <= event["at"] for id in members - here)
            assert not here & members, "nobody joins a batch that runs"
            members = here
        assert here == members
    assert any(event.get("idle") for event in simulated["iterations"])
    assert 0 < found["error"] < 5 and found["fitted"] >= 20


def test_a_server_whose_page_is_open_ends_at_once(model_dir: Path) -> None:
    with Server(model_dir).ready() as server:
        feed = Feed(server)
        feed.read()
        began = time.monotonic()
        code, out, err = server.stop()
        assert (code, out.strip(), err) == (0, "False", "")
        assert time.monotonic() - began < 4, "less than a slow reader would be given"
        with pytest.raises((EOFError, httpx.HTTPError)):
            while True:
                feed.read()
        feed.close()


def test_top_shows_it_in_a_terminal(shown: Server) -> None:
    with shown.client() as client:
        body = {"prompt": "a b c", "max_tokens": 300, "ignore_eos": True, "stream": True, "user": "[red]x"}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(8):
                next(lines)
            result = CliRunner().invoke(main, ["top", "--once", "--url", shown.url])
    assert result.exit_code == 0, result.output
    assert "1 running  0 waiting" in result.output
    assert "[red]x" in result.output, "nothing of others is markup"
    assert "█" in result.output
    refused = CliRunner().invoke(main, ["top", "--once", "--url", "http://127.0.0.1:9"])
    assert refused.exit_code == 1 and "is a server running there?" in refused.output


def test_top_goes_on_drawing(slow: Server) -> None:
    """In a terminal: what happens after the first picture is seen, too."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "orcaserve", "top", "--url", slow.url]
    process = subprocess.Popen(
        argv,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        # Whoever is started in the background by a shell ignores this signal, and so do all below it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    seen = ""

    def until(word: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60  # it goes on drawing, whatever it draws
        while word not in seen:
            lines = dict.fromkeys(line.strip() for line in seen.splitlines())  # each once: all that it has drawn
            assert time.monotonic() < end and select.select([ours], [], [], 30)[0], "\n".join(lines)
            seen += os.read(ours, 1 << 16).decode(errors="replace")

    try:
        until("ready")
        # It is there until it has been seen: a picture may come later than a short request is done.
        body = {"prompt": "a", "max_tokens": 500, "ignore_eos": True, "user": "drawn", "stream": True}
        with slow.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            try:
                until("drawn")
            except AssertionError as error:
                raise AssertionError(f"{error}\nits stream: {response.read()[-2000:]!r}") from None
        process.send_signal(signal.SIGINT)
        until("\x1b[?1049l")  # the terminal as it was before
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Odd(BaseHTTPRequestHandler):
    """A proxy whose server is away at first, and is another one later."""

    def do_GET(self) -> None:
        assert isinstance(self.server, OddServer)
        self.server.asked += 1
        feed = b'data: {"begin": 0, "next": 0, "now": 0, "events": []}\n\n'
        status, body = [(502, b"<p>Bad gateway"), (200, feed), (200, b"<p>Hello")][self.server.asked - 1]
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class OddServer(HTTPServer):
    """asked: how often it has been."""

    asked = 0


@contextmanager
def odd(asked: int = 0) -> Iterator[tuple[str, OddServer]]:
    """Its URL. asked: how often it has been already."""
    server = OddServer(("127.0.0.1", 0), Odd)
    server.asked = asked
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_top_waits_for_a_server_that_is_away_and_not_for_one_that_is_none() -> None:
    with odd() as (url, server):
        with pytest.raises(NotWatchable, match="not as an OrcaServe"):
            watch(url, {})
        assert server.asked == 3
    with odd() as (url, _), pytest.raises(NotWatchable, match="502"):
        glance(url, {})


@pytest.mark.parametrize("command", [["top", "--once"], ["top"], ["chat"]])
@pytest.mark.parametrize(
    "url", ["localhost:8000", "127.0.0.1", "http://", "ftp://x", "http://127.0.0.1:99999999", "http://[::1"]
)
def test_no_server_is_looked_for_where_none_can_be(command: list[str], url: str) -> None:
    refused = CliRunner().invoke(main, [*command, "--url", url], input="Hello\n")
    assert refused.exit_code == 2 and "URL" in refused.output, refused.output


def test_a_key_may_have_any_letters(model_dir: Path) -> None:
    key = ["--api-key", "schlüssel"]
    with Server(model_dir, http={"api_keys": ["schlüssel"]}).ready() as server:
        for command in (["top", "--once"], ["chat"]):
            result = CliRunner().invoke(main, [*command, "--url", server.url, *key], input="\n")
            assert result.exit_code == 0, result.output
            refused = CliRunner().invoke(main, [*command, "--url", server.url, "--api-key", "ключ"], input="Hello\n")
            assert refused.exit_code == 1 and "API key" in refused.output, refused.output


def test_chat_tells_a_server_of_another_kind() -> None:
    with odd(2) as (url, _):
        refused = CliRunner().invoke(main, ["chat", "--url", url], input="Hello\n")
    assert refused.exit_code == 1 and "not as an OpenAI-compatible one" in refused.output
