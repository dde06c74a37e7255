"""`Host`: the ranks of one machine: those of this one, or those of another that has joined over a `Link`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.engine.silence import Silence
from orcaserve.executors.link import Link, LinkError, accept, interface_of, parse_address
from orcaserve.executors.messages import (
    FromHost,
    Gone,
    Here,
    Joined,
    MakeCache,
    Place,
    Run,
    Start,
    StoreAt,
    Tell,
    ToHost,
    Told,
    WhileServing,
)
from orcaserve.executors.workers import TICK_SECONDS, OnFrame, OnLost, Workers

LOOPBACK = "lo"
LOOK_SECONDS = 1.0
SHORTEST_SECRET = 16  # bytes

OnProgress = Callable[[str, int, int], None]

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromHost).decode


class Host(Protocol):
    """places: of its ranks. pids: of its workers, if it is this one."""

    @property
    def places(self) -> tuple[Place, ...]: ...
    @property
    def pids(self) -> tuple[int, ...]: ...

    def tell(self, rank: int, frame: MakeCache | WhileServing) -> None: ...

    def run(self, batch: bytes) -> None:
        """A batch for its workers, as `engine.framing` has it."""
        ...

    def close(self) -> None:
        """Ends its workers."""
        ...


class RemoteHost:
    """Another host. Owner of the link to it, on which a thread listens while another says that the head is here."""

    pids: tuple[int, ...] = ()

    def __init__(self, node_rank: int, link: Link) -> None:
        self.places: tuple[Place, ...] = ()
        self._name = f"host {node_rank}"
        self._link = link
        self._silence = Silence()
        self._closed = threading.Event()
        self._one = threading.Lock()  # of the two below
        self._calls: tuple[OnFrame, OnLost] | None = None
        self.lost: str | None = None
        for target in (self._listen, self._tick):
            threading.Thread(target=target, name=self._name, daemon=True).start()

    def start(self, start: Start, on_frame: OnFrame, on_lost: OnLost) -> None:
        """Has it start its ranks. Both are called from a thread of its own, on_lost once."""
        self.places = start.places
        with self._one:
            self._calls = on_frame, on_lost
        if self.lost is not None:
            on_lost(self.lost)
        self._send(start)

    def tell(self, rank: int, frame: MakeCache | WhileServing) -> None:
        self._send(Tell(rank, frame))

    def run(self, batch: bytes) -> None:
        self._send(Run(batch))

    def close(self) -> None:
        self._closed.set()
        self._link.close()

    def _send(self, frame: ToHost) -> None:
        with contextlib.suppress(LinkError):  # the thread that listens says why
            self._link.send(_encode(frame))

    def _listen(self) -> None:
        try:
            while True:
                frame = _decode(self._link.read())
                self._silence.end()
                if isinstance(frame, Told) and self._calls is not None:
                    self._calls[0](frame.rank, frame.frame)
                elif isinstance(frame, Gone):
                    return self._lose(frame.why)
        except (LinkError, msgspec.MsgspecError) as error:
            self._lose(str(error))

    def _tick(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            with contextlib.suppress(LinkError):
                self._link.beat(_encode(Here()))
            if self._silence.tick(pulse="not seen from here"):
                self._lose("nothing is heard of it")

    def _lose(self, why: str) -> None:
        with self._one:
            if self._closed.is_set():
                return
            self._closed.set()
            self.lost, calls = f"{self._name}: {why}", self._calls
        self._link.close()
        if calls is not None:
            calls[1](self.lost)


def gather_hosts(
    options: EngineOptions,
    places: Sequence[Place],
    progress: OnProgress | None,
    on_frame: OnFrame,
    on_lost: OnLost,
) -> list[Host]:
    """This host and those that join it, each with its share of the ranks, which begin to load.

    Waits for as long as it takes until all have joined. Raises ModelError, in one line, if that cannot be.
    """
    each = len(places) // options.nnodes
    shares = [tuple(places[first : first + each]) for first in range(0, len(places), each)]
    if options.nnodes == 1:
        return [_start_here(options, shares[0], LOOPBACK, None, on_frame, on_lost)]
    address, secret = shared_secret(options)
    interface = _interface(address[0])
    others = _accept(address, secret, options.nnodes, progress)
    with socket.create_server((address[0], 0)) as meeting:
        first = _start_here(options, shares[0], interface, meeting, on_frame, on_lost)
        store = StoreAt(host=address[0], port=meeting.getsockname()[1])
    for host, share in zip(others, shares[1:], strict=True):
        host.start(Start(options, share, store), on_frame, on_lost)
    return [first, *others]


def _start_here(
    options: EngineOptions,
    places: Sequence[Place],
    interface: str,
    meeting: socket.socket | None,
    on_frame: OnFrame,
    on_lost: OnLost,
) -> Workers:
    store = None if meeting is None else StoreAt(meeting.fileno(), *meeting.getsockname()[:2])
    try:
        return Workers(options, places, store, interface, on_frame, on_lost)
    except OSError as error:
        raise ModelError(f"the worker processes could not be started: {error.strerror}") from error


def shared_secret(options: EngineOptions) -> tuple[tuple[str, int], bytes]:
    """The head's address, and what all hosts know. Raises ModelError if the operator has not given them."""
    if options.head_address is None or options.secret_file is None:
        raise ModelError("several hosts need --head-address and --secret-file")
    try:
        return parse_address(options.head_address), read_secret(options.secret_file)
    except ValueError as error:
        raise ModelError(f"several hosts cannot meet: {error}") from error


def read_secret(path: str) -> bytes:
    """Raises ModelError if there is none, or one that could be guessed."""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ModelError(f"the secret {path} cannot be read: {error.strerror}") from error
    if len(secret) < SHORTEST_SECRET:
        raise ModelError(f"the secret in {path} is too short: make one by `openssl rand -hex 32`")
    return secret


def _interface(address: str) -> str:
    try:
        return interface_of(address)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _accept(address: tuple[str, int], secret: bytes, nnodes: int, progress: OnProgress | None) -> list[RemoteHost]:
    """The other hosts, in order of their ranks, once all are there."""
    found: dict[int, RemoteHost] = {}
    try:
        listening = socket.create_server(address, backlog=nnodes)
    except OSError as error:
        raise ModelError(f"the head cannot listen on {address[0]}:{address[1]}: {error.strerror}") from error
    with listening:
        while len(there := [rank for rank, host in found.items() if host.lost is None]) < nnodes - 1:
            if progress is not None:
                progress("hosts that have joined", 1 + len(there), nnodes)
            if (came := accept(listening, secret, LOOK_SECONDS)) is None:
                continue  # to look whether those that are here still are
            link, first = came
            said = None
            with contextlib.suppress(msgspec.MsgspecError):  # it is some other command's, or of another version
                said = _decode(first)
            if isinstance(said, Joined) and 0 < said.node_rank < nnodes:
                if said.node_rank in found:  # it has come again
                    found[said.node_rank].close()
                found[said.node_rank] = RemoteHost(said.node_rank, link)
            else:
                link.close()
    return [found[rank] for rank in range(1, nnodes)]
