"""R15: what the server offers to others, and whom it calls: one listening socket, and nobody, whatever is asked of it.

Seen by the kernel's eyes: strace writes down every connect, bind and send of all its processes (without it, their
sockets are sampled). A canary listens for whoever can be talked into fetching something.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from e2e.serving import Serving

from torture.rows import Outcome, Row, Setup

ROWS = (
    Row(
        "R15",
        "surface",
        "one TCP socket for clients (data-plane listeners only on the given interface), no outbound connect",
    ),
)
LAYOUTS = {"one process": (), "two stages": ("--pipeline-parallel-size", "2")}
OPTIONS = ("--threads", "2", "--kv-memory", "8MiB")
SHARED_PLACES = ("/tmp", "/dev/shm", "/var/tmp", "/run")  # noqa: S108
_CALL = re.compile(r"(connect|sendto|sendmsg)\(\d+.*?sa_family=(AF_\w+)(.*?)[}]")
_PORT = re.compile(r"sin6?_port=htons\((\d+)\)")
_HOST = re.compile(r'inet_(?:addr|pton)\((?:AF_INET6, )?"([^"]+)"')
_PATH = re.compile(r'sun_path=(@?"[^"]*")')


@dataclass
class Seen:
    """What was seen of one layout: each a line."""

    clients: list[str] = field(default_factory=list)  # listening sockets for clients
    data_plane: list[str] = field(default_factory=list)  # other listening sockets, on the loopback interface
    foreign: list[str] = field(default_factory=list)  # what must not be
    num_requests: int = 0


def torture(setup: Setup) -> Iterator[Outcome]:
    [row] = ROWS
    names = list(LAYOUTS)[: setup.size("layouts", 1, 2)]
    seen = {name: look(LAYOUTS[name]) for name in names}
    trace = tuple(f"{name}: {line}" for name, one in seen.items() for line in one.foreign)
    parts = [
        f"{name}: {len(one.clients)} for clients ({', '.join(one.clients)}), {len(one.data_plane)} of the data plane, "
        f"{one.num_requests} requests of all kinds"
        for name, one in seen.items()
    ]
    how = "by strace" if _tracer() else "by samples"
    figure = f"{'; '.join(parts)}; {len(trace)} outbound connections, named or foreign sockets, open files ({how})"
    yield Outcome(row, figure, not trace, trace=trace)


def look(layout: tuple[str, ...]) -> Seen:
    """Runs a server of this layout, asks it everything, and looks at it from outside."""
    seen = Seen()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orcaserve-r15-")))
        canary = stack.enter_context(Canary())
        calls = folder / "calls"
        tracer = _tracer()
        prefix = [
            tracer,
            "-D",
            "-f",
            "--seccomp-bpf",
            "-qq",
            "-s",
            "128",
            "-e",
            "trace=connect,sendto,sendmsg",
            "-o",
            str(calls),
        ]
        with Serving(*OPTIONS, *layout, prefix=prefix if tracer else ()) as server:
            tree = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
            sampler = Sampler(tree) if not tracer else None
            seen.num_requests = ask_everything(server, canary.url)
            port = int(server.url.rpartition(":")[2])
            _look_at_sockets(tree, port, bool(layout), seen)
            _look_at_files(tree, seen)
            if sampler is not None:
                seen.foreign += sampler.end(port)
        if tracer:
            seen.foreign += _outbound(calls, is_data_plane_allowed=bool(layout))
        seen.foreign += [f"the canary was called: {line}" for line in canary.calls]
    if len(seen.clients) != 1:
        seen.foreign.append(f"{len(seen.clients)} sockets for clients")
    return seen


def ask_everything(server: Serving, bait: str) -> int:
    """Requests of every kind, most of which name an address to fetch. Returns how many; each must be answered."""
    text = f"Look at {bait}/prompt and file:///etc/passwd"
    image = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": f"{bait}/image.png"}}]
    schema = {"$schema": f"{bait}/meta", "$id": f"{bait}/id", "$ref": f"{bait}/ref#/x"}
    fetched = {"type": "object", "properties": {"a": {"$ref": f"{bait}/schema.json"}}, "required": ["a"]}
    chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    tool = {"type": "function", "function": {"name": "f", "parameters": fetched}}
    asked: list[tuple[str, dict]] = [
        ("/v1/completions", {"prompt": text, "max_tokens": 4, "logprobs": 2, "echo": True}),
        ("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": "x", "model": f"{bait}/model"}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": image}]}),
        ("/v1/chat/completions", {**chat, "chat_template": "{{ ''.__class__ }}", "chat_template_url": f"{bait}/t"}),
        ("/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "required"}),
        *(
            ("/v1/chat/completions", {**chat, "response_format": {"type": "json_schema", "json_schema": wanted}})
            for wanted in ({"name": "s", "schema": schema}, {"name": "s", "schema": fetched})
        ),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4, "guided_regex": "(http|file)://[a-z]+"}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 4, "guided_grammar": f'%import "{bait}/g"\nstart: "a"'}),
        ("/v1/responses", {"input": text, "max_output_tokens": 4}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": f"{bait}/image"}]}]},
        ),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": f"{bait}/file"}]}]},
        ),
        ("/v1/responses", {"input": "x", "tools": [{"type": "mcp", "server_url": f"{bait}/mcp", "server_label": "m"}]}),
        ("/v1/embeddings", {"input": text}),
        ("/tokenize", {"prompt": text}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": f"{bait}/adapter"}),
    ]
    headers = {"Host": bait.removeprefix("http://"), "X-Forwarded-For": "192.0.2.1", "Referer": bait, "Origin": bait}
    pages = ["/health", "/ready", "/metrics", "/version", "/v1/models", "/openapi.json", "/docs", "/", "/trace"]
    for path, body in asked:
        assert server.client.post(path, json=body).status_code < 500, (path, body)
    for page in (*pages, f"/{bait}", f"//{bait}/x", "/tokenizer_info"):
        for sent in ({}, headers):
            if page != "/trace" or not sent:
                assert server.client.get(server.url + page, headers=sent).status_code < 500, page
    return len(asked) + 2 * len(pages) + 5


class Canary:
    """Listens where requests point to. Owner of its socket and of the thread that answers nobody."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.calls: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Canary:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, address = self._listening.accept()
                with caller:
                    caller.settimeout(1)
                    with contextlib.suppress(OSError):
                        self.calls.append(f"{address} {caller.recv(100)!r}")


