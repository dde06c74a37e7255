"""What the rows about hostile clients share: a server to be hostile to, and bytes on its socket."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
from e2e.serving import Serving

from torture.rows import Setup

MODEL = "orcaserve-tiny"
_MOST_ANSWER = 1 << 22


class Target(NamedTuple):
    """url: of the server; model: what it calls its model; serving: the process, if it is ours; pid: its, if known."""

    url: str
    model: str
    serving: Serving | None
    pid: int | None


@contextlib.contextmanager
def target(setup: Setup, *arguments: str) -> Iterator[Target]:
    """The server that runs already, or one of our own with these arguments, which must end well."""
    if setup.url is not None:
        yield Target(setup.url.rstrip("/"), setup.model or "", None, setup.sizes.get("pid"))
        return
    with Serving(MODEL, "--threads", "1", "--kv-memory", "24MiB", *arguments) as serving:
        yield Target(serving.url, MODEL, serving, serving.process.pid)


class Answer(NamedTuple):
    """status: 0: the connection was closed without a word, -1: nothing came in time. seconds: until its end."""

    status: int
    text: bytes
    seconds: float


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


def head(path: str, length: int, headers: Sequence[str] = (), method: str = "POST") -> bytes:
    """Of a request whose connection ends with its answer."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, body: bytes, headers: Sequence[str] = ()) -> bytes:
    return head(path, len(body), headers) + body


def exchange(url: str, data: bytes, bound: float) -> Answer:
    """Sends a request on a connection of its own and reads until the server hangs up. bound: seconds of silence."""
    began = time.monotonic()
    answer = b""
    status = 0
    with socket.create_connection(address(url), timeout=bound) as connection:
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may refuse before all is said
                connection.sendall(data)
            while len(answer) < _MOST_ANSWER and (part := connection.recv(1 << 16)):
                answer += part
        except ConnectionResetError:
            pass
        except TimeoutError:
            status = -1
    if status == 0 and answer.startswith(b"HTTP/") and answer[9:12].isdigit():
        status = int(answer[9:12])
    return Answer(status, answer, time.monotonic() - began)


def is_quiet(url: str, seconds: float = 30) -> bool:
    """Whether nothing runs or waits, soon, by the server's own count. True where a server does not count."""
    until = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=30) as client:
        while time.monotonic() < until:
            lines = client.get("/metrics").text.splitlines()
            gauges = [
                line for line in lines if line.startswith(("vllm:num_requests_running", "vllm:num_requests_wait"))
            ]
            if all(float(line.rpartition(" ")[2]) == 0 for line in gauges):
                return True
            time.sleep(0.1)
    return False


def word_from(url: str, model: str) -> str:
    """A greedy answer, always the same: whether the server still serves."""
    body = {"model": model, "prompt": "Once there was", "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"])