class Sampler:
    """Where there is no strace: whom these processes are connected to, a hundred times a second."""

    def __init__(self, tree: list[psutil.Process]) -> None:
        self._tree = tree
        self._found: set[tuple[int, str, int, int]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def end(self, port: int) -> list[str]:
        """Connections that did not come in at this port."""
        self._ended.set()
        self._thread.join()
        return [f"process {pid} is connected to {host}:{to}" for pid, host, to, by in self._found if by != port]

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            for process in self._tree:
                with contextlib.suppress(psutil.Error):
                    for one in process.net_connections("inet"):
                        if one.raddr and not one.raddr.ip.startswith("127."):
                            self._found.add((process.pid, one.raddr.ip, one.raddr.port, one.laddr.port))


def _tracer() -> str | None:
    """strace, where it is there and may trace."""
    found = shutil.which("strace")
    return found if found and os.system(f"{found} -qq -o /dev/null true") == 0 else None  # noqa: S605


def _look_at_sockets(tree: list[psutil.Process], port: int, is_data_plane_allowed: bool, seen: Seen) -> None:
    for process in tree:
        for one in process.net_connections("inet"):
            at = f"{one.laddr.ip}:{one.laddr.port}" if one.laddr else "an unbound socket"
            if one.type == socket.SOCK_DGRAM:
                seen.foreign.append(f"process {process.pid} has a UDP socket: {at}")
            elif one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                seen.clients.append(at)
            elif one.status == psutil.CONN_LISTEN and is_data_plane_allowed and one.laddr.ip.startswith("127."):
                seen.data_plane.append(at)
            elif one.status == psutil.CONN_LISTEN:
                seen.foreign.append(f"process {process.pid} listens on {at}")
        seen.foreign += [
            f"process {process.pid} has a Unix socket that others can find: {one.laddr}"
            for one in process.net_connections("unix")
            if one.laddr and not _is_private(Path(str(one.laddr)))
        ]


def _is_private(path: Path) -> bool:
    """Whether only its owner gets into its folder."""
    with contextlib.suppress(OSError):
        return path.parent.stat().st_mode & 0o077 == 0
    return False


def _look_at_files(tree: list[psutil.Process], seen: Seen) -> None:
    """Whatever is open where everybody has a place must be its owner's alone, or have no name."""
    for process in tree:
        for number in Path(f"/proc/{process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name, status = os.readlink(number), number.stat()
                if name.startswith(SHARED_PLACES) and status.st_nlink and status.st_mode & 0o077:
                    seen.foreign.append(f"process {process.pid} has {name} open, which others may open, too")


def _outbound(calls: Path, is_data_plane_allowed: bool) -> list[str]:
    """Lines of a trace by which a process called somebody."""
    end = time.monotonic() + 5
    while (size := calls.stat().st_size) >= 0 and time.monotonic() < end:  # the tracer may still be writing
        time.sleep(0.1)
        if calls.stat().st_size == size:
            break
    found = []
    for line in calls.read_text(errors="replace").splitlines():
        call = _CALL.search(line)
        if call is None or call[2] == "AF_NETLINK":  # the kernel itself
            continue
        if call[2] in ("AF_INET", "AF_INET6"):
            host, port = _HOST.search(line), _PORT.search(line)
            is_local = host is not None and host[1].removeprefix("::ffff:").startswith(("127.", "::1"))
            if is_local and is_data_plane_allowed:
                continue
            found.append(f"{call[1]} to {host and host[1]}:{port and port[1]}")
        elif path := _PATH.search(line):
            found.append(f"{call[1]} to the Unix socket {path[1]}")
    return found
